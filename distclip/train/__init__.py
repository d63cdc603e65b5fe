"""The reference trainer: `distclip train CONFIG`, alone or under torchrun."""
