"""Runs a model of any size block by block, forward and back, and leaves the moments of its matrices in a folder.

A block is read, used and forgotten; an expert too. What passes between blocks lies in files: hidden states forward,
gradients back. Each file gets its name when it is whole, so that a second run goes on where one was ended.
Float32 throughout, by the ops' references. T tokens of all windows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..model.batch import Packed
from ..model.decoder import Block
from ..model.layers import Linear, Norm
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..ops.registry import force_reference
from ..ops.rope import angles, frequencies
from ..scheme.base import Stored
from .calibrate import Watch
from .files import whole
from .store import save

Say = Callable[[str], None]


@dataclass
class Unread:
    """Stacked experts that stay in the checkpoint: `expert` reads one, in float32."""

    weight: Weight
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.full_shape

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        return {}

    def expert(self, index: int) -> Stored:
        return _read(self.source, self.weight.tensor_names[index], self.weight.shape, "cpu")


def _read(source: Source, name: str, shape: tuple[int, ...], device: str) -> Stored:
    values = source.dense(name, 0, shape[0]).to(device)
    return Stored(schemes.get("fp32"), shape, {"values": values})


def _gradient(t: torch.Tensor) -> torch.Tensor:
    assert t.grad is not None
    return t.grad


class Sweep:
    """One calibration of one model: windows of token ids, and the folder where it leaves what it finds."""

    def __init__(
        self, spec: ModelSpec, source: Source, windows: list[list[int]], folder: Path, device: str, seed: int, say: Say
    ) -> None:
        self.spec, self.source, self.windows, self.folder, self.device = spec, source, windows, folder, device
        self.seed, self.say = seed, say
        self.table = {w.name: w for w in weights(spec)}
        self.rates, self.factor = frequencies(spec.rope)
        self.spans = []
        start = 0
        for window in windows:
            self.spans.append(slice(start, start + len(window)))
            start += len(window)

    def make(self, name: str) -> Stored:
        weight = self.table[name]
        if weight.experts:
            return Unread(weight, self.source)  # type: ignore[return-value]
        return _read(self.source, name, weight.shape, self.device)

    def block(self, layer: int) -> Block:
        return Block(self.make, self.spec, layer).eval()

    def batch(self, window: list[int]) -> Packed:
        """A window as a document of its own."""
        positions = torch.arange(len(window), device=self.device)
        batch = Packed(torch.tensor(window), positions, torch.tensor([0, len(window)], dtype=torch.int32), len(window))
        batch.cos_TF, batch.sin_TF = angles(positions, self.rates.to(self.device), self.factor)
        return batch

    def run(self) -> None:
        """Everything that is not there yet."""
        layers = self.spec.layers
        lacking = [layer for layer in range(layers) if not self._moments(layer).exists()]
        needed = [self._file("hidden", lacking[-1]), self._file("gradient", lacking[-1] + 1)] if lacking else []
        if not all(file.exists() for file in needed):
            self._moments("head").unlink(missing_ok=True)  # what came before is gone: all over again
        with force_reference():
            if not self._moments("head").exists():
                self._forward(layers)
                self._head(layers)
            for layer in reversed(range(layers)):
                if not self._moments(layer).exists():
                    self.say(f"calibration: backward, layer {layer + 1} of {layers}")
                    self._backward(layer)
                self._file("hidden", layer + 1).unlink(missing_ok=True)
                self._file("gradient", layer + 1).unlink(missing_ok=True)
        for kind in ("hidden", "gradient"):
            self._file(kind, 0).unlink(missing_ok=True)

    def _forward(self, layers: int) -> None:
        if not self._file("hidden", 0).exists():
            self._save("hidden", 0, self._embedded())
        for layer in range(layers):
            if self._file("hidden", layer + 1).exists():
                continue
            self.say(f"calibration: forward, layer {layer + 1} of {layers}")
            block = self.block(layer)
            Watch(block, "")  # its banks read one expert at a time
            with torch.no_grad():
                h_TD = self._load("hidden", layer)
                self._save("hidden", layer + 1, block.transform(self._attended(block, h_TD)))

    def _embedded(self) -> torch.Tensor:
        """Rows of the embedding, of which few are needed."""
        ids = torch.tensor([token for window in self.windows for token in window])
        wanted, place = ids.unique(return_inverse=True)
        name = "model.embed_tokens.weight"
        return torch.cat([self.source.dense(name, int(t), int(t) + 1) for t in wanted])[place]

    def _attended(self, block: Block, h_TD: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.spans, self.windows, strict=True)
        return torch.cat([block.attend(h_TD[span], self.batch(window), ()) for span, window in pairs])

    def _head(self, layers: int) -> None:
        """The loss of tokens drawn from the model itself, and its gradient at the last hidden states."""
        self.say("calibration: head")
        draw = torch.Generator().manual_seed(self.seed)
        tied = "model.embed_tokens" if self.spec.tied else "lm_head"
        norm, head = Norm(self.make, "model.norm", self.spec.norm_eps), Linear(self.make, tied)
        watch = Watch(head, tied)
        h_TD = self._load("hidden", layers)
        gradient_TD = torch.empty_like(h_TD)
        for span in self.spans:
            h = h_TD[span].requires_grad_()
            log_TV = head(norm(h)).float().log_softmax(-1)
            drawn = torch.multinomial(log_TV.detach().exp().cpu(), 1, generator=draw).to(h.device)
            (-log_TV.gather(-1, drawn).sum()).backward()
            gradient_TD[span] = _gradient(h)
        self._save("gradient", layers, gradient_TD)
        save(self._moments("head"), watch.moments)

    def _backward(self, layer: int) -> None:
        block = self.block(layer)
        watch = Watch(block, f"model.layers.{layer}")
        h_TD = self._load("hidden", layer)
        with torch.no_grad():
            a_TD = self._attended(block, h_TD)
        a_TD.requires_grad_()
        block.transform(a_TD).backward(self._load("gradient", layer + 1))
        gradient_TD = torch.empty_like(h_TD)
        for span, window in zip(self.spans, self.windows, strict=True):
            h = h_TD[span].requires_grad_()
            block.attend(h, self.batch(window), ()).backward(_gradient(a_TD)[span])
            gradient_TD[span] = _gradient(h)
        self._save("gradient", layer, gradient_TD)
        save(self._moments(layer), watch.moments)

    def _moments(self, layer: int | str) -> Path:
        return self.folder / f"moments-{layer}.safetensors"

    def _file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer}.safetensors"

    def _save(self, kind: str, layer: int, states_TD: torch.Tensor) -> None:
        with whole(self._file(kind, layer)) as part:
            save_file({"states": states_TD.detach().cpu().contiguous()}, part)

    def _load(self, kind: str, layer: int) -> torch.Tensor:
        return load_file(self._file(kind, layer))["states"].to(self.device)


def sweep(
    spec: ModelSpec,
    source: Source,
    windows: list[list[int]],
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    say: Say = lambda _: None,
) -> None:
    """Leave the moments of every matrix in `folder`, a file a layer (see store.py), over windows of token ids."""
    Sweep(spec, source, windows, folder, device, seed, say).run()
