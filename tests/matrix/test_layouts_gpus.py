"""Two GPUs over NCCL and symmetric memory give what one gives. Pipelines: the same bits. Cut weights in FP32: within
1e-5 of the logits' size, since a GPU's products of other shapes sum in other orders. Replayed passes: the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_layouts import SCHEMES
from test_nano_layouts import written

from ranks import Cell, Pool, run
from tiny import WIDE, write_checkpoint
from undistilled.parallel.local import RANK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LAYOUTS = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "ep2": {"ep": 2}}
GRAPHS = ("int8", "int4", SCHEMES[-1])


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def pool(layout, tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp(layout), 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(write_checkpoint(tmp_path_factory.mktemp(name), config)) for name, config in WIDE.items()}


def models(layout):
    return [name for name in WIDE if name != "llama" or layout != "ep2"]


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layout_is_the_model(layout, pool, folders, scheme):
    for model in models(layout):
        expected = run(Cell(folders[model], scheme, device=None), 0, None)
        found = pool.logits(Cell(folders[model], scheme, LAYOUTS[layout], device=None))
        assert found.shape == expected.shape
        if layout == "pp2":
            assert torch.equal(found, expected), (model, apart(found, expected))
        else:
            assert apart(found, expected) < 1e-5, model


@pytest.mark.parametrize("scheme", GRAPHS)
def test_replayed_passes_are_the_passes(layout, pool, folders, scheme):
    for model in models(layout):
        cells = [
            Cell(folders[model], scheme, LAYOUTS[layout], device=None, dtype="auto", replayed=replayed)
            for replayed in (True, False)
        ]
        replayed, plain = (pool.logits(cell) for cell in cells)
        assert torch.equal(replayed, plain), (model, apart(replayed, plain))


@pytest.mark.parametrize("degrees", [*LAYOUTS.values(), {"pp": 2, "microbatches": 4}], ids=str)
def test_nano_writes_the_same(degrees):
    assert written(device=None, **degrees) == written(device=None)


WRITE = """
from undistilled.generate.engine import open_engine
from undistilled.schedule.request import Request, Sampling
if __name__ == "__main__":
    options = {{"model": "r1-nano", "scheme": "int8", "context": 2048, "batch": 1, "watchdog": 3.0, "{axis}": 2}}
    engine = open_engine(options)
    print("ready", flush=True)
    while True:
        sampling = Sampling(max_tokens=2000, temperature=0, ignore_eos=True)
        engine.run_all([Request("a", [5, 6, 7], sampling)])
"""


@pytest.mark.parametrize("axis", ["tp", "pp"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_rank_ends_the_run(axis, number, rank, tmp_path):
    """Within the watchdog's 3 s and a grace of 5: nobody waits in a collective, and rank 1's end is told by name."""
    script = tmp_path / "write.py"
    script.write_text(WRITE.format(axis=axis))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src") + ":" + os.environ.get("PYTHONPATH", "")}
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert run.stdout.readline() == "ready\n", run.communicate(timeout=30)[1]
        time.sleep(1)
        first = psutil.Process(run.pid)
        others = [p for p in first.children() if RANK in p.cmdline()]  # Triton starts compilers too
        ranks = [first, *others]
        assert len(ranks) == 2
        ranks[rank].send_signal(number)
        if rank == 0 and number == signal.SIGSTOP:  # nothing of the run can notice: whoever started it sees the stop
            time.sleep(1)
            ranks[0].kill()
        _, said = run.communicate(timeout=30)
        assert run.returncode
        if rank:
            assert "Rank 1 " in said, said
        psutil.wait_procs(ranks, timeout=10)
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    finally:
        run.kill()
