"""Shared fixtures; tests/ is on the path so that `tiny` and friends import."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other longer than they compute here
THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
# a shared machine is busy with something else now and then: no test fails for that
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("shared")


@pytest.fixture(autouse=True)
def _seeded():
    """The same numbers for every test, and as many threads: an engine over ranks leaves the process with its share."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") and not (interpreting and item.get_closest_marker("interpreted")):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
