"""Decode as CUDA graphs gives what the same passes give launched one by one."""

import pytest

from runs import greedy
from tiny import CONFIGS, load, write_checkpoint
from undistilled.generate import part
from undistilled.generate.graphs import bucket, capturable

pytestmark = pytest.mark.gpu


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 5, 64)] == [1, 2, 4, 8, 64]


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("deepseek_v3", "int8"),
        ("deepseek_v3", "int4-g32"),
        ("llama", "int4-g32"),
        ("deepseek_v3", "tiles16x32-3x1-5x1"),
        ("llama", "tiles16x32-2x1-4x1"),
    ],
)
def test_same_tokens(name, scheme, tmp_path, monkeypatch):
    decoder, plan = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme=scheme, device=None)
    assert capturable(decoder)
    prompts = [[5, 9, 11], list(range(2, 90)), [300] * 33]
    replayed = greedy(decoder, plan, prompts, 24)
    monkeypatch.setattr(part, "capturable", lambda decoder: False)
    assert greedy(decoder, plan, prompts, 24) == replayed


@pytest.mark.parametrize("name, scheme", [("deepseek_v3", "bf16"), ("llama", "tiles8x32-3x1"), ("llama", "nl5-g32")])
def test_weights_without_a_kernel_are_not_captured(name, scheme, tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme=scheme, device=None)
    assert not capturable(decoder)
