"""Whether the trainer can read a config: `python3 check.py CONFIG [key=value ...]`. If not, one line and exit code 2.

A wrong key would otherwise be found only after all machines have met, and again at each restart.
"""

import sys

from distclip.train.parse import read_config
from distclip.train.problem import ConfigError

try:
    read_config(sys.argv[1], sys.argv[2:])
except ConfigError as error:
    print(f"distclip: {error}", file=sys.stderr)
    sys.exit(2)
