"""Ranks on two nodes of a Ray cluster, which are two raylets of this machine: tokens as of one process, and failures.

What needs Ray is skipped without it; `pip install 'undistilled[cluster]'`.
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact, DoesNotFit, RankLost, UsageError
from undistilled.generate.engine import open_engine, plan_for
from undistilled.schedule.request import Request, Sampling
from undistilled.serve.worker import ENGINE

SOURCES = Path(__file__).parents[2] / "src"
WATCHDOG = 8.0
PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_checkpoint(tmp_path_factory.mktemp("spread") / "m", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(made)
    return str(made)


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'undistilled[cluster]'")


@pytest.fixture(scope="module")
def raylets(ray):
    """Two, of a core each."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ADDRESS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCES), before["PYTHONPATH"] or ""])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        ray.shutdown()
        cluster.shutdown()


def options(folder, **more):
    return {"model": folder, "scheme": "fp32", "device": "cpu", "batch": 2, "watchdog": WATCHDOG, **more}


def written(engine, tokens=16):
    asked = Request("a", PROMPT, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
    return [t for output in engine.run_all([asked])["a"] for t in output.tokens]


def ranks_of(node):
    """Processes of ranks that a raylet's workers have started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [p for p in raylet.children(recursive=True) if "undistilled.generate.rank" in " ".join(p.cmdline())]


def gone(processes, seconds=15.0):
    until = time.monotonic() + seconds
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < until, processes
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(folder):
    engine = open_engine(options(folder))
    return written(engine)


def test_no_cluster(ray, folder, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="ray start --head"):
        open_engine(options(folder, cluster="ray", tp=2))


def test_without_ray(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"undistilled\[cluster\]"):
        open_engine(options(folder, cluster="ray", tp=2))


def test_a_kind_of_cluster_that_is_none(folder):
    with pytest.raises(UsageError, match="Known: ray"):
        open_engine(options(folder, cluster="slurm", tp=2))


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "microbatches": 2}], ids=str)
def test_tokens_are_those_of_one_process(raylets, folder, expected, layout):
    engine = open_engine(options(folder, cluster="ray", **layout))
    try:
        assert written(engine) == expected
        processes = [p for node in raylets.list_all_nodes() for p in ranks_of(node)]
        assert len(processes) == 1  # the driver is the other rank
        connected = {c.raddr.ip for c in processes[0].net_connections("tcp") if c.raddr}
        assert engine.runner.crew.place.address in connected
    finally:
        engine.close()
    gone(processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run_by_its_node(raylets, folder, number):
    engine = open_engine(options(folder, cluster="ray", tp=2, context=256))
    try:
        [process] = [p for node in raylets.list_all_nodes() for p in ranks_of(node)]
        process.send_signal(number)
        how = "killed by signal 9" if number == signal.SIGKILL else "no sign of life"
        began = time.monotonic()
        with pytest.raises(RankLost, match=f"Rank 1 on node [0-9.]+ .*{how}"):
            written(engine, 200)
            while time.monotonic() < began + 20:
                engine.stats()
                time.sleep(0.1)
        assert time.monotonic() - began < WATCHDOG + 10
        gone([process])
    finally:
        engine.close()


def test_a_lost_actor_is_told_from_a_lost_host(raylets, folder):
    """What Ray runs for a rank is killed, as for want of memory; the rank's process ends with it."""
    engine = open_engine(options(folder, cluster="ray", tp=2, context=256))
    try:
        [process] = [p for node in raylets.list_all_nodes() for p in ranks_of(node)]
        process.parent().kill()
        with pytest.raises(RankLost, match=r"Rank 1 on node [0-9.]+ is gone with what kept it on its host"):
            until = time.monotonic() + 30
            while time.monotonic() < until:
                engine.stats()
                time.sleep(0.1)
        gone([process])
    finally:
        engine.close()


def test_a_node_without_the_model_is_named(raylets, folder, tmp_path):
    from undistilled.parallel.places import place_for

    plan = plan_for(find(folder), options(folder, cluster="ray", tp=2))
    with pytest.raises(BadArtefact, match=f"Node [0-9.]+: .*{tmp_path}/elsewhere"):
        place_for("ray", plan, f"{tmp_path}/elsewhere")
    other = write_checkpoint(tmp_path / "m", DEEPSEEK)
    with pytest.raises(BadArtefact, match=r"Node [0-9.]+: .* is another model"):
        place_for("ray", plan, str(other))


def test_no_room(raylets, folder, monkeypatch):
    monkeypatch.setattr("undistilled.parallel.ray_nodes.PLACED", 2.0)
    with pytest.raises(DoesNotFit, match=r"no room for 4 ranks .* free are [12] CPU"):
        open_engine(options(folder, cluster="ray", tp=4))


def test_a_server_starts_its_engine_again(raylets, folder):
    """A rank is killed under a served model: 503 until another engine, with another rank, answers the same."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
    from live_server import Running

    body = {"model": "m", "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with Running(options(folder, cluster="ray", tp=2), factory=ENGINE) as running:
        before = running.post("/v1/completions", body).json()["choices"][0]["text"]
        [process] = [p for node in raylets.list_all_nodes() for p in ranks_of(node)]
        process.kill()
        seen, until = set(), time.monotonic() + 60
        while 503 not in seen or running.get("/health").status_code != 200:
            answer = running.get("/health")
            seen.add(answer.status_code)
            assert answer.status_code == 200 or "started again" in answer.json()["error"]["message"]
            assert time.monotonic() < until
            time.sleep(0.05)
        assert running.post("/v1/completions", body).json()["choices"][0]["text"] == before
        [another] = [p for node in raylets.list_all_nodes() for p in ranks_of(node)]
        assert another.pid != process.pid


def test_a_lost_node_ends_the_run(raylets, folder):
    """The last one over these two. Its rank ends too, since it hears nothing of the driver any more."""
    engine = open_engine(options(folder, cluster="ray", tp=2, context=256))
    try:
        [(node, process)] = [(node, p) for node in raylets.list_all_nodes() for p in ranks_of(node)]
        for each in node.all_processes["raylet"]:
            each.process.kill()
        gone = r"Rank 1 on node [0-9.]+ is gone, and its host with it; it was waiting for a pass\."
        with pytest.raises(RankLost, match=gone):
            until = time.monotonic() + 30
            while time.monotonic() < until:
                engine.stats()
                time.sleep(0.1)
        gone([process], 3 * WATCHDOG + 15)
    finally:
        engine.close()
