"""What a plan costs: bytes on each device, and seconds from a roofline over the machine's ceilings.

T tokens in a prompt chunk, B requests at once, C tokens of context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from .. import scheme as schemes
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..scheme.across import Across
from .plan import Bytes, Row
from .recipes import INTEGERS, MIXED, family, products_of, scheme_of

if TYPE_CHECKING:
    from .hardware import Device

# Bytes: interpreter, torch and API libraries, resident; CUDA's context. docs/status.md has the runs.
RUNTIME = {"cpu": 277_000_000, "cuda": 600_000_000}
TOKENIZER = 500  # bytes an entry of the vocabulary: SmolLM2's 49,152 take 24 MB, R1's 129,280 take 100 MB
Dtype = Literal["float32", "bfloat16", "float16"]
Compute = Literal["float32", "bfloat16", "float16", "int8", "int16"]  # of products; integers on a CPU alone
WIDTH: dict[Compute, int] = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value between layers
RANGE = 1 << 20  # elements of a tensor that are on their way to their scheme at once (see load/build.py)
LOADING = 48  # bytes of copies for each of them while they are turned into another scheme
# Operations of a layer beside what its bytes take: PyTorch's launches where references run, a set for each expert; or
# kernels of ours, one set for all experts.
SMALL_OPS = {"attention": 22, "mla": 40, "mlp": 6, "router": 16, "expert": 8, "experts": 0}
OUR_OPS = {"attention": 12, "mla": 20, "mlp": 5, "router": 3, "expert": 0, "experts": 5}
PLAIN = ("bf16", "fp16", "fp32")
COARSE = "int8 across"  # products of INT8 with INT4 that lies across: faster than those with what lies by rows
DEPTH = 64  # inputs of a tile, which share a scale
TILED = "int16 across"  # products of INT16 with what AMX takes as it lies (ops/cpu/tiles.cpp)
SLOW = ("nl5", "nl6")  # families that a GPU has no kernels for
REPLAY_S = {"cuda": 4e-6, "cpu": 1.5e-6}  # seconds of one of ours in a pass that was recorded: docs/status.md
# what our kernels for experts reach of a GPU's BF16 products over a long prompt, by what they unpack: docs/status.md
EXPERTS = {"int8": 0.32, "fp8_block": 0.27, "int4": 0.22}
UNPACKED = 0.13  # other schemes


@dataclass(frozen=True)
class Placed:
    """A row with the weight that it stands for."""

    row: Row
    weight: Weight


Part = Callable[[Placed], float]  # the share of a row that a rank has


def whole(_: Placed) -> float:
    """Of one that is not cut."""
    return 1.0


def touched(weight: Weight, spec: ModelSpec, tokens: int) -> float:
    """The expected share of a weight's bytes that a pass over `tokens` tokens reads, if routing is even."""
    if weight.role == "embed":
        head_too = 1.0 if spec.tied else 0.0
        return min(1.0, head_too + tokens / spec.vocab)
    return chosen(spec, tokens) if weight.experts else 1.0


def chosen(spec: ModelSpec, tokens: int) -> float:
    """The expected share of its routed experts that so many tokens choose, if routing is even."""
    return 1.0 - (1.0 - spec.moe.per_token / spec.moe.experts) ** tokens if spec.moe else 1.0


def decode_bytes(placed: list[Placed], spec: ModelSpec, batch: int, context: int, kv_bytes: int) -> dict[str, float]:
    """Bytes that each device reads for one token of each of `batch` requests."""
    read: dict[str, float] = {}
    for p in placed:
        read[p.row.compute] = read.get(p.row.compute, 0.0) + p.row.nbytes * touched(p.weight, spec, batch)
    share = layer_share(placed)
    for device, part in share.items():
        read[device] = read.get(device, 0.0) + part * kv_bytes * context * batch
    return read


