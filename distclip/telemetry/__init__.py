"""What a Clipper does, written to where its users look: :class:`Log`, and one file for each place.

``from distclip.telemetry.tensorboard import TensorBoard`` and its like import their library, and only they do. Nothing
here is needed to clip: the core knows nothing of it.
"""

from .json_lines import JsonLines as JsonLines
from .log import Log as Log
from .sink import Sink as Sink
