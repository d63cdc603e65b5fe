"""Who holds what: how many ranks hold each element of a parameter, whatever wrapped the model.

Reads parameters and their metadata (DTensor, FSDP1, FSDP2), never a gradient. Private torch API about wrappers is here;
`refusals` has all errors of the room.
"""
