"""The three tasks. Each turns its data into the same thing: inputs, targets and a held-out part."""
