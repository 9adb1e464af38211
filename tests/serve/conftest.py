"""Servers that tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Running

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _worker_path() -> None:
    paths = [str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with Running({}) as running:
        yield running


@pytest.fixture(scope="session")
def slow() -> Iterator[Running]:
    """A token every 20 ms."""
    with Running({"delay": 0.02}) as running:
        yield running
