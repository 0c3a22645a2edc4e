import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Where to measure: $DEVICE, which `make bench` sets, or a GPU where there is one."""
    return torch.device(os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="module")
def single_thread():
    """For work so small that two threads wait for one another more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
