"""Stored weights as the C kernels take them: pointers to their parts, checked once.

A weight is [N, K] or, for stacked experts, [E, N, K]; the kernels' `Matrix` (matrix.h) has the same fields in the same
order. What a scheme's parts mean is said here, in `TAKES`, and nowhere else in ops/cpu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...errors import BadArtefact
from ...scheme import Scheme, Stored, across, fp8_block, grouped, int8, plain, tiles
from ...scheme.packing import QUANTUM
from .loader import crosses, kernels, sized

KIND = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8_block": 3, "int8": 4, "int4": 5, "coded": 6, "across": 7, "fp8_across": 8}
"""How a weight matrix [N, K] is stored.

- fp32, fp16, bf16: values [N, K].
- fp8_block: float8_e4m3fn values [N, K] (or their bits as uint8), scales f32
  [ceil(N/128), ceil(K/128)]. The two NaN codes read as +-480.
- int8: values int8 [N, K], scales f32 [N, ceil(K/group)].
- int4: values uint8 [N, ceil(K/32), 16], byte i of a block holding element i (low nibble) and
  i + 16 (high); scales f16 [N, ceil(K/group)], group a multiple of 32 or K; mins like the
  scales (w = q * scale + min) or None (w = (q - 8) * scale).
- coded: levels by groups (scheme/grouped.py), int4 with rounded activations among them, or in tiles
  (scheme/tiles.py).
- across: int8 or codes of 4 bits, 16 outputs side by side (scheme/across.py); products of INT16 or, of codes of 4 bits
  that are one apart, of INT8.
