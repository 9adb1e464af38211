"""What a plan costs: bytes on each device, and seconds from a roofline over the machine's ceilings.

T tokens in a prompt chunk, B requests at once, C tokens of context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import scheme as schemes
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from .plan import Bytes, Row
from .recipes import products_of

if TYPE_CHECKING:
    from .hardware import Device

# Bytes: interpreter, torch and API libraries, resident; CUDA's context. docs/status.md has the runs.
RUNTIME = {"cpu": 277_000_000, "cuda": 600_000_000}
TOKENIZER = 500  # bytes an entry of the vocabulary: SmolLM2's 49,152 take 24 MB, R1's 129,280 take 100 MB
Dtype = Literal["float32", "bfloat16", "float16"]
Compute = Literal["float32", "bfloat16", "float16", "int8"]  # of products; int8 on a CPU alone
WIDTH: dict[Compute, int] = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value between layers
RANGE = 1 << 20  # elements of a tensor that are on their way to their scheme at once (see load/build.py)
LOADING = 48  # bytes of copies for each of them while they are turned into another scheme
SMALL_OPS = {"attention": 22, "mla": 40, "mlp": 6, "router": 16, "expert": 8}  # launches, counted in the model files


@dataclass(frozen=True)
class Placed:
    """A row with the weight that it stands for."""

    row: Row
    weight: Weight


def touched(weight: Weight, spec: ModelSpec, tokens: int) -> float:
    """The expected share of a weight's bytes that a pass over `tokens` tokens reads, if routing is even."""
    if weight.role == "embed":
        head_too = 1.0 if spec.tied else 0.0
        return min(1.0, head_too + tokens / spec.vocab)
    if weight.experts and spec.moe:
        return 1.0 - (1.0 - spec.moe.per_token / spec.moe.experts) ** tokens
    return 1.0


def decode_bytes(placed: list[Placed], spec: ModelSpec, batch: int, context: int, kv_bytes: int) -> dict[str, float]:
    """Bytes that each device reads for one token of each of `batch` requests."""
    read: dict[str, float] = {}
    for p in placed:
        read[p.row.compute] = read.get(p.row.compute, 0.0) + p.row.nbytes * touched(p.weight, spec, batch)
    share = layer_share(placed)
    for device, part in share.items():
        read[device] = read.get(device, 0.0) + part * kv_bytes * context * batch
    return read


def launches(spec: ModelSpec, batch: int) -> float:
    """Small operations of one decode step. On a CPU, attention runs once a row."""
    attention = SMALL_OPS["mla" if spec.mla else "attention"]
    dense = spec.layers if spec.moe is None else spec.moe.first_dense
    moe = spec.layers - dense
    per_moe = 0.0
    if spec.moe:
        distinct = spec.moe.experts * (1 - (1 - spec.moe.per_token / spec.moe.experts) ** batch)
        per_moe = SMALL_OPS["router"] + SMALL_OPS["expert"] * distinct
    return spec.layers * (attention + SMALL_OPS["mlp"]) + moe * per_moe


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
    step = launches(spec, batch) * max(d.ceilings.launch_s for d in devices.values())
    for name, read in decode_bytes(placed, spec, batch, context, kv_bytes).items():
        step += read / devices[name].ceilings.read_bytes_per_s
    flops = prefill_flops(spec, active, context)
    prompt = 0.0
    for name, device in devices.items():
        for products, share in _flop_shares(placed, spec, name, compute).items():
            prompt += share * flops * chunk / rate(device, products)
        native = compute == "int8" or (device.bf16_products and compute == "bfloat16")
        unpacked = _unpack_bytes(placed, spec, name, chunk, compute if native else "float32")
        prompt += unpacked / device.ceilings.read_bytes_per_s
    prompt += launches(spec, chunk) * max(d.ceilings.launch_s for d in devices.values())
    return chunk / prompt, batch / step


def rate(device: Device, products: str) -> float:
    """Operations a second of products of this dtype; of int8 no less than of float32, where not measured or slower."""
    ceilings = device.ceilings
    if products == "int8":
        return max(ceilings.int8_ops or 0.0, ceilings.fp32_flops)
    return ceilings.fp32_flops if products == "float32" else ceilings.bf16_flops


def _flop_shares(placed: list[Placed], spec: ModelSpec, device: str, compute: str) -> dict[str, float]:
    """The shares of all linear layers' operations that a device has, by the dtype of their products."""

    def work(p: Placed) -> float:
        active = spec.moe.per_token / spec.moe.experts if p.weight.experts and spec.moe else 1.0
        return p.weight.params * active if p.weight.is_linear else 0.0

    total, shares = sum(work(p) for p in placed), dict.fromkeys((compute,), 0.0)
    for p in placed:
        if p.row.compute == device:
            mixed = compute == "int8" and not products_of(p.row.role, p.row.scheme, "cpu", compute)
            products = "float32" if mixed else compute
            shares[products] = shares.get(products, 0.0) + work(p) / total
    return shares


def _unpack_bytes(placed: list[Placed], spec: ModelSpec, device: str, chunk: int, compute: str) -> float:
    """Bytes moved to read each touched weight and, where it is not dense already, to write and read it dense.

    Products of rounded activations unpack a weight in the caches.
    """
    moved = 0.0
    for p in placed:
        if p.row.compute == device and p.weight.is_linear:
            rounded = products_of(p.row.role, p.row.scheme, "cpu", compute)
            dense = 0 if p.row.scheme == "fp32" or rounded else 8 * p.weight.params
            moved += (p.row.nbytes + dense) * touched(p.weight, spec, chunk)
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
    dense = 0 if scheme == "fp32" else _largest_linear(spec, kind) * width
    # a kernel of BF16 products needs rounded rows and no dense copy; a processor without one needs that. INT8 rows with
    # their scales are smaller, and float32's dense copy is there for weights that have no integers
    rounded = 2 * tokens * max(w.shape[1] for w in weights(spec) if w.is_linear)
    return rows + lifted + logits + dense + (rounded if kind == "cpu" and compute in ("bfloat16", "int8") else 0)


def _largest_linear(spec: ModelSpec, kind: str) -> int:
    # on a GPU the reference also makes the head dense; the CPU's kernels for few rows do not
    return max(
        w.shape[0] * w.shape[1] for w in weights(spec) if w.is_linear or (kind != "cpu" and w.role in ("head", "embed"))
    )


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
