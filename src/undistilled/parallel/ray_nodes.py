"""Ranks on the nodes of a Ray cluster; the driver is rank 0, on the node where it was started.

Ray reserves and places, by a bundle for each stage where a node has room for one, else for each rank; an actor there
starts the rank's process and answers for it. Passes go over TCP, encrypted; process groups meet at a server of the
driver's and talk in the clear, as Ray itself does: a cluster's network is one whose members trust each other.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from ..checkpoint.resolve import find
from ..errors import BadArtefact, DoesNotFit, UndistilledError, UsageError
from ..plan.hardware import Machine, load_machine
from ..plan.plan import Plan, config_hash
from ..wire import hidden, private_directory
from .cluster import merged
from .local import Spawned, threads
from .places import LOST, UNTOLD

PLACED = 30.0  # seconds that Ray may take to find room
ANSWERS = 120.0  # seconds for an actor to start and say what its node has


def _joined() -> Any:
    """The ray module, once this process belongs to a cluster."""
    try:
        import ray
    except ImportError:
        raise UsageError("--cluster ray needs Ray.", "Install it: pip install 'undistilled[cluster]'.") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(
                f"No Ray cluster answers here: {str(error).splitlines()[0]}",
                "Start one with `ray start --head`, and `ray start --address HOST:6379` on the other machines.",
            ) from None
    return ray


def _interface(address: str) -> dict[str, str]:
    """What tells gloo and NCCL to use the interface with this address."""
    import psutil

    for name, has in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in has):
            return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), name)
    return {}


class Keeper:
    """An actor on a rank's node: says what is there, and holds the rank's process."""

    def look(self, model: str, config: str) -> dict[str, Any]:
        """address, node (Ray's id), gpus, free bytes of main memory; `lacks`: why the node cannot run the model with
        this hash."""
        import ray

        found: dict[str, Any] = {"address": ray.util.get_node_ip_address(), "gpus": ray.get_gpu_ids(), "lacks": ""}
        found["node"] = ray.get_runtime_context().get_node_id()
        found["free"] = next((d.free_bytes for d in load_machine("this").devices if d.kind == "cpu"), 0)
        try:
            here = find(model)
            if not here.has_weights:
                found["lacks"] = f"{model} has no weights."
            elif config_hash(here.config) != config:
                found["lacks"] = f"{model} is another model: its config.json differs from the driver's."
        except UndistilledError as error:
            found["lacks"] = str(error)
        return found

    def run(self, boot: dict[str, Any], plan: str, sharing: int) -> int:
        """Run the rank to its end, beside `sharing` ranks of this host in all; its exit code."""
        import ray

        folder = private_directory()
        try:
            (Path(folder) / "plan.json").write_text(plan)
            boot |= {"plan": f"{folder}/plan.json", "threads": threads(sharing)}
            return Spawned(boot, _interface(ray.util.get_node_ip_address())).process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Remote:
    """A rank's process on a node, as the driver sees it. node: Ray's id of that."""

    def __init__(self, ray: Any, keeper: Any, where: str, node: str, run: Any) -> None:
        self.ray, self.keeper, self.where, self.node, self._run = ray, keeper, where, node, run
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self.ray.wait([self._run], timeout=0)[0]:
            try:
                self._code = self.ray.get(self._run)
            except self.ray.exceptions.RayError:
                self._code = UNTOLD if self._node_lives() else LOST
        return self._code

    def _node_lives(self) -> bool:
        return any(each["NodeID"] == self.node and each["Alive"] for each in self.ray.nodes())

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self.ray.kill(self.keeper)

    def wait(self, seconds: float) -> None:
        self.ray.wait([self._run], timeout=max(seconds, 0.0))


class RayNodes:
    """The places of a plan's ranks on a cluster."""

    def __init__(self, plan: Plan, model: str) -> None:
        assert plan.mesh is not None
        self.ray, self.plan, self.model, self.mesh = _joined(), plan, model, plan.mesh
        self.size, self.address = plan.mesh.size, self.ray.util.get_node_ip_address()
        self.group: Any = None
        self.keepers: list[Any] = []
        try:
            of = self._reserve()
            self.keepers = [self._keeper(bundle) for bundle in of]
            self.nodes = self._look()
            self._check()
        except BaseException:
            self.close()
            raise
        self.sharing = Counter(node["address"] for node in self.nodes)
        self.hosts = len(self.sharing)
        self.threads, self.network = threads(self.sharing[self.address]), _interface(self.address)
        self.device = f"cuda:{self.nodes[0]['gpus'][0]}" if self._kind == "cuda" else "cpu"
        self._meet()

    @property
    def _kind(self) -> str:
        return self.mesh.devices[0].split(":")[0]

    @property
    def _each(self) -> dict[str, float]:
        return {"CPU": 1.0} | ({"GPU": 1.0} if self._kind == "cuda" else {})

    def _reserve(self) -> list[int]:
        """Take a placement group; the bundle of each rank. The driver's node has rank 0's."""
        inner, own = self.mesh.inner, self.ray.get_runtime_context().get_node_id()
        has = next(node["Resources"] for node in self.ray.nodes() if node["NodeID"] == own)
        stage = {name: amount * inner for name, amount in self._each.items()}
        whole = all(has.get(name, 0) >= amount for name, amount in stage.items())
        bundles = [dict(stage if whole else self._each) for _ in range(self.mesh.pp if whole else self.size)]
        bundles[0][f"node:{self.address}"] = 0.001
        self.group = self.ray.util.placement_group(bundles, strategy="SPREAD" if whole else "PACK")
        if not self.group.wait(PLACED):
            offered = {name: self.ray.available_resources().get(name, 0) for name in self._each}
            raise DoesNotFit(
                f"Ray found no room for {self.size} ranks within {PLACED:.0f} s; free are "
                + ", ".join(f"{amount:g} {name}" for name, amount in offered.items())
                + f", and a rank takes {' and '.join(f'{n:g} {name}' for name, n in self._each.items())}.",
                "Add nodes, or ask for fewer ranks.",
            )
        return [rank // inner if whole else rank for rank in range(self.size)]

    def _keeper(self, bundle: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        takes = {"num_cpus": self._each["CPU"], "num_gpus": self._each.get("GPU", 0.0)}
        return self.ray.remote(Keeper).options(scheduling_strategy=where, **takes).remote()

    def _look(self) -> list[dict[str, Any]]:
        config = self.plan.model_hash
        try:
            return self.ray.get([k.look.remote(self.model, config) for k in self.keepers], timeout=ANSWERS)
        except self.ray.exceptions.RayError as error:
            raise UndistilledError(
                f"A node of the cluster cannot start a rank: {str(error).strip().splitlines()[-1]}",
                "Is undistilled installed in the Python that Ray runs there?",
            ) from None

    def _check(self) -> None:
        """BadArtefact names the node that lacks the model, DoesNotFit the one that lacks memory."""
        for node in self.nodes:
            if node["lacks"]:
                raise BadArtefact(
                    f"Node {node['address']}: {node['lacks']}", f"Copy the model there, as {self.model} too."
                )
        needs: Counter[str] = Counter()
        for node, rank in zip(self.nodes, self.plan.predicted.ranks, strict=True):
            needs[node["address"]] += rank.bytes.total if self._kind == "cpu" else 0
        for node in self.nodes:
            need, address = needs[node["address"]], node["address"]
            if need > node["free"]:
                raise DoesNotFit(
                    f"The ranks on node {address} need {need / 1e9:.2f} GB; {node['free'] / 1e9:.2f} GB are free.",
                    "Add nodes, or plan with a smaller --context or another --scheme.",
                )

    def _meet(self) -> None:
        """Open what ranks will connect to."""
        from .comm import meeting_point

        self.server = meeting_point(self.size)
        self.store = f"tcp://{self.address}:{self.server.port}"
        public, self._secret = zmq.curve_keypair()
        self._public = public.decode()

    def bind(self, passes: zmq.Socket[bytes], reports: zmq.Socket[bytes]) -> None:
        self.endpoints = []
        for each in (passes, reports):
            hidden(each, self._secret)
            each.bind(f"tcp://{self.address}:*")
            self.endpoints.append(each.getsockopt_string(zmq.LAST_ENDPOINT))

    def start(self, rank: int, told: dict[str, Any]) -> Remote:
        keeper, address = self.keepers[rank], self.nodes[rank]["address"]
        boot = told | {
            "rank": rank,
            "model": self.model,
            "device": "cuda:0" if self._kind == "cuda" else "cpu",  # Ray shows an actor its own GPUs alone
            "public": self._public,
            "passes": self.endpoints[0],
            "reports": self.endpoints[1],
            "store": self.store,
        }
        run = keeper.run.remote(boot, self.plan.model_dump_json(), self.sharing[address])
        return Remote(self.ray, keeper, f"node {address}", self.nodes[rank]["node"], run)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # of a cluster that is gone there is nothing to give back
            for keeper in self.keepers:
                self.ray.kill(keeper)
            if self.group is not None:
                self.ray.util.remove_placement_group(self.group)


def place(plan: Plan, model: str) -> RayNodes:
    return RayNodes(plan, model)


def _probed() -> str:
    return load_machine("this").to_json()


def machine() -> Machine:
    """All nodes as one machine, the driver's first; what several nodes of one address have counts once."""
    ray = _joined()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own, asked = ray.util.get_node_ip_address(), {}
    for node in sorted(ray.nodes(), key=lambda n: n["NodeManagerAddress"] != own):
        if node["Alive"] and node["NodeManagerAddress"] not in asked:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            run = ray.remote(_probed).options(num_cpus=0, scheduling_strategy=where)
            asked[node["NodeManagerAddress"]] = run.remote()
    try:
        said = ray.get(list(asked.values()), timeout=ANSWERS)
    except ray.exceptions.RayError as error:
        raise UndistilledError(
            f"A node of the cluster did not say what it has: {str(error).strip().splitlines()[-1]}",
            "Is undistilled installed in the Python that Ray runs there?",
        ) from None
    return merged([Machine.from_json(text, f"node {address}") for address, text in zip(asked, said, strict=True)])
