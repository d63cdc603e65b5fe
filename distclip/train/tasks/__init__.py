"""The three tasks. Each turns its data into inputs, targets and a held-out part."""
