"""A pair that cannot be measured says what each of its ends said."""

import pytest

from undistilled.errors import UndistilledError
from undistilled.parallel import links


def test_both_ends_are_heard(monkeypatch):
    real = links._end
    monkeypatch.setattr(links, "_end", lambda folder, rank, devices: real(folder, rank, [devices[0], "cuda:99"]))
    monkeypatch.setattr(links, "SECONDS", 60)
    with pytest.raises(UndistilledError, match=r"not measured: end 0 said .*; end 1 said .*(CUDA|cuda)"):
        links._pair("cpu", "cpu")


def test_a_pair_of_processes():
    found = links._pair("cpu", "cpu")
    assert found.kind == "memory" and found.source == "measured"
    assert 1e-6 < found.latency_s < 0.1 and found.bytes_per_s > 1e7
