"""The reference trainer: `distclip train CONFIG`, alone or under torchrun.

Uses public names of distclip alone. Reads configs and data, and writes into the folder of its run.
"""
