"""The training loop: one step after another until the budget of steps is spent, or the time of this run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..events import emit
from ..model.spec import ModelSpec
from . import memory, ranks
from .packing import Sample
from .trainable import Student

NEWS = 20  # steps between two lines of the log
BALANCE = 1e-3  # a step of the routers' biases (DeepSeek-V3, section 4.2)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned. seconds: of training, over all runs; tokens: of a batch on one rank."""

    seconds: float
    tokens: int = 65536
    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def rate_at(self, step: int, seconds: float) -> float:
        """Linear from 0 over the warm-up's steps, constant for half of the time, then linear down to 0."""
        return self.rate * max(0.0, min((step + 1) / self.warmup, 2 * (1 - seconds / self.seconds), 1.0))


class Trainer:
    """A student, its optimizer, and how far it has come. `activations`: see memory.py; `zero`: see ranks.py."""

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        device: torch.device,
        *,
        activations: str = "keep",
        zero: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(recipe.seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.recipe, self.device = recipe, device
        self.student = Student(spec, device, dtype)
        if compiled:
            self.student.compile_parts()
        memory.wrap(self.student.decoder, activations)
        self.optimizer = ranks.optimizer(_groups(self.student, recipe.decay), recipe.rate, device, zero)
        self.learner = ranks.spread(self.student, device)
        self.step = 0
        self.seconds = 0.0  # of training, over all runs

    @property
    def done(self) -> bool:
        return self.seconds >= self.recipe.seconds

    def run(self, samples: Iterator[Sample], steps: int, until: float, log: Callable[[dict[str, Any]], None]) -> None:
        """At most `steps` steps, and none after `until` (perf_counter seconds); news every NEWS steps."""
        self.student.train()
        began = mark = perf_counter()
        before = self.seconds
        for _ in range(steps):
            if self.done or perf_counter() > until:
                break
            losses = self.one(next(samples).to(self.device))
            if self.step % NEWS == 0:
                log(self._news(losses, perf_counter() - mark))
                mark = perf_counter()
            self.seconds = before + perf_counter() - began

    def one(self, sample: Sample) -> tuple[torch.Tensor, ...]:
        """One step on one batch; returns (loss, of the next token, of the one after, norm of the gradients)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step, self.seconds)
        losses = self.learner(sample.packed(), sample.targets_T, sample.second_T)
        losses[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.shares = self.student.balance(BALANCE, ranks.add_up)
        self.step += 1
        return (*losses, norm)

    def _news(self, losses: tuple[torch.Tensor, ...], seconds: float) -> dict[str, Any]:
        _, first, second, norm = (float(value) for value in losses)
        news = {
            "step": self.step,
            "seconds": self.seconds,
            "of": self.recipe.seconds,
            "loss": first,
            "second_loss": second,
            "gradient_norm": norm,
            "rate": self.optimizer.param_groups[0]["lr"],
            "tokens_per_s": NEWS * self.recipe.tokens * ranks.world() / seconds,
            "busiest_expert": float(self.shares.amax() * self.shares.shape[1]),
        }
        emit("tune.step", **news)
        return news

    def save(self, folder: Path) -> None:
        """Everything a later run needs, whole or not at all."""
        state = ranks.state_of(self.optimizer)  # of all ranks, on the first
        if not ranks.leads():
            return
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "state.part"
        torch.save(
            {
                "weights": self.student.state_dict(),
                "optimizer": state,
                "step": self.step,
                "seconds": self.seconds,
            },
            part,
        )
        part.replace(folder / "state.pt")

    def resume(self, folder: Path) -> bool:
        """Go on from `save`; False where nothing was saved. Only tensors and plain values are read."""
        file = folder / "state.pt"
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        return True


def _groups(student: Student, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    learned = [p for p in student.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
