"""What every test run needs before torch is loaded, and how many processes share the tests."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the processes under test on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for engines too: several processes run at any time, all models are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: none beside this one where there is a GPU, since each engine there takes most of its memory."""
    from frontend.launch import cuda_devices

    return 0 if cuda_devices() else min(os.cpu_count() or 1, 4)
