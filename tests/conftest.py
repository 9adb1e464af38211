"""Shared fixtures; tests/ is on the path so that `tiny` and friends import."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") and not (interpreting and item.get_closest_marker("interpreted")):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
