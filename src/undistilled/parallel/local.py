"""Ranks as processes of this machine, which talk over local sockets in a private directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import zmq

from .. import interrupt
from ..plan.hardware import Machine, load_machine
from ..plan.plan import Plan
from ..plan.probe import node_cores
from ..wire import private_directory
from .cores import confine, shared_out

RANK = "undistilled.generate.rank"  # the module that a rank's process runs
# gloo's and NCCL's own sockets stay on this machine
LOOPBACK = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")


def threads(ranks: int) -> int:
    """Of each of the ranks that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


class Spawned:
    """A process of this machine that runs a rank. It ends when this one does: its standard input then does."""

    where = ""

    def __init__(self, boot: dict[str, Any], network: dict[str, str]) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(boot["threads"])} | network
        command = [sys.executable, "-P", "-m", RANK, f"rank={boot['rank']}"]  # the last for people, in `ps`
        with interrupt.shielded():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(boot | {"parent": os.getpid()}).encode() + b"\n")
        self.process.stdin.flush()

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


class Local:
    """All ranks on this machine."""

    def __init__(self, plan: Plan, model: str) -> None:
        assert plan.mesh is not None
        self.mesh, self.model = plan.mesh, model
        self.size, self.device, self.network = plan.mesh.size, plan.mesh.devices[0], LOOPBACK
        self.hosts = 1
        nodes = node_cores().values() if self.device == "cpu" else ()
        self.cores = shared_out(self.size, list(nodes)) or [()] * self.size
        self.threads = threads(self.size)
        self.directory = private_directory()
        self.store = f"{self.directory}/rendezvous"
        plan.write(Path(self.directory) / "plan.json")
        self._before = confine(self.cores[0])

    def bind(self, passes: zmq.Socket[bytes], reports: zmq.Socket[bytes]) -> None:
        passes.bind(f"ipc://{self.directory}/passes")
        reports.bind(f"ipc://{self.directory}/reports")

    def start(self, rank: int, told: dict[str, Any]) -> Spawned:
        boot = told | {
            "rank": rank,
            "model": self.model,
            "plan": f"{self.directory}/plan.json",
            "device": self.mesh.devices[rank],
            "threads": self.threads,
            "cores": self.cores[rank],
            "passes": f"ipc://{self.directory}/passes",
            "reports": f"ipc://{self.directory}/reports",
            "store": self.store,
        }
        return Spawned(boot, self.network)

    def close(self) -> None:
        confine(self._before if self.cores[0] else ())
        shutil.rmtree(self.directory, ignore_errors=True)


def place(plan: Plan, model: str) -> Local:
    return Local(plan, model)


def machine() -> Machine:
    return load_machine("this")
