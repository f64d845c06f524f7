"""`python -m fastpeft` prints what `fastpeft doctor` prints."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:] or ["doctor"]))
