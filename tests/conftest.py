import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors are slower on two threads than on one, and pytest-xdist runs one process a core."""
    import torch

    torch.set_num_threads(1)