def ours(placed: list[Placed], kind: str, compute: str) -> bool:
    """Whether kernels of ours run a pass, which is recorded then: always on a CPU; on a GPU in BF16, where each scheme
    has one, and experts are in few bits."""
    if kind == "cpu":
        return True
    served = not any(p.row.scheme.startswith(SLOW) or (p.weight.experts and p.row.scheme in PLAIN) for p in placed)
    return served and compute == "bfloat16"


def operations(spec: ModelSpec, tokens: int, native: bool) -> float:
    """Small operations of a pass over `tokens` tokens, with kernels of ours or without."""
    each = OUR_OPS if native else SMALL_OPS
    dense = spec.layers if spec.moe is None else spec.moe.first_dense
    found = float(spec.layers) * (each["mla" if spec.mla else "attention"] + each["mlp"])
    if spec.moe:
        distinct = spec.moe.experts * (1 - (1 - spec.moe.per_token / spec.moe.experts) ** tokens)
        found += (spec.layers - dense) * (each["router"] + each["experts"] + each["expert"] * distinct)
    return found


def small_seconds(
    placed: list[Placed], spec: ModelSpec, device: Device, tokens: int, compute: str, recorded: bool
) -> float:
    """Seconds of a pass that are not its bytes' nor its products'; a decode pass is `recorded` where it can be."""
    native = ours(placed, device.kind, compute)
    each = REPLAY_S[device.kind] if native and recorded else device.ceilings.launch_s
    return operations(spec, tokens, native) * each


def prefill_flops(spec: ModelSpec, active: int, context: int) -> float:
    """Floating-point operations for one prompt token at the middle of a context."""
    embedding = spec.vocab * spec.hidden  # neither a look-up nor one head row a prompt counts
    linear = 2.0 * max(active - embedding, embedding)
    width = spec.mla.qk_head_dim + spec.mla.v_head_dim if spec.mla else 2 * spec.head_dim
    return linear + 2.0 * spec.heads * width * spec.layers * context / 2


def seconds(
    placed: list[Placed],
    spec: ModelSpec,
    devices: dict[str, Device],
    *,
    active: int,
    batch: int,
    context: int,
    chunk: int,
    kv_bytes: int,
    compute: str,
) -> tuple[float, float]:
    """(prefill, decode) in tokens a second; devices work one after another, as one request's layers do."""
    step = max(small_seconds(placed, spec, device, batch, compute, True) for device in devices.values())
    for name, read in decode_bytes(placed, spec, batch, context, kv_bytes).items():
        step += read / devices[name].ceilings.read_bytes_per_s
    flops = prefill_flops(spec, active, context)
    prompt = 0.0
    for name, device in devices.items():
        prompt += product_seconds(placed, spec, name, device, compute, flops * chunk)
        prompt += unpacked_seconds(placed, spec, name, device, chunk, compute)
    prompt += max(small_seconds(placed, spec, device, chunk, compute, False) for device in devices.values())
    return chunk / prompt, batch / step


def product_seconds(
    placed: list[Placed], spec: ModelSpec, home: str, device: Device, compute: str, flops: float, part: Part = whole
) -> float:
    """Seconds of what a home has of a prompt's `flops`, by what its products are."""
    shares = _flop_shares(placed, spec, home, device.kind, compute, part)
    return sum(share * flops / rate(device, products) for products, share in shares.items())


def unpacked_seconds(
    placed: list[Placed], spec: ModelSpec, home: str, device: Device, chunk: int, compute: str, part: Part = whole
) -> float:
    """Seconds of `unpack_bytes`."""
    native = device.kind == "cuda" or compute in INTEGERS or (device.bf16_products and compute == "bfloat16")
    across = "avx2" in device.features  # how the kernels for FP8 want it (scheme/across.py)
    products = compute if native else "float32"
    moved = unpack_bytes(placed, spec, home, device.kind, chunk, products, across=across, part=part)
    return moved / device.ceilings.read_bytes_per_s


