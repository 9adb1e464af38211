"""A Ray cluster of two hosts, which are network namespaces of this machine with a cable between them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint

TESTS = Path(__file__).parents[1]
HOSTS = "198.18.0.1", "198.18.0.2"
PORT = 6399

WRITE = """
import json, sys
from undistilled.generate.engine import open_engine
from undistilled.schedule.request import Request, Sampling
if __name__ == "__main__":
    options = {"model": sys.argv[1], "scheme": "fp32", "device": "cpu", "batch": 2, **json.loads(sys.argv[2])}
    engine = open_engine(options)
    asked = Request("a", [5, 6, 7, 8, 9], Sampling(max_tokens=16, temperature=0, ignore_eos=True))
    tokens = [t for output in engine.run_all([asked])["a"] for t in output.tokens]
    crew = engine.runner.crew
    nodes = [node["address"] for node in crew.place.nodes] if crew else []
    engine.close()
    print(json.dumps([tokens, nodes]))
"""


def missing():
    if os.geteuid() or not shutil.which("ip"):
        return "needs root and iproute2, to make network namespaces"
    with contextlib.suppress(ImportError):
        import ray  # noqa: F401

        return ""
    return "Ray is not installed: pip install 'undistilled[cluster]'"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def spaces():
    """Two namespaces that reach each other and nothing else."""
    names = [f"undistilled-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{HOSTS[i]}/24", "dev", f"cable{i}")
            for link in ("lo", f"cable{i}"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def started(space, *arguments, env):
    command = ["ip", "netns", "exec", space, sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
    command += ["--block", "--num-cpus", "1", "--disable-usage-stats", "--object-store-memory", str(100 << 20)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def listens(space, seconds=60):
    """Wait until the head's port answers."""
    knock = f"import socket; socket.create_connection({(HOSTS[0], PORT)!r}, 1)"
    until = time.monotonic() + seconds
    while subprocess.run(["ip", "netns", "exec", space, sys.executable, "-c", knock], capture_output=True).returncode:
        assert time.monotonic() < until, "the head does not start"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(spaces, tmp_path_factory):
    """The first host's namespace and the environment of who speaks with its cluster."""
    path = os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": f"{HOSTS[0]}:{PORT}"}
    head = ("--head", "--port", str(PORT), "--include-dashboard", "false", "--node-ip-address", HOSTS[0])
    nodes = [started(spaces[0], *head, env={k: v for k, v in env.items() if k != "RAY_ADDRESS"})]
    try:
        listens(spaces[0])
        nodes.append(started(spaces[1], "--address", env["RAY_ADDRESS"], "--node-ip-address", HOSTS[1], env=env))
        yield spaces[0], env
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)


def test_two_hosts_write_what_one_process_does(cluster, tmp_path):
    space, env = cluster
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(folder)
    script = tmp_path / "write.py"
    script.write_text(WRITE)

    def written(within=(), **layout):
        command = [*within, sys.executable, str(script), str(folder), json.dumps(layout)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    expected, _ = written()
    for layout in ({"tp": 2}, {"pp": 2, "microbatches": 2}):
        tokens, nodes = written(("ip", "netns", "exec", space), cluster="ray", **layout)
        assert tokens == expected, layout
        assert nodes == list(HOSTS), layout
