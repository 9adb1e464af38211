"""Memory figures: a process's own, not its parent's."""

import subprocess
import sys

import torch

from undistilled.observe.bench import current_bytes, peak_bytes


def test_the_peak_outlives_what_caused_it():
    before = peak_bytes()
    held = torch.ones(200_000_000, dtype=torch.uint8)
    assert current_bytes() > 150_000_000
    del held
    assert peak_bytes() >= before and peak_bytes() >= current_bytes()


def test_a_child_does_not_count_what_its_parent_held():
    held = torch.ones(1_500_000_000, dtype=torch.uint8)
    code = "from undistilled.observe.bench import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held.sum() > 0 and int(done.stdout) < 1_000_000_000
