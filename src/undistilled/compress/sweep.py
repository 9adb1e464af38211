"""Runs a model of any size block by block, forward and back, and leaves the moments of its matrices in a folder.

A block is read, used and forgotten; an expert too. What passes between blocks lies in files: hidden states forward,
gradients back. Each file gets its name when it is whole, so that a second run goes on where one was ended.
Float32 throughout, by the ops' references. T tokens of all windows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .calibrate import Moments, Watch, look_up, looked_up
from .files import whole
from .store import save

Say = Callable[[str], None]
EMBEDDING = "model.embed_tokens.weight"


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


def _parts(states_TD: torch.Tensor, windows: Sequence[list[int]]) -> tuple[torch.Tensor, ...]:
    """States of all tokens -> of each window."""
    return states_TD.split([len(window) for window in windows])


class Sweep:
    """One calibration of one model: windows of token ids, and the folder where it leaves what it finds."""

    def __init__(
        self, spec: ModelSpec, source: Source, windows: list[list[int]], folder: Path, device: str, seed: int, say: Say
    ) -> None:
        self.spec, self.source, self.windows, self.folder, self.device = spec, source, windows, folder, device
        self.seed, self.say = seed, say
        self.table = {w.name: w for w in weights(spec)}
        self.rates, self.factor = frequencies(spec.rope)

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
        lacking: list = [layer for layer in range(layers) if not self._moments(layer).exists()]
        needed = [self._file("hidden", lacking[-1]), self._file("gradient", lacking[-1] + 1)] if lacking else []
        if not lacking and not self._moments("embed").exists():
            needed = [self._file("gradient", 0)]
        if not all(file.exists() for file in needed):
            self._moments("head").unlink(missing_ok=True)  # what came before is gone: all over again
        with force_reference():
            if not self._moments("head").exists():
                self._forward(layers)
                for extra in range(self.spec.mtp_layers):
                    self._mtp(layers + extra, layers)
                self._loss(layers)
            for layer in reversed(range(layers)):
                if not self._moments(layer).exists():
                    self.say(f"calibration: backward, layer {layer + 1} of {layers}")
                    self._backward(layer)
                self._file("hidden", layer + 1).unlink(missing_ok=True)
                self._file("gradient", layer + 1).unlink(missing_ok=True)
            if not self._moments("embed").exists():
                self._embedding()
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

    def _embedded(self, name: str = EMBEDDING, windows: Sequence[list[int]] | None = None) -> torch.Tensor:
        """Rows of the embedding, of which few are needed."""
        ids = torch.tensor([token for window in windows or self.windows for token in window])
        wanted, place = ids.unique(return_inverse=True)
        return torch.cat([self.source.dense(name, int(t), int(t) + 1) for t in wanted])[place]

    def _attended(self, block: Block, h_TD: torch.Tensor, windows: Sequence[list[int]] | None = None) -> torch.Tensor:
        windows = windows or self.windows
        pairs = zip(_parts(h_TD, windows), windows, strict=True)
        return torch.cat([block.attend(h, self.batch(window), ()) for h, window in pairs])

    def _loss(self, layers: int) -> None:
        """The loss of tokens drawn from the model itself, and its gradient at the last hidden states."""
        self.say("calibration: head")
        tied = "model.embed_tokens" if self.spec.tied else "lm_head"
        norm, head = Norm(self.make, "model.norm", self.spec.norm_eps), Linear(self.make, tied)
        watch = Watch(head, tied)
        self._save("gradient", layers, self._drawn(norm, head, self._load("hidden", layers), self.windows))
        save(self._moments("head"), watch.moments)

    def _drawn(self, norm: Norm, head: Linear, h_TD: torch.Tensor, windows: Sequence[list[int]]) -> torch.Tensor:
        """The gradient at h_TD of -log p of tokens that are drawn there."""
        draw = torch.Generator().manual_seed(self.seed)
        found = []
        for part in _parts(h_TD, windows):
            h = part.detach().requires_grad_()
            log_TV = head(norm(h)).float().log_softmax(-1)
            drawn = torch.multinomial(log_TV.detach().exp().cpu(), 1, generator=draw).to(h.device)
            (-log_TV.gather(-1, drawn).sum()).backward()
            found.append(_gradient(h))
        return torch.cat(found)

    def _backward(self, layer: int) -> None:
        block = self.block(layer)
        watch = Watch(block, f"model.layers.{layer}")
        h_TD = self._load("hidden", layer)
        with torch.no_grad():
            a_TD = self._attended(block, h_TD)
        gradient_TD = self._through(block, h_TD, a_TD, self._load("gradient", layer + 1), self.windows)
        self._save("gradient", layer, gradient_TD)
        save(self._moments(layer), watch.moments)

    def _through(
        self, block: Block, h_TD: torch.Tensor, a_TD: torch.Tensor, g_TD: torch.Tensor, windows: Sequence[list[int]]
    ) -> torch.Tensor:
        """The gradient at a block's input h_TD, for one at its output; a_TD lies between its halves."""
        a_TD = a_TD.detach().requires_grad_()
        block.transform(a_TD).backward(g_TD)
        found = []
        for part, own, window in zip(_parts(h_TD, windows), _parts(_gradient(a_TD), windows), windows, strict=True):
            h = part.detach().requires_grad_()
            block.attend(h, self.batch(window), ()).backward(own)
            found.append(_gradient(h))
        return torch.cat(found)

    def _mtp(self, layer: int, layers: int) -> None:
        """An MTP layer, whose loss is its own: of the token after next."""
        if self._moments(layer).exists():
            return
        self.say("calibration: multi-token prediction")
        at, spec = f"model.layers.{layer}", self.spec
        windows = [window[1:] for window in self.windows if len(window) > 1]
        kept = torch.cat([h[:-1] for h in _parts(self._load("hidden", layers), self.windows)])
        e_TD = self._embedded(f"{at}.embed_tokens.weight", windows).to(self.device).requires_grad_()
        enorm, hnorm, norm = (
            Norm(self.make, f"{at}.{n}", spec.norm_eps) for n in ("enorm", "hnorm", "shared_head.norm")
        )
        h_TD = Linear(self.make, f"{at}.eh_proj")(torch.cat((enorm(e_TD), hnorm(kept)), -1))
        block, head = Block(self.make, spec, layer, mtp=True).eval(), Linear(self.make, f"{at}.shared_head.head")
        watched = Watch(block, at), Watch(head, f"{at}.shared_head.head")
        with torch.no_grad():
            a_TD = self._attended(block, h_TD.detach(), windows)
            out_TD = block.transform(a_TD)
        g_TD = self._drawn(norm, head, out_TD, windows)
        h_TD.backward(self._through(block, h_TD, a_TD, g_TD, windows))
        rows = looked_up(torch.tensor([t for w in windows for t in w]), _gradient(e_TD), spec.vocab)
        save(self._moments(layer), watched[0].moments | watched[1].moments | {f"{at}.embed_tokens.weight": rows})

    def _embedding(self) -> None:
        """Moments of the rows that were looked up."""
        ids = torch.tensor([token for window in self.windows for token in window])
        name = look_up(EMBEDDING) if self.spec.tied else EMBEDDING
        found: dict[str, Moments] = {name: looked_up(ids, self._load("gradient", 0), self.spec.vocab)}
        save(self._moments("embed"), found)

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
