"""What rounding changed is made up for by what a form keeps in 16 bits or more: its norms, and its rows' multipliers.

Codes and scales stay as the solver left them. The form and the original read the calibration's windows, in float32, and
a gain of every norm's channel and of every linear's row that has a multiplier (routed experts' stay) goes down the
gradient of the divergence of next tokens (distillation, Hinton et al. 2015) by Adam (Kingma and Ba 2015); then norms
and multipliers take their gains in.
So errors are made up for across blocks, of which a solver sees one matrix. Not a byte is added.

It holds the form and, for a while, the original in float32, 4 bytes a weight each. T tokens, D hidden, N channels or
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .. import scheme as schemes
from ..checkpoint.compressed import CompressedSource, tensor_of
from ..checkpoint.resolve import Model, find
from ..checkpoint.source import Source
from ..checkpoint.writer import overwrite
from ..model.batch import Packed
from ..model.decoder import Decoder
from ..model.layers import Linear, Norm
from ..model.spec import ModelSpec
from ..model.weights import weights
from ..ops.registry import force_reference
from ..plan.hardware import load_machine
from ..scheme.base import Parts, Stored
from .files import whole

RATE, FIRST, LAST = 2e-3, 4, 0.1  # of Adam; steps until it is reached; the share of it at the end
BETAS = (0.9, 0.99)
TENSORS = "tensors.safetensors"
WORK = "refit"  # the folder of what a refit has done, inside the one being made
BY_ROW = "multipliers"  # the part of a scheme that has a number for each row

FLOAT = 4  # bytes
LOGITS = 6  # of a window, that a step holds: both models' logits, their logarithms, gradients

Say = Callable[[str], None]
Gains = dict[str, torch.Tensor]  # by weight name


def refit(model: Model, folder: Path, windows: list[list[int]], passes: int, device: str, say: Say) -> None:
    """Refit the form of `model` in `folder`, where it is written over; a second run goes on after the last pass."""
    form, work = find(str(folder)), folder / WORK
    source, file = form.source(), work / TENSORS
    assert isinstance(source, CompressedSource)
    work.mkdir(exist_ok=True)
    if not file.exists():
        found = gains(model, form, windows, passes, device, work / "passes.pt", say)
        with whole(file) as part:
            save_file(taken_in(source, found), part)
    overwrite(source.entries, load_file(file))


def found(folder: Path) -> bool:
    """Whether the passes are done: what they found is being written over files, whose digests it changes."""
    return (folder / WORK / TENSORS).exists()


def lacking(spec: ModelSpec, longest: int, device: str) -> int:
    """Bytes of memory that are missing for a refit of windows of up to `longest` tokens; 0 where it fits."""
    known = list(weights(spec))
    rows, width = next(w.shape for w in known if w.role == "embed")
    # what the way back needs of every layer: inputs and outputs of its linears, and a head's scores
    kept = sum(sum(w.shape[-2:]) for w in known if w.is_linear) + spec.layers * spec.heads * longest
    need = FLOAT * (2 * (sum(w.params for w in known) + rows * width) + longest * (LOGITS * rows + kept))
    home = "cuda:0" if device == "cuda" else device
    return max(0, need - load_machine("this").device(home).free_bytes)


def decoder_of(spec: ModelSpec, source: Source, device: str) -> Decoder:
    """All of a model in float32."""
    known = {w.name: w for w in weights(spec)}

    def make(name: str) -> Stored:
        weight = known[name]
        read = [source.dense(n, 0, weight.shape[0]) for n in weight.tensor_names]
        values = torch.stack(read) if weight.experts else read[0]
        return Stored(schemes.get("fp32"), weight.full_shape, {"values": values.to(device)})

    return Decoder(make, spec, torch.float32)


def last_states(decoder: Decoder, window: list[int]) -> torch.Tensor:
    """[T, D], as the head gets them."""
    device, size = decoder.device, len(window)
    bounds = torch.tensor([0, size], dtype=torch.int32, device=device)
    ids = torch.tensor(window, device=device)
    batch = Packed(ids, torch.arange(size, device=device), bounds, size)
    return decoder.norm(decoder(batch, [()] * len(decoder.layers)))


def divergence(one_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of `other` from `one`, nats a token, of logits."""
    one, other = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1).mean()


