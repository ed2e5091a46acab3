"""Entry of a serving frontend that the launcher starts: `python -P -m frontend --start-fd N`."""

import sys

import frontend
from frontend.process import run
from ipc.config import FrontendChannels
from ipc.lifetime import run_child

sys.exit(run_child(frontend, FrontendChannels, run))