def rate(device: Device, products: str) -> float:
    """Operations a second of products of this dtype; of int8 no less than of float32, where not measured or slower.

    Our CPU kernels against PyTorch's float32, which is measured: benchmarks on Zen 3 and, with AMX, Sapphire Rapids
    (docs/status.md). In BF16 AMX is PyTorch's alone.
    """
    ceilings, features = device.ceilings, device.features
    if products.startswith("experts"):
        return ceilings.bf16_flops * EXPERTS.get(products.split()[1], UNPACKED)
    if products == "int8":
        return max(ceilings.int8_ops or 0.0, ceilings.fp32_flops)
    if products in ("int16", TILED, COARSE):
        faster = {"int16": 1.3, TILED: 3.0 if "amx_int8" in features else 1.3, COARSE: 1.9}[products]
        return ceilings.fp32_flops * (faster if "avx2" in features else 1.0)
    ours = 0.75 * ceilings.fp32_flops if "amx_bf16" in features else math.inf
    return ceilings.fp32_flops if products == "float32" else min(ours, ceilings.bf16_flops)


def _multiplied(row: Row, kind: str, compute: str, native: bool) -> str:
    """What a weight's products are, as `rate` knows it: their dtype, on a GPU experts in a scheme."""
    if kind == "cuda":
        return f"experts {family(row.scheme)}" if native and row.experts else compute
    products = products_of(row.role, row.scheme, "cpu", compute) or "float32"
    if products == "int16" and in_tiles(row.scheme):
        return TILED
    return COARSE if products == "int8" and family(row.scheme) == "int4" else products


@cache
def in_tiles(scheme: str) -> bool:
    """Whether INT16 meets a scheme's codes in tiles, where the processor has them and inputs are whole tiles."""
    known = schemes.SCHEMES.get(scheme)
    if known is None or family(scheme) == "fp8_block" or not Across.takes(known):
        return False
    return Across(known).group % DEPTH == 0  # type: ignore[arg-type]


def _flop_shares(
    placed: list[Placed], spec: ModelSpec, home: str, kind: str, compute: str, part: Part
) -> dict[str, float]:
    """The shares of all linear layers' operations that a home has, by what their products are."""

    def work(p: Placed) -> float:
        active = spec.moe.per_token / spec.moe.experts if p.weight.experts and spec.moe else 1.0
        return p.weight.params * active if p.weight.is_linear else 0.0

    total, native = sum(work(p) for p in placed), ours(placed, kind, compute)
    shares: dict[str, float] = {}
    for p in placed:
        if p.row.compute == home:
            products = _multiplied(p.row, kind, compute, native)
            shares[products] = shares.get(products, 0.0) + part(p) * work(p) / total
    return shares


def unpack_bytes(
    placed: list[Placed],
    spec: ModelSpec,
    home: str,
    kind: str,
    chunk: int,
    compute: str,
    *,
    across: bool,
    part: Part = whole,
) -> float:
    """Bytes moved to read each touched weight of a home and, where it is not dense already, to write and read it dense.

    Products of rounded activations and FP8 that lies `across` are unpacked in the caches, and so are a GPU's experts.
    """
    width, moved = 2 * WIDTH["float32" if kind == "cpu" else "bfloat16"], 0.0
    native = ours(placed, kind, compute)
    for p in placed:
        if p.row.compute == home and p.weight.is_linear:
            rounded = products_of(p.row.role, p.row.scheme, "cpu", compute) is not None
            lies = across and family(p.row.scheme) == "fp8_block" and p.row.role != "attention.kv_b"
            inside = (p.weight.experts and native) if kind == "cuda" else rounded or lies
            dense = 0 if inside or p.row.scheme in (PLAIN if kind == "cuda" else ("fp32",)) else width * p.weight.params
            moved += (p.row.nbytes + dense) * touched(p.weight, spec, chunk) * part(p)
    return moved