- fp8_across: fp8_block the same way; products in float32.
"""
ROUNDS = {None: 0, "bfloat16": 1, "int8": 2, "int16": 3}
"""What products may round activations to: bfloat16 where `loader.rounds()`, integers for int8 and coded."""
REORDERED = 4  # instead of 0 for fp8_block: float32 in the order in which codes leave a register

_VALUES = (
    (torch.float32,),
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float8_e4m3fn, torch.uint8),
    (torch.int8,),
    (torch.uint8,),
)
_SCALES = {3: torch.float32, 4: torch.float32, 5: torch.float16}
_FORMATS = {"float16": 0, "e4m3": 1, "e8m0": 2, "float32": 3}

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_long


class _Part(ctypes.Structure):
    _fields_ = [("at", _P), ("step", _L)]


class _Codes(ctypes.Structure):
    _fields_ = [("bits", _I), ("count", _L), ("block", _L), ("values", _Part), ("levels", _P)]


class _Tiling(ctypes.Structure):
    _fields_ = [
        *((name, _L) for name in ("height", "cols", "sections", "tiles", "factors", "padded")),
        *(("format", _I), ("widths", _I), ("order", _Part), ("multipliers", _Part), ("codes", _Codes * 5)),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        *(("kind", _I), ("rounds", _I), ("n", _L), ("k", _L), ("group", _L)),
        *(("values", _Part), ("scales", _Part), ("mins", _Part), ("tiling", _Tiling)),
    ]


def check(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


class Matrix:
    """A weight [N, K], or one projection of all `experts`, checked; the kernels then check only x."""

    def __init__(self, kind: int, n: int, k: int, group: int, products: str | None, experts: int | None):
        check(products != "bfloat16" or kind > KIND["fp16"], "products: not bfloat16 for fp32 and fp16")
        if products in int8.LARGEST:
            codes = kind in (KIND["coded"], KIND["across"])
            check(codes or kind == KIND["int8"], f"products: {products} for int8 and codes alone")
            whole = codes or group % QUANTUM == 0
            check(whole, f"group: products of {products} want a multiple of {QUANTUM}")
        self.kind, self.n, self.k, self.products, self.experts = kind, n, k, products, experts
        fp8 = kind in (KIND["fp8_block"], KIND["fp8_across"])
        rounds = REORDERED if fp8 and not products else ROUNDS[products]
        self.struct = _Matrix(kind=kind, rounds=rounds, n=n, k=k, group=group or k)
        self.pointer = ctypes.addressof(self.struct)
        self.held: list[Tensor] = []  # keeps the storage alive

    def part(self, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], what: str) -> _Part:
        """The pointer to a part, of that many elements for each expert."""
        if tensor is None:
            raise ValueError(f"{what}: missing")
        one = tensor
        if self.experts is not None:
            check(tensor.shape[0] == self.experts, f"{what}: want {self.experts} experts along the first axis")
            one = tensor[0]
        ok = tensor.is_cpu and tensor.dtype in dtypes and one.is_contiguous()
        check(ok, f"{what}: want a contiguous {dtypes[0]} tensor on the CPU")
        check(one.numel() == torch.Size(shape).numel(), f"{what}: wrong size")
        self.held.append(tensor)
        step = 0 if self.experts is None else tensor.stride(0) * tensor.element_size()
        return _Part(tensor.data_ptr(), step)


def matrix(
    kind: int,
    values: Tensor,
    scales: Tensor | None,
    mins: Tensor | None,
    n: int,
    k: int,
    group: int,
    products: str | None = None,
    experts: int | None = None,
) -> Matrix:
    """A weight of any KIND but "coded", its products as in ROUNDS; group 0: one scale a row.

    int4 with rounded activations becomes coded.
    """
    check(kind != KIND["int4"] or group % QUANTUM == 0 or group >= k, "group: int4 wants a multiple of 32")
    check(mins is None or kind == KIND["int4"], "mins: wrong kind")
    if kind == KIND["int4"] and products:
        scheme = _nibbles(-(-min(group, k) // QUANTUM) * QUANTUM, mins is not None)
        parts = {name: t for name, t in (("values", values), ("scales", scales), ("minimums", mins)) if t is not None}
        return _by_groups(scheme, parts, n, k, products, experts)
    group = fp8_block.BLOCK if kind == KIND["fp8_block"] else group if kind > KIND["fp8_block"] else 0
    made = Matrix(kind, n, k, group, products, experts)
    groups = -(-k // (group or k))
    row = (-(-k // QUANTUM), QUANTUM // 2) if kind == KIND["int4"] else (k,)
    made.struct.values = made.part(values, _VALUES[kind], (n, *row), "values")
    if kind in _SCALES:
        rows = -(-n // fp8_block.BLOCK) if kind == KIND["fp8_block"] else n
        made.struct.scales = made.part(scales, (_SCALES[kind],), (rows, groups), "scales")
    if mins is not None:
        made.struct.mins = made.part(mins, (torch.float16,), (n, groups), "mins")
    return made


@cache
def _nibbles(group: int, affine: bool) -> grouped.Grouped:
    steps = tuple(float(q) for q in range(16))
    return grouped.Grouped("int4", 4, group, steps if affine else tuple(q - 8 for q in steps), affine=affine)


@cache
def _levels(scheme: grouped.Grouped) -> Tensor:
    """A scheme's levels, float32; ValueError where BF16 does not hold them."""
    levels = torch.tensor(scheme.levels, dtype=torch.float32)
    check(torch.equal(levels.bfloat16().float(), levels), f"{scheme.name}: levels that BF16 does not hold")
    return levels


