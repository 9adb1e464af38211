"""Kernels fit cards of any shared memory. Nothing is computed; no GPU is needed."""

import pytest
import torch

pytest.importorskip("triton")
from undistilled.ops.triton import room


@pytest.mark.parametrize(
    "capability, bytes_, stage, expected",
    [
        ((8, 9), 101_376, 73_728, 2),  # INT8 by 32, 64 rows: 74,752 bytes by Triton for sm_89
        ((8, 9), 101_376, 139_264, 1),  # NVFP4, 64 rows: 69,632
        ((8, 9), 101_376, 10_240, 3),
        ((8, 0), 166_912, 73_728, 3),  # 148,480
        ((9, 0), 232_448, 73_728, 3),  # 214,016
        ((9, 0), 232_448, 139_264, 1),  # with 2 it would take 266,752
    ],
)
def test_depth(monkeypatch, capability, bytes_, stage, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(room, "room", lambda device: bytes_)
    assert room.depth(3, stage, torch.device("cuda:0")) == expected
