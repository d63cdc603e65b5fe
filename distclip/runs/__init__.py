"""Any training run that logged gradient norms, as one `Run`: ours, and those of programs that never heard of us.

A file a format, each recognised by itself; `open_runs` finds out which. `distclip diff` compares two of them. Reads
files and numpy arrays, nothing else: no gradient, no model, no other process.
"""

from distclip.runs.names import Names as Names
from distclip.runs.recognise import open_runs as open_runs, size_of as size_of
from distclip.runs.refusals import RunError as RunError
from distclip.runs.run import Layers as Layers, Run as Run