def _by_groups(
    scheme: grouped.Grouped, parts: dict[str, Tensor], n: int, k: int, products: str | None, experts: int | None
) -> Matrix:
    made = Matrix(KIND["coded"], n, k, scheme.group, products, experts)
    groups, blocks = -(-k // scheme.group), -(-k // QUANTUM)
    check(scheme.group % QUANTUM == 0 or scheme.group == QUANTUM // 2, "group: want 16 or a multiple of 32")
    check(not scheme.affine or scheme.group % QUANTUM == 0, "group: minimums want a multiple of 32")
    form = grouped.FORMATS[scheme.scale]
    made.struct.scales = made.part(parts["scales"], (getattr(torch, form.dtype),), (n, groups), "scales")
    if scheme.affine:
        made.struct.mins = made.part(parts["minimums"], (torch.float16,), (n, groups), "minimums")
    tiling = made.struct.tiling
    tiling.height, tiling.cols, tiling.sections = 1, max(scheme.group, QUANTUM), 1
    tiling.tiles, tiling.factors, tiling.padded = -(-k // tiling.cols), groups, blocks * QUANTUM
    tiling.format, tiling.widths = _FORMATS[scheme.scale], 1
    if form.by_row:
        tiling.multipliers = made.part(parts["multipliers"], (torch.bfloat16,), (n,), "multipliers")
    values = made.part(parts["values"], (torch.uint8,), (n, blocks, 4 * scheme.bits), "values")
    tiling.codes[0] = _Codes(scheme.bits, tiling.tiles, blocks * 4 * scheme.bits, values, _levels(scheme).data_ptr())
    return made


def _in_tiles(
    scheme: tiles.Tiles, parts: dict[str, Tensor], n: int, k: int, products: str | None, experts: int | None
) -> Matrix:
    made = Matrix(KIND["coded"], n, k, scheme.cols, products, experts)
    blocks, sections, count = -(-n // scheme.rows), -(-k // scheme.section), len(scheme.widths)
    tiling, places = made.struct.tiling, (blocks, sections, count)
    made.struct.scales = made.part(parts["scales"], (torch.float8_e4m3fn,), (*places, scheme.rows), "scales")
    tiling.height, tiling.cols, tiling.sections, tiling.tiles = scheme.rows, scheme.cols, sections, count
    tiling.factors, tiling.padded = sections * count, sections * scheme.section
    tiling.format, tiling.widths = _FORMATS["e4m3"], len(scheme.counts)
    low, high = parts["order"].aminmax()
    if low < 0 or high >= count:
        raise BadArtefact(
            f"A weight in {scheme.name} names a tile outside its section of {count}.", "Make the checkpoint again."
        )
    tiling.order = made.part(parts["order"], (torch.int16,), places, "order")
    tiling.multipliers = made.part(parts["multipliers"], (torch.bfloat16,), (blocks, scheme.rows), "multipliers")
    for at, (bits, many) in enumerate(scheme.counts):
        row = scheme.cols // 8 * bits
        values = made.part(parts[f"values{bits}"], (torch.uint8,), (*places[:2], many, scheme.rows, row), "values")
        levels = _levels(grouped.normal(bits, scheme.cols))
        tiling.codes[at] = _Codes(bits, many, sections * many * scheme.rows * row, values, levels.data_ptr())
    return made


def _across(
    scheme: across.Across, parts: dict[str, Tensor], n: int, k: int, products: str | None, experts: int | None
) -> Matrix:
    fp8 = isinstance(scheme.of, fp8_block.Fp8Block)
    check(_meets(scheme.of, products), f"products: {scheme.name} across has none of {products}")
    check(scheme.suits(scheme.of, (n, k)), f"shape: {n} x {k} in groups of {scheme.group} cannot lie across")
    made = Matrix(KIND["fp8_across" if fp8 else "across"], n, k, scheme.group, products, experts)
    groups, tiling, of = -(-k // made.struct.group), made.struct.tiling, scheme.of
    made.struct.values = made.part(parts["values"], (torch.uint8,), (n, k // 8 * scheme.bits), "values")
    tiling.codes[0].bits = scheme.bits
    if fp8:
        blocks = -(-n // fp8_block.BLOCK), groups
        made.struct.scales = made.part(parts["scales"], (torch.float32,), blocks, "scales")
        tiling.codes[0].levels = _bytes(torch.float8_e4m3fn).data_ptr()
        return made
    coded = of if isinstance(of, grouped.Grouped) else None
    form = grouped.FORMATS[coded.scale] if coded else None
    dtype = getattr(torch, form.dtype) if form else torch.float32
    made.struct.scales = made.part(parts["scales"], (dtype,), (n, groups), "scales")
    if coded and coded.affine:
        made.struct.mins = made.part(parts["minimums"], (torch.float16,), (n, groups), "minimums")
    if form and form.by_row:
        tiling.multipliers = made.part(parts["multipliers"], (torch.bfloat16,), (n,), "multipliers")
    tiling.format = _FORMATS[coded.scale if coded else "float32"]
    tiling.codes[0].levels = (_levels(coded) if coded else _bytes(torch.int8)).data_ptr()
    return made


@cache
def _bytes(dtype: torch.dtype) -> Tensor:
    """What each byte means, float32; the two NaN of FP8 are +-480, as to all kernels."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values.where(values == values, torch.tensor([480.0, -480.0]).repeat_interleave(128))


_ACROSS = {int8.Int8: "int16", grouped.Grouped: "int16", fp8_block.Fp8Block: None}  # what products a scheme has across


def _meets(scheme: Scheme, products: str | None) -> bool:
    """Whether a scheme of those has such products across: 4 bits that count from their least have INT8's too."""
    counts = isinstance(scheme, grouped.Grouped) and scheme.bits == 4 and scheme.even
    return products == _ACROSS[type(scheme)] or (products == "int8" and counts)


def _plainly(kind: str | None) -> Callable[..., Matrix]:
    """What takes a KIND whose parts are values, scales and minimums; None: the scheme's name is the kind."""

    def take(scheme, parts: dict[str, Tensor], n: int, k: int, products: str | None, experts: int | None) -> Matrix:
        usual = parts["values"], parts.get("scales"), parts.get("minimums")
        return matrix(KIND[kind or scheme.name], *usual, n, k, getattr(scheme, "group", 0), products, experts)

    return take


def _codes(
    scheme: grouped.Grouped, parts: dict[str, Tensor], n: int, k: int, products: str | None, experts: int | None
) -> Matrix:
    """INT4 has kernels of its own but for rounded activations."""
    nibbles = scheme.name.startswith("int4") and not products
    return (_plainly("int4") if nibbles else _by_groups)(scheme, parts, n, k, products, experts)


TAKES: dict[type, Callable[..., Matrix]] = {
    plain.Plain: _plainly(None),
    fp8_block.Fp8Block: _plainly("fp8_block"),
    int8.Int8: _plainly("int8"),
    grouped.Grouped: _codes,
    tiles.Tiles: _in_tiles,
    across.Across: _across,
}


def lay(scheme: across.Across, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts of a weight [N, K] by rows as `scheme` has them, as `scheme.arranged` says, by our kernel."""
    values = parts["values"].contiguous()
    n, k = values.shape[0], values[0].numel() * 8 // scheme.bits
    out = torch.empty((n // across.LANES, k // QUANTUM, across.LANES * QUANTUM * scheme.bits // 8), dtype=torch.uint8)
    sized()
    kernels.lay_across(values.data_ptr(), out.data_ptr(), n, k, scheme.bits)
    rest = {name: part for name, part in parts.items() if name != "values"}
    return {"values": out, **scheme.arranged(rest)}


def laid(scheme: Scheme, shape: tuple[int, ...], products: str | None) -> Scheme:
    """How a weight [..., N, K] in `scheme` should lie for the kernels of this machine: across where it can."""
    lies = crosses() and across.Across.suits(scheme, shape) and _meets(scheme, products)
    return across.Across(scheme) if lies else scheme  # type: ignore[arg-type]


def takes(stored: Stored) -> bool:
    """Whether the kernels read this weight where it lies, for products in float32."""
    whole = len(stored.shape) == 2
    return type(stored.scheme) in TAKES and all((p if whole else p[0]).is_contiguous() for p in stored.parts.values())


def of(stored: Stored) -> Matrix:
    """A weight that `takes` said yes to, with activations rounded where its products say so."""
    experts = stored.shape[0] if len(stored.shape) == 3 else None
    return TAKES[type(stored.scheme)](stored.scheme, stored.parts, *stored.shape[-2:], stored.products, experts)
