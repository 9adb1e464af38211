"""Recorded decode passes: the bits of passes that are not recorded, for every model, scheme and number of rows."""

import pytest
import torch

from runs import greedy
from tiny import CONFIGS, load, write_checkpoint
from undistilled.events import subscribed
from undistilled.generate.programs import Programs
from undistilled.generate.runner import Runner
from undistilled.model.batch import Batch
from undistilled.ops import registry
from undistilled.ops.cpu import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

SIZE = 16  # tokens of a cache block
SCHEMES = ["fp32", "bf16", "int8", "int4", "nl3-g64", "mxfp4", "fp8_block", "fp8_channel", "tiles16x32-2x3-3x4-4x2"]


def rows_at(contexts, generator, vocab=320):
    """A batch of rows that see that many tokens, their blocks in any order, each its own."""
    rows, blocks = len(contexts), max(-(-c // SIZE) for c in contexts)
    tables = torch.randperm(rows * blocks, generator=generator).view(rows, blocks).int()
    seen = torch.tensor(contexts, dtype=torch.int32)
    last = seen.long() - 1
    slots = tables[torch.arange(rows), last // SIZE].long() * SIZE + last % SIZE
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    return Batch(tokens, last, slots, tables, seen, SIZE, False)


def caches_of(decoder, slots, dtype, generator):
    from undistilled.generate.cache import parts_of_cache

    shapes = parts_of_cache(decoder.spec)
    return [tuple(torch.randn(slots, *s, generator=generator).to(dtype) for s in shapes) for _ in decoder.layers]


def passes(decoder, counts, dtype=torch.bfloat16):
    """Passes with and without programs over the same caches: pairs of hidden states and caches, and the programs."""
    generator = torch.Generator().manual_seed(1)
    caches = caches_of(decoder, 31 * 5 * SIZE, dtype, generator)
    other = [tuple(t.clone() for t in cache) for cache in caches]
    programs = Programs(decoder, caches, 31, 8, SIZE)
    with torch.inference_mode():
        for contexts in counts:
            batch = rows_at(contexts, generator)
            got, want = programs(batch).h_TD.clone(), decoder(batch, other)
            assert torch.equal(got, want), contexts
            assert all(torch.equal(a, b) for x, y in zip(caches, other, strict=True) for a, b in zip(x, y, strict=True))
    return programs


COUNTS = [[5], [6], [70], [9, 30, 1], [10, 31, 64], [75], [20] * 31, [21] * 30 + [33], [2]]


CASES = [(name, scheme) for scheme in SCHEMES for name in ("deepseek_v3", "llama")]
CASES += [(name, "int8") for name in ("deepseek_v3-no-q-lora", "deepseek_v2", "qwen2", "qwen3")]
CASES.remove(("deepseek_v3", "fp8_channel"))  # its experts have no kernel


@pytest.mark.parametrize("name, scheme", CASES)
def test_a_replay_has_the_bits_of_the_pass(name, scheme, tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme=scheme)
    programs = passes(decoder, COUNTS)
    assert not programs.refused or max(programs.refused.values()) < 2
    assert set(programs.programs) >= {1, 3, 31}
    one = programs.programs[1][0]
    assert 0 < one.barriers < len(one)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("kv", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "auto", "int8"])
def test_other_caches_and_products(name, kv, dtype, tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme="int8", dtype=dtype)
    assert passes(decoder, COUNTS, kv).programs


@pytest.mark.parametrize("scheme", ["int8-g32", "int4", "int8,expert=nl3-g32,expert.down=int4-g32-sym"])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_products_of_integers(name, scheme, tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme=scheme, dtype="int8")
    assert passes(decoder, COUNTS).programs


def test_what_has_no_kernel_is_refused_and_right(tmp_path):
    """Naive attention in place of the absorbed: PyTorch's own operations."""
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"]), scheme="int8")
    for block in decoder.layers:
        block.self_attn.absorbed = False
    said = []
    with subscribed(said.append):
        programs = passes(decoder, [[5], [6], [7], [8]])
    assert not programs.programs and programs.refused == {1: 2}
    refused = [e for e in said if e.name == "engine.program_refused"]
    assert len(refused) == 2 and "aten" in refused[0].fields["operation"]


def test_experts_without_a_kernel_are_refused_and_right(tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"]), scheme="fp8_channel")
    assert not passes(decoder, COUNTS[:4]).programs


def test_a_sum_that_pytorch_takes_is_noticed(tmp_path, monkeypatch):
    from undistilled.model import decoder as module

    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS["llama"]), scheme="int8")
    monkeypatch.setattr(module, "add", lambda a, b: a + b)
    programs = passes(decoder, [[5], [6], [7]])
    assert not programs.programs


def test_what_pytorch_does_not_see_can_say_so(tmp_path, monkeypatch):
    """As a sum over machines will: memory that something else writes."""
    from undistilled.model import decoder as module
    from undistilled.ops.cpu import program

    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS["llama"]), scheme="int8")
    add = module.add

    def summed(a, b):
        program.foreign("sum over machines")
        return add(a, b)

    monkeypatch.setattr(module, "add", summed)
    assert not passes(decoder, [[5], [6], [7]]).programs
    program.foreign("nothing is recorded")


def test_the_reference_is_not_recorded(tmp_path):
    decoder, _ = load(write_checkpoint(tmp_path / "m", CONFIGS["llama"]), scheme="fp32")
    with registry.force_reference():
        assert not passes(decoder, [[5], [6]]).programs


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_the_same_tokens_on_any_number_of_threads(name, tmp_path):
    decoder, plan = load(write_checkpoint(tmp_path / "m", CONFIGS[name]), scheme="int8")
    prompts, before = [[5, 9, 11], list(range(2, 60)), [300] * 33], torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(greedy(decoder, plan, prompts, 24))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_memory_is_used_again(tmp_path):
    """A recording takes what a pass has alive at a time, and further row counts of like sizes take it too."""
    decoder, plan = load(write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"]), scheme="int8")
    runner = Runner(decoder, plan)
    assert isinstance(runner.part.graphs, Programs)
    programs = passes(decoder, [[5] * 8, [6] * 8])
    made = sum(p.numel() for p in decoder.layers.parameters())
    assert programs.arena.nbytes < made // 2