def activation_bytes(
    spec: ModelSpec, *, chunk: int, batch: int, context: int, compute: Compute, kind: str, scheme: str
) -> int:
    """The largest working set of a pass: rows of the widest layers, and a copy for products, of a weight or of rows."""
    width = 4 if kind == "cpu" else WIDTH[compute]
    tokens = max(chunk, batch)
    attention = spec.heads * (spec.mla.qk_head_dim + spec.mla.v_head_dim if spec.mla else 3 * spec.head_dim)
    mlp = 3 * max(spec.intermediate if not spec.moe or spec.moe.first_dense else 0, 0)
    if spec.moe:
        mlp = max(mlp, 3 * spec.moe.width * max(spec.moe.shared, 1))
    rows = tokens * (6 * spec.hidden + max(2 * attention, mlp)) * width
    heads = 2 * spec.heads * (spec.mla.qk_head_dim + spec.mla.v_head_dim if spec.mla else 2 * spec.head_dim)
    lifted = context * heads * width  # keys and values of every head, of one prompt in one layer
    logits = batch * spec.vocab * 4 * 3
    dense = 0 if scheme == "fp32" else _largest_linear(spec, kind, scheme) * width
    # a kernel of BF16 products needs rounded rows and no dense copy; a processor without one needs that. rows of
    # integers with their scales are about as large; the dense copy is for weights that are not multiplied by integers
    rounded = 2 * tokens * max(w.shape[1] for w in weights(spec) if w.is_linear)
    return rows + lifted + logits + dense + (rounded if kind == "cpu" and compute in ("bfloat16", *INTEGERS) else 0)


def _largest_linear(spec: ModelSpec, kind: str, scheme: str) -> int:
    """Elements of the largest weight that is made dense. On a GPU the reference also makes the head dense, but nothing
    that is stored as it is multiplied; the CPU's kernels for few rows leave a head as it is."""

    def made(w: Weight) -> bool:
        if kind == "cpu":
            return w.is_linear
        plain = scheme != MIXED and scheme_of(w, spec, scheme) in PLAIN
        return not plain and (w.is_linear or w.role in ("head", "embed"))

    return max((w.shape[0] * w.shape[1] for w in weights(spec) if made(w)), default=0)


def layer_share(placed: list[Placed]) -> dict[str, float]:
    """The share of the layers whose attention, and so whose cache, is on each device."""
    homes = [p.row.compute for p in placed if p.weight.role == "attention.o" and not p.weight.mtp]
    return {home: homes.count(home) / len(homes) for home in set(homes)}


def device_bytes(device: str, placed: list[Placed], cache: int, working: int) -> Bytes:
    """What a device holds: its rows, its layers' share of `cache` bytes, the larger of running and loading."""
    held = sum(p.row.nbytes for p in placed if p.row.store == device)
    kv, constant = int(cache * layer_share(placed).get(device, 0.0)), runtime(device, placed)
    activations = max(working, load_bytes(placed) - kv)
    total = held + kv + activations + constant
    return Bytes(weights=held, kv=kv, activations=activations, runtime=constant, total=total)


def runtime(device: str, placed: list[Placed]) -> int:
    """Bytes that do not depend on what runs; the tokenizer lives in main memory."""
    kind = device.split(":")[0]
    vocab = next((p.weight.shape[0] for p in placed if p.weight.role == "embed"), 0)
    return RUNTIME[kind] + (TOKENIZER * vocab if kind == "cpu" else 0)


def load_bytes(placed: list[Placed]) -> int:
    """One range of the largest matrix on its way; an embedding or a head changes its form little or not."""
    largest = max((p.weight.shape[0] * p.weight.shape[1] for p in placed if p.weight.is_linear), default=0)
    return LOADING * min(RANGE, largest)


def row_bytes(weight: Weight, scheme: str) -> int:
    """Bytes of a weight, or a range of experts, in memory."""
    return schemes.bytes_of(schemes.get(scheme), weight.full_shape)
