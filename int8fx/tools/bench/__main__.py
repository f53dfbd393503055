"""``python -m int8fx.tools.bench``."""

import sys

from ..cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
