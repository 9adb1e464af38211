"""A model over two processes, behind the API: answers as alone, and what happens when a rank is lost (fault 18)."""

import signal
import time

import psutil
import pytest
import torch
from live_server import PATIENCE, Running

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint
from undistilled.errors import UndistilledError

WATCHDOG = 2.0
SMALL = DEEPSEEK | {"vocab_size": 256}
GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_checkpoint(tmp_path_factory.mktemp("served") / "m", SMALL)
    write_tokenizer(made)
    return str(made)


def options(folder, **more):
    return {"model": folder, "scheme": "fp32", "device": "cpu", "batch": 4, "watchdog": WATCHDOG, **more}


def ask(running, tokens=12):
    body = {"prompt": "abc abc", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return running.post("/v1/completions", {"model": "m", **body})


def rank_pids(running):
    """Processes of ranks 0, 1, ..."""
    first = psutil.Process(running.client.pid)
    others = [p for p in first.children() if any(word.startswith("rank=") for word in p.cmdline())]
    return [first, *sorted(others, key=lambda p: p.pid)]  # Triton starts compilers too


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_answer_as_one(folder, device):
    with Running(options(folder, device=device), factory="undistilled.generate.engine:open_engine") as alone:
        expected = ask(alone).json()["choices"][0]["text"]
    more = {"device": device, "tp": 2}
    with Running(options(folder, **more), factory="undistilled.generate.engine:open_engine") as running:
        assert ask(running).json()["choices"][0]["text"] == expected
        pids = rank_pids(running)
        assert len(pids) == 2
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in pids)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("device", "how"),
    [*(("cpu", how) for how in ("killed", "stopped", "stalled")),
     *(pytest.param("cuda", how, marks=DEVICES[1].marks) for how in ("killed", "stopped"))],
)  # fmt: skip
def test_a_lost_rank_ends_the_run_within_the_watchdog(folder, rank, device, how):
    """While a request runs: its client hears, /health says 503, the reason names the rank, and nobody is left over.
    (A GPU's replayed pass has no collectives of the host to stall in.)"""
    more = {"tp": 2, "device": device, **({"stalls": rank} if how == "stalled" else {})}
    with Running(options(folder, **more), factory="faulty_ranks:open_engine") as running:
        pids = rank_pids(running)
        if how != "stalled":
            assert ask(running).status_code == 200
            pids[rank].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        answer = ask(running, 60)
        assert answer.status_code in (500, 503), answer.text
        while running.get("/health").status_code != 503:
            assert time.monotonic() - began < WATCHDOG + PATIENCE
            time.sleep(0.05)
        said = running.client._died
        assert f"Rank {rank}" in said
        if how == "stalled":
            assert "computing" in said and "all_reduce" in said
        until = time.monotonic() + PATIENCE
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in pids):
            assert time.monotonic() < until, pids
            time.sleep(0.05)


def test_an_error_of_the_driver_within_a_pass_ends_the_run(folder):
    """The others are in a pass that it left: their next sums would be of different passes."""
    with Running(options(folder, tp=2, raises="yes", watchdog=1.0), factory="faulty_ranks:open_engine") as running:
        pids = rank_pids(running)
        assert ask(running, 60).status_code in (500, 503)
        until = time.monotonic() + PATIENCE
        while running.get("/health").status_code != 503 or any(p.is_running() for p in pids[1:]):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "Rank 0 failed: MemoryError" in running.client._died


def test_a_stage_that_is_killed_ends_the_run(folder):
    with Running(options(folder, pp=2), factory="faulty_ranks:open_engine") as running:
        assert ask(running).status_code == 200
        rank_pids(running)[1].kill()
        assert ask(running, 60).status_code in (500, 503)
        until = time.monotonic() + PATIENCE
        while running.get("/health").status_code != 503:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "Rank 1 was killed by signal 9" in running.get("/health").text


def test_a_rank_that_never_joins_is_no_wait_without_end(folder):
    """The driver waits in its own join, which nothing but the watchdog ends."""
    began = time.monotonic()
    with pytest.raises(UndistilledError, match="Rank 1 failed: ZeroDivisionError"):
        with Running(options(folder, tp=2, absent="yes"), factory="faulty_ranks:open_engine"):
            pass
    assert time.monotonic() - began < 2 * PATIENCE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_lost_while_nothing_runs_is_noticed(folder, rank):
    with Running(options(folder, tp=2), factory="faulty_ranks:open_engine") as running:
        rank_pids(running)[rank].kill()
        until = time.monotonic() + PATIENCE
        while running.get("/health").status_code != 503:
            assert time.monotonic() < until
            time.sleep(0.05)
        was = "waiting for a pass" if rank else "idle"
        assert running.client._died.startswith(f"Rank {rank}") and f"it was {was}" in running.client._died


def test_a_rank_that_cannot_load_says_why(tmp_path):
    """Rank 1's own weights are bad: the error is the one that a single process gives."""
    from undistilled.errors import BadArtefact

    folder = write_checkpoint(tmp_path / "m", SMALL)
    write_tokenizer(folder)
    spoil(folder / "model.safetensors", "model.layers.2.self_attn.o_proj.weight")
    with pytest.raises(BadArtefact, match=r"o_proj.*NaN"):
        with Running(options(str(folder), pp=2), factory="undistilled.generate.engine:open_engine"):
            pass


def spoil(file, name):
    from undistilled.checkpoint.safetensors import read_header

    entry = read_header(file)[name]
    with file.open("r+b") as opened:
        opened.seek(entry.start)
        opened.write(b"\xff" * 4)
