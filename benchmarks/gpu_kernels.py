"""Our CUDA kernels at R1's widths: checked against float64 on fresh random data, then timed.

    PYTHONPATH=src python benchmarks/gpu_kernels.py [--schemes int8 fp8_block int4 nl3-g32 mix64] [--json OUT]

mix32, mix64 and mix128 are dynamic blocks of so many columns, see random_weights.py.

A time is that of one call in a CUDA graph of many calls on different weights (or experts), so that neither the cache
nor launches take part; the median of 9 replays, with the least and most. "of bandwidth" compares the bytes of weights
touched with a read of 4 GB measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from random_weights import random_weight
from undistilled.ops import triton as cuda
from undistilled.ops.experts import experts
from undistilled.ops.linear import apply
from undistilled.ops.mla import mla_rows
from undistilled.scheme import Stored

SHAPES = ((7168, 2048), (18432, 7168), (7168, 18432), (576, 7168), (1536, 7168), (24576, 1536))  # outputs, inputs
HIDDEN, WIDTH, EXPERTS, CHOSEN = 7168, 2048, 256, 8
REPLAYS = 9


def graph_times(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Microseconds a call: median, least and most of REPLAYS replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    times = times[1:]
    return {"us": statistics.median(times), "least": min(times), "most": max(times)}


def eager_time(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call without a graph, launches included."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / len(calls)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def exact(weight: Stored) -> torch.Tensor:
    return weight.dense(torch.float32).double()


def linears(name: str, bandwidth: float, batches: tuple[int, ...]) -> list[dict]:
    rows = []
    for outputs, inputs in SHAPES:
        first = random_weight(name, outputs, inputs)
        weights = [first, *(random_weight(name, outputs, inputs) for _ in range(int(300e6 / first.nbytes) + 1))]
        for batch in batches:
            x = torch.randn(batch, inputs, device="cuda").bfloat16()
            off = error(apply(x, first), x.double() @ exact(first).T)
            assert off < 4e-3, (name, outputs, inputs, batch, off)
            calls = [lambda w=w, x=x: apply(x, w) for w in weights * max(1, 20 // len(weights))]
            row = {"scheme": name, "what": f"{outputs} x {inputs}", "batch": batch, "error": off, **graph_times(calls)}
            rows.append(show(row | {"share": first.nbytes / (row["us"] * 1e-6) / bandwidth}))
    return rows


def token_choices(batch: int, sets: int) -> list[torch.Tensor]:
    """Distinct experts for each token; sets take turns through all experts."""
    order = torch.randperm(EXPERTS, device="cuda").repeat(2)
    if batch == 1:
        return [order[(i * CHOSEN) % EXPERTS :][:CHOSEN][None].contiguous() for i in range(sets)]
    scores = torch.rand(sets, batch, EXPERTS, device="cuda")
    return list(scores.topk(CHOSEN, -1).indices)


def exact_experts(x, ids, shares, gate: Stored, up: Stored, down: Stored) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for t in range(len(x)):
        for expert, share in zip(ids[t].tolist(), shares[t].double(), strict=True):
            g, u, d = (exact(w.expert(expert)) for w in (gate, up, down))
            a = g @ x[t].double()
            out[t] += share * (d @ (a * a.sigmoid() * (u @ x[t].double())))
    return out


def moe(name: str, bandwidth: float, batches: tuple[int, ...]) -> list[dict]:
    gate, up = (random_weight(name, EXPERTS, WIDTH, HIDDEN) for _ in range(2))
    down = random_weight(name, EXPERTS, HIDDEN, WIDTH)
    each = (gate.nbytes + up.nbytes + down.nbytes) / EXPERTS
    rows = []
    for batch in batches:
        x = torch.randn(batch, HIDDEN, device="cuda").bfloat16() * 0.1
        shares = torch.rand(batch, CHOSEN, device="cuda")
        sets = token_choices(batch, 32 if batch == 1 else 8 if batch < 100 else 2)
        calls = [lambda i=i, x=x, s=shares: experts.resolve(gate, x.dtype).run(x, i, s, gate, up, down) for i in sets]
        some = slice(0, min(batch, 2))
        off = error(calls[0]()[some], exact_experts(x[some], sets[0][some], shares, gate, up, down))
        assert off < 8e-3, (name, batch, off)
        touched = statistics.mean(len(i.unique()) for i in sets) * each
        row = {"scheme": name, "what": "experts", "batch": batch, "error": off, **graph_times(calls)}
        row |= {"share": touched / (row["us"] * 1e-6) / bandwidth, "eager_us": eager_time(calls)}
        if batch > 100:
            row["tflops"] = 6 * batch * CHOSEN * HIDDEN * WIDTH / row["us"] / 1e6
        rows.append(show(row))
    return rows


def attention(bandwidth: float) -> list[dict]:
    """MLA's decode at 4,096 cached tokens a row: 128 heads, latent 512, rotated part 64."""
    rows, context, size = [], 4096, 64
    for batch in (1, 8, 32):
        sets = []
        for _ in range(max(2, int(300e6 / (batch * context * 1152)))):
            cache = torch.randn(batch * context, 576, device="cuda").bfloat16()
            table = torch.randperm(batch * context // size, device="cuda", dtype=torch.int32).view(batch, -1)
            sets.append((cache, table))
        q, seen = torch.randn(batch, 128, 576, device="cuda").bfloat16(), torch.full((batch,), context)
        seen = seen.int().pin_memory()
        calls = [lambda c=c, t=t, q=q, s=seen: mla_rows(q, c, t, s, size, 512, 0.1) for c, t in sets]
        off = error(calls[0](), mla_rows.reference.run(q.double(), *sets[0], seen, size, 512, 0.1))
        row = {"scheme": "bf16", "what": "mla_rows", "batch": batch, "error": off, **graph_times(calls)}
        rows.append(show(row | {"share": batch * context * 1152 / (row["us"] * 1e-6) / bandwidth}))
    return rows


def show(row: dict) -> dict:
    extra = "".join(f"  {k} {row[k]:.0f}" for k in ("eager_us", "tflops") if k in row)
    print(
        f"{row['scheme']:10} {row['what']:14} {row['batch']:5} {row['us']:9.1f} us"
        f" ({row['least']:.1f} to {row['most']:.1f})  {row['share']:6.1%} of bandwidth, {row['error']:.1e} off{extra}",
        flush=True,
    )
    return row


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads."""
    data = torch.ones(1 << 30, device="cuda")
    return data.nbytes / (graph_times([data.sum] * 3)["us"] * 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemes", nargs="*", default=["int8", "fp8_block", "int4", "nl3-g32"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--experts-only", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    assert not cuda.why_missing(), cuda.why_missing()
    with torch.inference_mode():
        bandwidth = read_bandwidth()
        print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
        rows = attention(bandwidth)
        for name in args.schemes:
            rows += moe(name, bandwidth, (*args.batches, args.prefill) if args.prefill else tuple(args.batches))
            if not args.experts_only:
                rows += linears(name, bandwidth, tuple(args.batches))
    if args.json:
        args.json.write_text(json.dumps({"read_bytes_per_s": bandwidth, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
