"""Memory figures are a process's own, not its parent's; speeds are of runs that the plan has room for."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models

from tiny import LLAMA, write_checkpoint
from undistilled.errors import UsageError
from undistilled.generate.engine import Engine, open_engine
from undistilled.memory import current_bytes, peak_bytes
from undistilled.observe import others
from undistilled.observe.bench import bench


def test_the_peak_outlives_what_caused_it():
    before = peak_bytes()
    held = torch.ones(200_000_000, dtype=torch.uint8)
    assert current_bytes() > 150_000_000
    del held
    assert peak_bytes() >= before and peak_bytes() >= current_bytes()


def test_a_child_does_not_count_what_its_parent_held():
    held = torch.ones(1_500_000_000, dtype=torch.uint8)
    code = "from undistilled.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held.sum() > 0 and int(done.stdout) < 1_000_000_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    """For one request of 64 tokens."""
    folder = write_checkpoint(tmp_path_factory.mktemp("bench") / "m", LLAMA)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(320)}, "t0")).save(str(folder / "tokenizer.json"))
    return open_engine({"model": str(folder), "context": 64, "batch": 1, "device": "cpu"})


@pytest.mark.parametrize(
    "prompt, new, batch, named", [(16, 8, 4, "1 at once"), (60, 5, 1, "context of 64"), (64, 2, 1, "64")]
)
def test_a_run_that_the_plan_has_no_room_for_is_refused(engine, prompt, new, batch, named):
    with pytest.raises(UsageError, match=named) as error:
        bench(engine, prompt, new, batch, repeat=1)
    assert f"--batch {batch} --context {prompt + new}" in error.value.hint


def test_what_this_and_its_children_took_is_not_others(monkeypatch):
    """A child that runs, and one that has ended."""
    spins = "import time\nuntil = time.process_time() + 0.3\nwhile time.process_time() < until: pass\n"
    before = others._own()
    subprocess.run([sys.executable, "-c", spins], check=True)
    with subprocess.Popen([sys.executable, "-c", spins + "print(flush=True); input()"], stdin=-1, stdout=-1) as runs:
        runs.stdout.readline()
        assert others._own() - before > 0.55
        runs.communicate(b"\n")
    now = {"all": 100.0, "own": 10.0, "clock": 0.0}
    monkeypatch.setattr(others, "_all", lambda: now["all"])
    monkeypatch.setattr(others, "_own", lambda: now["own"])
    monkeypatch.setattr(others, "perf_counter", lambda: now["clock"])
    watch = others.Others()
    now |= {"all": 118.0, "own": 20.0, "clock": 10.0}
    assert watch.cores() == pytest.approx(0.8)
    now["own"] = 30.0  # clocks that differ by a tick
    assert watch.cores() == 0


def test_a_run_that_fills_the_context_makes_every_token(engine):
    found = bench(engine, 60, 4, 1, repeat=1)
    assert (found["prompt_tokens"], found["new_tokens"], found["batch"]) == (60, 4, 1)


def test_the_kernels_of_a_pass_beside_their_floor(engine, monkeypatch):
    from undistilled.observe import explain
    from undistilled.ops.cpu import native

    if native.library() is None:
        pytest.skip(native.why_missing())
    monkeypatch.setattr(explain, "READ", 1 << 22)
    bench(engine, 16, 8, 1, 1)
    rows = {row["name"]: row for row in explain.explain(engine, 1)}
    linear = next(row for name, row in rows.items() if name.startswith("linear"))
    layer = (2 * 128 * 128 + 2 * 32 * 128 + 3 * 128 * 224) * 3
    assert linear["count"] == 3 * 7 and linear["bytes"] in (4 * layer, 2 * layer)
    assert all(row["seconds"] > 0 for row in rows.values())
    assert 0 < linear["floor"] == linear["bytes"] / linear["bandwidth"]
    assert {"norm", "rope", "cache", "attend", "add", "silu mul", "embedding", "head: norm"} <= set(rows)
    with pytest.raises(UsageError, match="5 rows"):
        explain.explain(engine, 5)


def test_reading_meets_every_byte():
    from undistilled.ops.cpu import native

    if native.library() is None:
        pytest.skip(native.why_missing())
    memory = torch.zeros(5 * native.PIECE, dtype=torch.uint8)
    assert native.read(memory) == 0
    for at in (0, native.PIECE + 1021, len(memory) - 1):
        memory[at] ^= 5
        assert native.read(memory) != 0
        memory[at] ^= 5
