"""Checkpoints that other programs quantised (AWQ, GPTQ, compressed-tensors), as a `Source`.

A value is (code - zero) * scale. Codes and, in float32, scales are kept. Schemes by groups hold scales in float16:
the same bits where they were float16, rounded where they were float32 or tiny. Where zero points are not 2^(bits - 1),
minimum = -zero * scale is rounded to float16 too: at most 2^-11 of it, 0.008 of a step of 4 bits.
Tensors are read whole, as they are stored, and unpacked by ranges of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import scheme as schemes
from ..errors import BadArtefact
from ..model.quantized import Packed, forms
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..scheme.base import Parts
from ..scheme.fp8_block import BLOCK
from ..scheme.grouped import Grouped
from ..scheme.packing import pack
from .bits import unpack
from .safetensors import SafetensorsSource
from .source import Columns, narrowed

Raw = dict[str, torch.Tensor]
Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of rows: codes uint8 [N, K], scales [N, G], zeros uint8 [N, G]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds output j of eight


def _columns(words: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Columns [start, stop) of int32 [n, N * bits / 32], which packs neighbours of a row -> uint8 [n, stop - start]."""
    per = 32 // bits if 32 % bits == 0 else 32
    first, last = start // per, -(-stop // per)
    words = words[:, first * per * bits // 32 : last * per * bits // 32]
    return unpack(words, bits)[:, start - first * per : stop - first * per]


def _nibbles(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The same of AWQ's words, whose nibbles have an order of their own."""
    first = start // 8
    found = unpack(words[:, first : -(-stop // 8)], 4).unflatten(-1, (-1, 8))
    return found[..., AWQ_ORDER].flatten(-2)[:, start - 8 * first : stop - 8 * first]


def _awq(form: Packed, raw: Raw, start: int, stop: int) -> Read:
    """qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]."""
    codes, zeros = (_nibbles(raw[part], start, stop).T for part in ("qweight", "qzeros"))
    return codes, raw["scales"][:, start:stop].T, zeros


def _gptq(form: Packed, raw: Raw, start: int, stop: int) -> Read:
    """qweight [K * bits / 32, N], qzeros [G, N * bits / 32], scales [G, N], g_idx [K]; the inputs lie in words."""
    zeros = _columns(raw["qzeros"], form.bits, start, stop).T
    if not (form.symmetric and (zeros == 1 << (form.bits - 1)).all()):  # some files say v1 and hold v2's zero points
        zeros = zeros + form.zero & (1 << form.bits) - 1
    return unpack(raw["qweight"][:, start:stop].T, form.bits), raw["scales"][:, start:stop].T, zeros


def _packed(form: Packed, raw: Raw, start: int, stop: int) -> Read:
    """weight_packed [N, K * bits / 32], weight_scale [N, G], weight_shape [2], weight_zero_point [N * bits / 32, G]."""
    scales = raw["weight_scale"][start:stop]
    if form.symmetric:
        zeros = torch.full(scales.shape, 1 << (form.bits - 1), dtype=torch.uint8)
    else:
        zeros = _columns(raw["weight_zero_point"].T, form.bits, start, stop).T
    return unpack(raw["weight_packed"][start:stop], form.bits), scales, zeros


def _plain(form: Packed, raw: Raw, start: int, stop: int) -> Read:
    """weight int8 [N, K], weight_scale [N, G], weight_zero_point int8 [N, G]."""
    codes, scales = raw["weight"][start:stop].view(torch.uint8) ^ 128, raw["weight_scale"][start:stop]
    zeros = torch.zeros(scales.shape, dtype=torch.int8) if form.symmetric else raw["weight_zero_point"][start:stop]
    return codes, scales, zeros.view(torch.uint8) ^ 128


def _fp8(form: Packed, raw: Raw, start: int, stop: int) -> Parts:
    """weight float8_e4m3fn [N, K], weight_scale of blocks [ceil(N / 128), ceil(K / 128)], or one of all."""
    values, scales = raw["weight"][start:stop], raw["weight_scale"].float()
    across = -(-values.shape[1] // BLOCK)
    if scales.numel() == 1:
        return {"values": values, "scales": scales.reshape(1, 1).expand(-(-(stop - start) // BLOCK), across)}
    return {"values": values, "scales": scales[start // BLOCK : -(-stop // BLOCK)]}


def _mxfp4(form: Packed, raw: Raw, start: int, stop: int) -> Parts:
    """weight_packed uint8 [N, K / 2], neighbours in a byte, weight_scale uint8 [N, K / 32], exponents."""
    words = raw["weight_packed"][start:stop].view(torch.int32)
    return {"values": pack(unpack(words, 4), 4), "scales": raw["weight_scale"][start:stop]}


@dataclass(frozen=True)
class Layout:
    """The tensors of a weight, the first of which every packed weight has, and those that may lack.

    Integers are `read`; what is a scheme's parts but for the packing is `parts`.
    """

    tensors: tuple[str, ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Packed, Raw, int, int], Read] | None = None
    parts: Callable[[Packed, Raw, int, int], Parts] | None = None


LAYOUTS = {
    "awq": Layout(("qweight", "qzeros", "scales"), read=_awq),
    "gptq": Layout(("qweight", "qzeros", "scales"), ("g_idx",), _gptq),
    "packed": Layout(("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point",), _packed),
    "plain": Layout(("weight", "weight_scale"), ("weight_zero_point",), _plain),
    "fp8": Layout(("weight", "weight_scale"), parts=_fp8),
    "mxfp4": Layout(("weight_packed", "weight_scale"), parts=_mxfp4),
}
BESIDE = ("input_scale", "input_zero_point", "k_scale", "v_scale")  # of activations, which stay as they are


class PackedSource(SafetensorsSource):
    """`files`, `names`, `shape`, `scheme`, `parts` and `dense`, as source.py has them."""

    def __init__(self, folder: Path, config: dict[str, Any], spec: ModelSpec) -> None:
        super().__init__(folder, config)
        found = forms(config, spec)
        held = [weight for weight in weights(spec) if weight.name in found]
        self.weights: dict[str, Weight] = {name: weight for weight in held for name in weight.tensor_names}
        self.forms: dict[str, Packed] = {n: found[w.name] for n, w in self.weights.items()}
        self._biases = {weight.name for weight in weights(spec) if weight.role == "bias"}
        self._last: tuple[str, Raw] = ("", {})

    def names(self) -> set[str]:
        found = set()
        for entry in self.entries:
            stem, _, part = entry.rpartition(".")
            form = self.forms.get(f"{stem}.weight")
            layout = LAYOUTS[form.layout] if form else None
            if part in BESIDE:
                continue
            if layout is None or part not in (*layout.tensors, *layout.optional, "bias"):
                found.add(entry)
            elif part == layout.tensors[0]:
                found.add(f"{stem}.weight")
            elif part == "bias" and (entry in self._biases or self.read(entry, 0, self.shape(entry)[0]).any()):
                found.add(entry)  # old files have one of zeros beside every weight
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._matrix(name)[0] if name in self.forms else super().shape(name)

    def scheme(self, name: str) -> str | None:  # type: ignore[override]  # where inputs are in disorder: dense alone
        return self.forms[name].scheme if name in self.forms else super().scheme(name)

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> Parts:
        if name not in self.forms:
            return super().parts(name, start, stop, columns)
        shape = (stop - start, *self.shape(name)[1:])
        return narrowed(self._parts(name, start, stop), self.scheme(name), shape, columns)

    def _parts(self, name: str, start: int, stop: int) -> Parts:
        form, raw, layout = self._stored(name)
        if layout.parts is not None:
            return layout.parts(form, raw, start, stop)
        codes, scales, zeros = self._codes(name, start, stop)
        scheme, cols = schemes.get(str(form.scheme)), self.weights[name].shape[1]
        firsts = self._groups(name)[:: getattr(scheme, "group", 0) or cols]  # a scheme's groups are as long or shorter
        scales = scales[:, firsts].float()
        if not isinstance(scheme, Grouped):
            return {"values": (codes ^ 128).view(torch.int8), "scales": scales}
        minimums = {"minimums": -(zeros[:, firsts].float() * scales).half()} if scheme.affine else {}
        return {"values": scheme.packed(codes), "scales": scales.half(), **minimums}

    def dense(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.forms:
            return super().dense(name, start, stop)
        form, raw, layout = self._stored(name)
        if layout.parts is not None:
            shape = (stop - start, self.weights[name].shape[1])
            return schemes.get(str(form.scheme)).decompress(layout.parts(form, raw, start, stop), shape, torch.float32)
        codes, scales, zeros = self._codes(name, start, stop)
        groups = self._groups(name)
        return (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]

    def _stored(self, name: str) -> tuple[Packed, Raw, Layout]:
        form = self.forms[name]
        return form, self._raw(name), LAYOUTS[form.layout]

    def _codes(self, name: str, start: int, stop: int) -> Read:
        form, raw, layout = self._stored(name)
        assert layout.read is not None
        codes, scales, zeros = layout.read(form, raw, start, stop)
        if form.symmetric and (zeros != 1 << (form.bits - 1)).any():
            self._fail(name, "has other zero points than its config.json, which says that it is symmetric")
        return codes[:, : self.weights[name].shape[1]], scales, zeros

    def _groups(self, name: str) -> torch.Tensor:
        """The group of each input, int64 [K]."""
        form, raw, cols = self.forms[name], self._raw(name), self.weights[name].shape[1]
        even = torch.arange(cols) // (form.group or cols)
        said = raw["g_idx"].long() if "g_idx" in raw else even
        if form.ordered and not torch.equal(said, even):
            self._fail(name, "takes its inputs in another order (g_idx), which config.json does not say (desc_act)")
        if said.min() < 0 or said.max() > even[-1]:
            self._fail(name, "has inputs of a group that is not there (g_idx)")
        return said

    def _fail(self, name: str, what: str) -> NoReturn:
        raise BadArtefact(f"{self.folder}: {name!r} {what}.", "Is config.json this checkpoint's own?")

    def _raw(self, name: str) -> Raw:
        """The tensors of a weight as they are stored, kept while ranges of the same weight are asked for."""
        if self._last[0] != name:
            shape, tensors = self._matrix(name)
            self._last = (name, {part: self.read(t, 0, self._entry(t).shape[0]) for part, t in tensors.items()})
            if "weight_shape" in tensors and tuple(self._last[1]["weight_shape"].tolist()) != shape:
                self._fail(name, f"is not {list(shape)} by its weight_shape")
        return self._last[1]

    def _matrix(self, name: str) -> tuple[tuple[int, ...], dict[str, str]]:
        """(shape of the weight, part -> tensor); BadArtefact where a tensor lacks or has another shape or dtype."""
        form, (rows, cols) = self.forms[name], self.weights[name].shape
        layout, stem = LAYOUTS[form.layout], name.removesuffix("weight")
        needed = () if form.symmetric else ("weight_zero_point",)
        more = [part for part in layout.optional if part in needed or stem + part in self.entries]
        tensors = {part: stem + part for part in (*layout.tensors, *more)}
        for part, tensor in tensors.items():
            entry = self._entry(tensor)
            kinds, shapes = _expected(form, rows, cols)[part]
            if entry.kind not in kinds or entry.shape not in shapes:
                said = f"{list(entry.shape)} {entry.kind}, expected {list(shapes[0])} {' or '.join(kinds)}"
                raise BadArtefact(f"{entry.file}: {tensor!r} is {said}.", "Is config.json this checkpoint's own?")
        return (rows, cols), tensors


Expected = tuple[tuple[str, ...], list[tuple[int, ...]]]  # dtypes as safetensors names them, shapes
FLOATS = ("F16", "BF16", "F32")


def _expected(form: Packed, rows: int, cols: int) -> dict[str, Expected]:
    """The dtypes and shapes that the weight's tensors may have."""
    groups = -(-cols // form.group) if form.group else 1
    across, down = -(-cols * form.bits // 32), -(-rows * form.bits // 32)
    blocks = (-(-rows // BLOCK), -(-cols // BLOCK))
    by_input: dict[str, Expected] = {
        "qzeros": (("I32",), [(groups, down)]),
        "scales": (FLOATS, [(groups, rows)]),
        "g_idx": (("I32", "I64"), [(cols,)]),
    }
    scale: Expected = (FLOATS, [(rows, groups)])
    layouts: dict[str, dict[str, Expected]] = {
        "awq": {"qweight": (("I32",), [(cols, down)]), **by_input},
        "gptq": {"qweight": (("I32",), [(across, rows)]), **by_input},
        "packed": {
            "weight_packed": (("I32",), [(rows, across)]),
            "weight_scale": scale,
            "weight_shape": (("I64", "I32"), [(2,)]),
            "weight_zero_point": (("I32",), [(down, groups)]),
        },
        "plain": {
            "weight": (("I8",), [(rows, cols)]),
            "weight_scale": scale,
            "weight_zero_point": (("I8",), [(rows, groups)]),
        },
        "mxfp4": {
            "weight_packed": (("U8",), [(rows, -(-cols // 2))]),
            "weight_scale": (("U8",), [(rows, groups)]),
        },
        "fp8": {"weight": (("F8_E4M3",), [(rows, cols)]), "weight_scale": (FLOATS, [blocks, (1,), (1, 1)])},
    }
    return layouts[form.layout]
