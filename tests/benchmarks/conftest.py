import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Where to measure: $DEVICE, which `make bench` sets, or a GPU where there is one."""
    return torch.device(os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