class Truth:
    """What the original says of each window: its last states, and the head that makes logits of them."""

    def __init__(self, model: Model, windows: list[list[int]], device: str) -> None:
        with torch.no_grad():
            decoder = decoder_of(model.spec, model.source(), device)
            self.states = [last_states(decoder, window) for window in windows]
        self.head = decoder.lm_head

    @torch.no_grad()
    def logits(self, at: int) -> torch.Tensor:
        return self.head(self.states[at])


class Student:
    """The form, with a gain of 1 on every norm's channel and every row that has a multiplier, and what trains them."""

    def __init__(self, form: Model, device: str) -> None:
        source = form.source()
        self.decoder = decoder_of(form.spec, source, device)
        self.gains: dict[str, nn.Parameter] = {}
        for path, module in self.decoder.named_modules():
            name = ("" if path == "lm_head" else "model.") + f"{path}.weight"
            if isinstance(module, Norm) or (isinstance(module, Linear) and _by_row(source, name)):
                self.gains[name] = gain = nn.Parameter(torch.ones(module.stored.shape[0], device=device))
                module.register_forward_hook(_multiplied(gain))
        self.adam = torch.optim.Adam(self.gains.values(), RATE, BETAS)

    def step(self, window: list[int], truth_TV: torch.Tensor, rate: float) -> float:
        """Learns from a window; the divergence before."""
        lost = divergence(truth_TV, self.decoder.lm_head(last_states(self.decoder, window)))
        self.adam.zero_grad()
        lost.backward()
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        return float(lost.detach())

    def save(self, file: Path, passes: int) -> None:
        """What a run that goes on after `passes` needs."""
        with whole(file) as part:
            torch.save({"passes": passes, "gains": self.gains, "adam": self.adam.state_dict()}, part)

    def load(self, file: Path) -> int:
        """The passes that `file` was left after."""
        kept = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, gain in self.gains.items():
                gain.copy_(kept["gains"][name])
        self.adam.load_state_dict(kept["adam"])
        return kept["passes"]


def _by_row(source: Source, name: str) -> bool:
    """Whether this weight has a multiplier for each row; a head that is the embedding has none of its own."""
    return name in source.names() and BY_ROW in schemes.get(str(source.scheme(name))).layout()


def _multiplied(gain_N: torch.Tensor) -> Callable:
    return lambda _module, _inputs, y_TN: y_TN * gain_N


def rate(step: int, steps: int) -> float:
    """Rises over the first few steps, then falls to a tenth."""
    return RATE * min(1.0, (step + 1) / FIRST) * (1 - (1 - LAST) * step / steps)


def gains(model: Model, form: Model, windows: list[list[int]], passes: int, device: str, file: Path, say: Say) -> Gains:
    """The gains of a form of `model` after so many passes over the windows; `file` keeps them after each."""
    with force_reference():
        student = Student(form, device)
        done = student.load(file) if file.exists() else 0
        if done < passes:
            truth = Truth(model, windows, device)
        for at in range(done, passes):
            steps = range(at * len(windows), (at + 1) * len(windows))
            rates = [rate(step, passes * len(windows)) for step in steps]
            lost = [student.step(w, truth.logits(i), r) for i, (w, r) in enumerate(zip(windows, rates, strict=True))]
            student.save(file, at + 1)
            say(f"refit: pass {at + 1} of {passes}, {sum(lost) / len(lost):.4f} nats a token")
    return {name: gain.detach().cpu() for name, gain in student.gains.items()}


def taken_in(source: CompressedSource, found: Gains) -> Parts:
    """The tensors that change, by their names in the files."""
    changed = {}
    for name, gain_N in found.items():
        scheme = schemes.get(source.scheme(name))
        parts = source.parts(name, 0, source.shape(name)[0])
        part = BY_ROW if BY_ROW in parts else "values"
        held = parts[part]
        gain = F.pad(gain_N, (0, held.numel() - len(gain_N)), value=1.0).view(held.shape)
        changed[tensor_of(name, scheme, part)] = (held.float() * gain).to(held.dtype)
    return changed
