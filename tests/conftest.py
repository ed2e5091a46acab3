"""What every test run needs before torch is loaded."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the processes under test on two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
