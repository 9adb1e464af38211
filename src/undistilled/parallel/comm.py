"""All collectives, and the messages between stages. T tokens, D hidden, V vocabulary.

Sums of few rows or bytes are taken in one shot: every rank gets all parts and adds them in the order of the ranks, so
that a row's bits depend neither on its company nor on where it lies in a message. Larger ones, which are prompts'
alone, go to the backend's all-reduce.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from time import perf_counter

import torch
import torch.distributed as dist

from ..events import emit
from ..ops.cpu.program import between
from ..ops.linear import LARGE
from ..plan.mesh import Mesh
from .messages import COMPUTING, GATHER, JOINING, REDUCE, SETTLING
from .shared import ORDERED, Shared, place
from .symmetric import OneShot

ONE_SHOT = 1 << 20  # bytes
PENDING = 64  # messages that are kept until they have arrived; a step has fewer passes
LEAVING = 10.0  # seconds that NCCL may take to give its groups up
TIMEOUT = timedelta(minutes=60)  # the driver's watchdog is there long before

HANDING, RECEIVING = "send to the next stage", "receive from the stage before"
RETURNING, RETURNED = "send logits to rank 0", "receive logits of the last stage"


class Comm:
    """A rank's way to the others. `entered`: collectives and messages begun; `waited`: seconds spent in them; `state`:
    what it is in, since when, and for whom that waits."""

    def __init__(self, mesh: Mesh, rank: int, store: str) -> None:
        self.mesh, self.rank = mesh, rank
        self.device = torch.device(mesh.devices[rank])
        self.entered, self.waited = 0, 0.0
        self.others = tuple(other for other in range(mesh.size) if other != rank)
        self.peers = tuple(other for other in mesh.peers(rank) if other != rank)
        self.progress()
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with self._during(JOINING, 0, self.others):
            met = rendezvous(store, mesh.size)
            dist.init_process_group(backend, store=met, rank=rank, world_size=mesh.size, timeout=TIMEOUT)
            self.stage = self._groups(backend)
            # NCCL runs a group's messages one after another: two directions in one group could wait for each other
            self.forward, self.back = (dist.new_group(backend=backend, timeout=TIMEOUT) for _ in range(2))
            self.one_shot = self._one_shot(f"{store} stage {mesh.stage(rank)}", met)
            self.shared = self._shared(met)

    def _groups(self, backend: str) -> dist.ProcessGroup | None:
        """The group of this rank's stage; every rank makes every group."""
        mine, inner = None, self.mesh.inner
        for first in range(0, self.mesh.size, inner) if inner > 1 else ():
            group = dist.new_group(list(range(first, first + inner)), backend=backend, timeout=TIMEOUT)
            mine = group if self.rank in range(first, first + inner) else mine
        return mine

    def _one_shot(self, name: str, store: dist.Store) -> OneShot | None:
        """Memory that a stage's GPUs share, where they can; said aloud where not."""
        if self.device.type == "cpu" or self.stage is None:
            return None
        made, why = None, "of another rank"
        try:
            made = OneShot(name, store, self.mesh.within(self.rank), self.mesh.inner, self.device, ONE_SHOT)
        except (RuntimeError, ImportError, AttributeError) as error:
            why = str(error)
        if self.agreed(made is not None):
            return made
        emit("comm.no_symmetric_memory", rank=self.rank, why=why)
        print(f"Sums over GPUs go through NCCL, which is slower: no symmetric memory ({why}).", file=sys.stderr)
        return None

    def _shared(self, store: dist.Store) -> Shared | None:
        """Memory that a stage's processes on CPUs share, where they are of one machine."""
        if self.device.type != "cpu" or self.stage is None or not ORDERED:
            return None
        mine, key = self.mesh.within(self.rank), f"memory of stage {self.mesh.stage(self.rank)}"
        path, made, why = store.get(key).decode() if mine else place(), None, "another rank cannot map it"
        try:
            made = Shared(path, self.mesh.inner, mine, ONE_SHOT)
        except OSError as error:
            why = str(error)
        if mine == 0:
            store.set(key, path)
        every = self.agreed(made is not None)
        if mine == 0 and made is not None:
            os.unlink(path)  # who has it keeps it
        if not every:
            emit("comm.no_shared_memory", rank=self.rank, why=why)
            if mine == 0:
                print(f"Sums go through sockets, which is slower: no shared memory ({why}).", file=sys.stderr)
        return made if every else None

    def release(self) -> None:
        """From another thread: do not wait for ranks that were lost."""
        if self.shared is not None:
            self.shared.left = True

    def agreed(self, yes: bool) -> bool:
        """Whether all ranks of the stage say yes: what only some of them do would leave the others waiting."""
        if self.stage is None:
            return yes
        flag = torch.tensor([int(yes)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.stage)
        return bool(flag.item())

    def progress(self) -> None:
        """A layer is done: computing is no stall."""
        self.state: tuple[str, float, tuple[int, ...]] = COMPUTING, perf_counter(), ()

    @contextmanager
    def _during(self, what: str, nbytes: int, awaits: tuple[int, ...]) -> Iterator[None]:
        self.entered += 1
        began = perf_counter()
        self.state = what, began, awaits  # at once: another thread reads it
        try:
            yield
        finally:
            seconds = perf_counter() - began
            self.waited += seconds
            self.progress()
            emit("comm", operation=what, bytes=nbytes, seconds=seconds, rank=self.rank)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the stage's ranks, of x's shape."""
        if self.stage is None:
            return x
        return between(self._sum, x.contiguous())

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        nbytes = x.numel() * x.element_size()
        with self._during(REDUCE, nbytes, self.peers):
            if self.one_shot is not None and self.one_shot.takes(nbytes, x.dtype):
                return self.one_shot.sum(x)
            if (nbytes > ONE_SHOT and len(x) >= LARGE) or self.device.type == "cuda":
                dist.all_reduce(x, group=self.stage)
                return x
            parts = self._gathered(x)
            total = parts[0] + parts[1]
            for part in parts[2:]:
                total += part
            return total

    def _gathered(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, to be read at once."""
        if self.shared is not None and x.numel() * x.element_size() <= self.shared.limit:
            return self.shared.gathered(x)
        parts = [torch.empty_like(x) for _ in range(self.mesh.inner)]
        dist.all_gather(parts, x, group=self.stage)
        return parts

    def all_gather(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """[T, own width] of each of the stage's ranks, side by side."""
        if self.stage is None:
            return x
        widest, nbytes = max(widths), x.shape[0] * sum(widths) * x.element_size()
        with self._during(GATHER, nbytes, self.peers):
            if self.one_shot is not None and self.one_shot.takes(nbytes, x.dtype):
                whole = x.new_zeros(x.shape[0], sum(widths))
                start = sum(widths[: self.mesh.within(self.rank)])
                whole[:, start : start + x.shape[1]] = x
                return self.one_shot.sum(whole)  # of one part and zeros, in one kernel
            padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1])).contiguous()
            parts = self._gathered(padded)
            return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    def settle(self) -> None:
        """Wait for the GPU, whose collectives a host otherwise meets where it reads a result."""
        if self.device.type == "cuda":
            with self._during(SETTLING, 0, self.others):
                torch.cuda.current_stream(self.device).synchronize()

    def send_on(self, h_TD: torch.Tensor) -> None:
        """Hidden states to the next stage; computing goes on while they are on their way."""
        self._send(h_TD, self.rank + self.mesh.inner, self.forward, HANDING)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Hidden states of the stage before."""
        return self._receive(shape, dtype, self.rank - self.mesh.inner, self.forward, RECEIVING)

    def send_back(self, logits_TV: torch.Tensor) -> None:
        """Logits from the last stage's first rank to the driver."""
        self._send(logits_TV, 0, self.back, RETURNING)

    def receive_back(self, rows: int, vocab: int) -> torch.Tensor:
        """What `send_back` sent, float32."""
        source = self.mesh.size - self.mesh.inner
        return self._receive((rows, vocab), torch.float32, source, self.back, RETURNED)

    def _send(self, x: torch.Tensor, to: int, group: dist.ProcessGroup, what: str) -> None:
        with self._during(what, x.numel() * x.element_size(), (to,)):
            if len(self._sent) >= PENDING:  # gloo says that a send is done to who waits for it alone
                self._sent.popleft()[0].wait()
            x = x.clone() if x.is_contiguous() else x.contiguous()  # a captured pass writes to the same place again
            work = dist.isend(x, to, group=group)
            assert work is not None
            self._sent.append((work, x))

    def _receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, source: int, group: dist.ProcessGroup, what: str
    ) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        with self._during(what, x.numel() * x.element_size(), (source,)):
            work = dist.irecv(x, source, group=group)
            assert work is not None
            work.wait()
        return x

    def pass_on(self, x: torch.Tensor) -> None:
        """From a stage's first rank to its second, which says that it has it: for measuring a link."""
        peers = self.mesh.peers(self.rank)
        token = x[:1].clone()
        other, group = peers[1 - self.mesh.within(self.rank)], self.stage
        mine, theirs = (x, token) if self.mesh.within(self.rank) == 0 else (token, x)
        if mine is x:
            dist.send(mine, other, group=group)
            dist.recv(theirs, other, group=group)
        else:
            dist.recv(theirs, other, group=group)
            dist.send(mine, other, group=group)

    def barrier(self) -> None:
        """Until every rank is here, and its GPU has done what it was told."""
        dist.barrier()
        self.settle()

    def close(self) -> None:
        """Leave the others, once what was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        leave()


def rendezvous(store: str, ranks: int) -> dist.Store:
    """Where `ranks` processes find each other: "tcp://HOST:PORT" of the driver's server, or a file of one machine."""
    if not store.startswith("tcp://"):
        return dist.FileStore(store, ranks)
    host, _, port = store.removeprefix("tcp://").rpartition(":")
    return dist.TCPStore(host, int(port), ranks, is_master=False, timeout=TIMEOUT)


def meeting_point(ranks: int) -> dist.TCPStore:
    """A server where `ranks` processes of several machines find each other, at a port of its choice."""
    return dist.TCPStore("0.0.0.0", 0, ranks, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def leave() -> None:
    """Give this process's groups up; those who wait for it wait in vain."""
    if not dist.is_initialized():
        return
    if dist.get_backend() != "nccl":
        dist.destroy_process_group()
        return
    # its orderly end waits for ranks that may have been killed; and an abort for a kernel that waits for them
    abort = Thread(target=dist.distributed_c10d._abort_process_group, daemon=True)
    abort.start()
    abort.join(LEAVING)
    if abort.is_alive():
        emit("comm.not_left", seconds=LEAVING)
        said = f"NCCL has not given up its groups within {LEAVING:.0f} s"
        print(f"{said}: this process cannot open an engine over GPUs again.", file=sys.stderr)
