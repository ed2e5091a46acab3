"""Entry of a serving frontend that the launcher starts: `python -P -m frontend --start-fd N`."""

import sys

from frontend.process import start

sys.exit(start(sys.argv[1:]))
