"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import atexit
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from ..checkpoint.detokenizer import Detokenizer
from ..checkpoint.resolve import Model, find
from ..checkpoint.tokenizer import Tokenizer
from ..errors import BadArtefact, RequestError, UsageError
from ..events import emit
from ..load.build import Progress, build
from ..model.decoder import Decoder
from ..parallel.comm import Comm, leave
from ..parallel.crew import WATCHDOG, Crew
from ..parallel.messages import JOINING, Beat
from ..parallel.places import machine_of, place_for
from ..parallel.share import share
from ..plan.check import check, check_devices
from ..plan.degrees import Degrees
from ..plan.plan import Plan, read_plan
from ..plan.ranks import cuts_of
from ..plan.solve import Ask, solve
from ..schedule.blocks import BlockPool
from ..schedule.request import Output, Request, TokenLogprob
from ..schedule.scheduler import Scheduler, Sequence, Work
from .runner import Flight, Runner
from .sampler import Sampler
from .stops import StopText
from .warm import compiles, warm


@dataclass
class Running:
    """What the engine keeps for a request beside the scheduler's sequence."""

    sequence: Sequence
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopText
    produced: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """One model, answering many requests by turns. Not thread-safe: one caller steps it."""

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        tokenizer: Tokenizer,
        name: str,
        crew: Crew | None = None,
        comm: Comm | None = None,
    ) -> None:
        self.decoder, self.plan, self.tokenizer, self.name = decoder, plan, tokenizer, name
        self.spec, self.max_context = decoder.spec, plan.limits.context
        self.ranks = plan.mesh.size if plan.mesh else 1
        self.runner = Runner(decoder, plan, crew, comm)
        self.pool = BlockPool(plan.kv.blocks, plan.kv.block_size)
        self.scheduler = Scheduler(
            self.pool, max_batch=plan.limits.batch, max_context=self.max_context, chunk=plan.limits.chunk
        )
        self.running: dict[str, Running] = {}
        self.flights: deque[Flight] = deque()
        self.depth = plan.mesh.microbatches if plan.mesh and plan.mesh.pp > 1 else 1
        self.eos = set(tokenizer.eos_ids) | set(self.spec.eos)

    def add(self, request: Request) -> None:
        """Queue a request. RequestError where it makes no sense, does not fit, or the queue is full."""
        request.sampling.check(self.spec.vocab)
        if request.id in self.running:
            raise RequestError(f"A request with the id {request.id!r} is running.")
        if any(not (isinstance(t, int) and 0 <= t < self.spec.vocab) for t in request.prompt):
            raise RequestError(f"The prompt has a token id outside 0 to {self.spec.vocab - 1}.", param="prompt")
        sequence = self.scheduler.add(request)
        self.running[request.id] = Running(
            sequence,
            Sampler(request.sampling, request.prompt, self.spec.vocab),
            Detokenizer(self.tokenizer, after=request.prompt),
            StopText(request.sampling.stop),
        )

    def abort(self, id: str) -> None:
        """Forget a request and free its blocks; nothing happens where there is none."""
        running = self.running.pop(id, None)
        if running:
            self.scheduler.finish(running.sequence)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self.flights

    def step(self) -> list[Output]:
        """One turn: schedule, run, postprocess. Returns news of every request that has some.

        A pipeline has up to `depth` passes in it, of different requests, and a turn takes one out.
        """
        while len(self.flights) < self.depth and (step := self.scheduler.step(self._share())):
            self.flights += self.runner.submit(step)
        landed = [self.flights.popleft() for _ in range(1 if self.depth > 1 else len(self.flights)) if self.flights]
        done = [result for flight in landed for result in self.runner.collect(flight)]
        return [o for work, logits in done if (o := self._after(work, logits)) is not None]

    def _share(self) -> int | None:
        """How many requests' rows go into one pass of a pipeline: an equal part of all that run."""
        return max(1, -(-len(self.scheduler.running) // self.depth)) if self.depth > 1 else None

    def _after(self, work: Work, logits: torch.Tensor | None) -> Output | None:
        if work.stale:
            return None
        running = self.running.get(work.sequence.request.id)
        if logits is None or running is None:
            self.scheduler.done(work, None)
            return None
        try:
            token, logprob = running.sampler.choose(logits)
            self.scheduler.done(work, token)
            running.produced += 1
            return self._news(running, token, logprob)
        except Exception as error:  # one request's trouble is not its neighbours'
            return self._failed(running, error)

    def _failed(self, running: Running, error: Exception) -> Output:
        request = running.sequence.request
        self.abort(request.id)
        emit("engine.request_failed", id=request.id, error=repr(error))
        return Output(
            request.id,
            finish_reason="error",
            error=f"{type(error).__name__}: {error}",
            prompt_tokens=running.sequence.prompt_length,
            completion_tokens=running.produced,
        )

    def _news(self, running: Running, token: int, logprob: TokenLogprob | None) -> Output:
        request = running.sequence.request
        sampling = request.sampling
        ended = not sampling.ignore_eos and token in self.eos
        reason: str | None = "stop" if ended or token in sampling.stop_ids else None
        stop_reason: str | int | None = token if token in sampling.stop_ids else None
        text = "" if reason else running.detokenizer.push([token])
        full = running.produced >= sampling.max_tokens or len(running.sequence.tokens) >= self.max_context
        if reason is None and full:
            reason = "length"
        if reason:
            text += running.detokenizer.flush()
        text, matched = running.stops.push(text, last=reason is not None)
        if matched is not None:
            reason, stop_reason = "stop", matched
        output = Output(
            request.id,
            [token],
            text,
            [logprob] if logprob else [],
            reason,
            stop_reason,
            running.sequence.prompt_length,
            running.produced,
        )
        if reason:
            self.abort(request.id)
        return output

    def stats(self) -> dict[str, float]:
        """Gauges for metrics: requests and cache blocks. RankLost where a rank was lost, even while nothing runs."""
        if self.runner.crew:
            self.runner.crew.check()
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "kv_blocks_used": self.pool.used,
            "kv_blocks_total": self.pool.count,
        }

    def close(self) -> None:
        """End the other ranks, where there are any."""
        if self.runner.crew:
            self.runner.crew.close()
        if self.runner.part.comm:
            leave()

    def run_all(self, requests: list[Request]) -> dict[str, list[Output]]:
        """Add the requests, run until all are answered, and return each one's outputs in order."""
        outputs: dict[str, list[Output]] = {r.id: [] for r in requests}
        for request in requests:
            self.add(request)
        while not self.idle:
            for output in self.step():
                outputs[output.id].append(output)
        return outputs


DECIDED = (  # by a plan
    *("scheme", "context", "batch", "device", "mtp", "dtype"),
    *("ranks", "tp", "pp", "ep", "microbatches", "expert_copies", "expert_counts"),
)


def plan_for(model: Model, options: dict[str, Any]) -> Plan:
    """The plan that a run is held to: from a file, or made now for this machine. Checked either way."""
    machine = machine_of(options.get("cluster") or "local")
    if options.get("plan"):
        given = [name for name in DECIDED if options.get(name)]
        if given:
            raise UsageError(f"A plan file decides {', '.join(given)}.", "Give --plan alone, or the options alone.")
        plan = read_plan(Path(options["plan"]))
    else:
        ask = Ask(
            options.get("scheme"),
            options.get("context"),
            options.get("batch") or 1,
            bool(options.get("mtp")),
            options.get("device"),
            dtype=options.get("dtype") or "auto",
            degrees=Degrees.of(options),
        )
        plan = solve(model.name, model.config, model.spec, machine, ask)
    check(plan, model.spec, model.config)
    check_devices(plan, {d.name: d.free_bytes for d in machine.devices})
    return plan


def open_engine(options: dict[str, Any], progress: Progress | None = None) -> Engine:
    """Find, plan, load: `options` has model, and plan or scheme, context, batch, device, mtp, dtype."""
    model = find(options["model"])
    if not model.has_weights and not model.path.is_dir():  # of a folder its source knows more
        raise BadArtefact(f"{model.name} has no weights here.", "Its config is enough to plan; to run, name a folder.")
    return open_planned(model, plan_for(model, options), options, progress)


def open_planned(model: Model, plan: Plan, options: dict[str, Any], progress: Progress | None = None) -> Engine:
    """Load what a checked plan says: `options` may have name, and of ranks cluster and watchdog."""
    tokenizer, name = model.tokenizer(), options.get("name") or model.name
    if plan.mesh is None and options.get("cluster"):
        raise UsageError("--cluster says where ranks run; the plan has one process.", "Ask for more --ranks.")
    if plan.mesh is None:
        return warmed(Engine(build(plan, model.spec, model.source(), progress=progress), plan, tokenizer, name))
    return _open_ranks(model, plan, tokenizer, name, options, progress)


def warmed(engine: Engine) -> Engine:
    """The engine, with what is compiled for its device compiled."""
    if compiles(engine.runner):
        warm(engine.runner)
    return engine


def _while(crew: Crew, progress: Progress | None) -> Progress:
    """Progress of this rank, which ends where another could not load."""

    def tell(done: int, total: int, name: str) -> None:
        crew.check()
        if progress:
            progress(done, total, name)

    return tell


def _open_ranks(
    model: Model, plan: Plan, tokenizer: Tokenizer, name: str, options: dict[str, Any], progress: Progress | None
) -> Engine:
    """An engine over several processes, of which this is rank 0."""
    place = place_for(options.get("cluster") or "local", plan, model.said)
    crew = Crew(place, options.get("watchdog") or WATCHDOG)
    try:
        torch.set_num_threads(place.threads)
        plan = plan.on(0, place.device)
        assert plan.mesh is not None
        decoder = build(plan, model.spec, model.source(), rank=0, progress=_while(crew, progress))
        crew.wait_ready()
        os.environ.update(place.network)
        began = monotonic()
        others = tuple(range(1, plan.mesh.size))
        with crew.guarded(lambda: Beat(0, 0, 1, JOINING, monotonic() - began, awaits=others)):
            comm = Comm(plan.mesh, 0, place.store)
        crew.release = comm.release
        share(decoder, cuts_of(plan, model.spec), 0, comm)
        engine = warmed(Engine(decoder, plan, tokenizer, name, crew, comm))
    except BaseException:
        crew.close()
        leave()
        raise
    atexit.register(crew.close)
    return engine
