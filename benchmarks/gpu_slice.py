"""An R1-wide slice (one dense and two MoE layers, FP8 blocks, random weights) on one GPU, beside transformers in BF16.

    PYTHONPATH=src python benchmarks/gpu_slice.py CONFIG.json [--prompt 4096] [--further 64] [--json OUT] [--alone]

Prints milliseconds a decode step and for the prefill, each beside the time that the bytes touched would take
at the measured memory bandwidth. And how far our logits and transformers' are from those of the reference bodies of
our ops in float32, after the prompt and after each further token: BF16 sends some tokens to other experts, which
moves their logits by far more than rounding does, for transformers as for us. So the report says how often the same
experts were chosen, and the errors of tokens where they were.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu_twin import Twin, milliseconds
from undistilled.generate.runner import Runner
from undistilled.load.build import DTYPE, Memory
from undistilled.model import layers
from undistilled.model.decoder import Decoder
from undistilled.model.spec import ModelSpec, spec_from_config
from undistilled.ops.registry import force_reference
from undistilled.plan.hardware import load_machine
from undistilled.plan.plan import Plan
from undistilled.plan.solve import Ask, solve
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work
from undistilled.scheme import Stored


def slice_config(path: Path) -> dict:
    """R1's config with one dense and two MoE layers and no MTP layer."""
    config = json.loads(path.read_text())
    return config | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


def randomise(held: Mapping[str, Stored]) -> None:
    """Random weights, in place: FP8 values as a standard normal rounded, scales that keep activations tame."""
    for name, stored in held.items():
        wide = stored.shape[-1] ** -0.5
        for part, tensor in stored.parts.items():
            if tensor.dtype is torch.float8_e4m3fn:
                for one in tensor if tensor.dim() == 3 else [tensor]:
                    one.copy_(torch.randn(one.shape, device=one.device).to(torch.float8_e4m3fn))
            elif part == "scales":
                tensor.uniform_(0.5, 1.5).mul_(wide)
            elif "norm" in name:
                tensor.uniform_(0.9, 1.1)
            else:
                tensor.normal_(0, 0.05 if "correction" in name else wide)


class Slice:
    """A runner over random weights, a prompt, and tokens that come after it."""

    def __init__(self, spec: ModelSpec, plan: Plan, memory: Memory, dtype: torch.dtype) -> None:
        self.decoder = Decoder(memory, spec, dtype)
        self.runner = Runner(self.decoder, plan)
        self.blocks = list(range(plan.kv.blocks))

    def hidden(self, tokens: list[int], start: int, prefill: bool) -> torch.Tensor:
        """Hidden states of tokens[start:], which follow what is in the cache."""
        sequence = Sequence(Request("r", tokens, Sampling()), tokens, self.blocks)
        return self.runner.part.hidden(self.runner.passed([Work(sequence, start, len(tokens))], prefill))

    def rows(self, prompt: list[int], further: list[int]) -> torch.Tensor:
        """Logits [1 + N, vocab] after the prompt and each further token, a token at a time as decoding does."""
        tokens = list(prompt)
        found = [self.decoder.logits(self.hidden(tokens, 0, True)[-1:])[0]]
        for token in further:
            tokens.append(token)
            found.append(self.decoder.logits(self.hidden(tokens, len(tokens) - 1, False))[0])
        return torch.stack(found)

    def whole(self, prompt: list[int], further: list[int]) -> torch.Tensor:
        """The same of one pass over everything: no cache between tokens, no absorbed attention."""
        return self.decoder.logits(self.hidden([*prompt, *further], 0, True)[-1 - len(further) :])


@contextmanager
def noting(count: int) -> Iterator[list[torch.Tensor]]:
    """Collects the routers' choices of the last `count` tokens, [count, MoE layers, k] when it ends. Captured passes
    do not go through here."""
    route, seen, out = layers.route, [], []

    def note(*arguments):
        ids, weights = route(*arguments)
        seen.append(ids)
        return ids, weights

    layers.route = note
    try:
        yield out
    finally:
        layers.route = route
        if len(seen[-1]) > 1:  # one pass over everything
            out.append(torch.stack([ids[-count:] for ids in seen], 1).sort(-1).values)
        else:
            out.append(torch.stack([ids[-1] for ids in seen]).unflatten(0, (count, -1)).sort(-1).values)


def ours(config: dict, prompt: list[int], further: list[int], steps: int) -> tuple[dict, dict[str, Stored], dict]:
    """(figures, our weights in host memory, {way: (logits, choices)})."""
    spec = spec_from_config(config)
    plan = solve("r1-slice", config, spec, load_machine("this"), Ask("fp8_block", len(prompt) + 512, 1))
    assert list(plan.predicted.devices) == ["cuda:0"], plan.predicted.devices
    memory = Memory(plan, spec)
    with torch.inference_mode():
        mine = Slice(spec, plan, memory, DTYPE[plan.compute_dtype])
        randomise(memory.held)
        figures = timed(mine, plan, prompt, steps)
        replayed = mine.rows(prompt, further)
        mine.runner.part.graphs = None
        with noting(1 + len(further)) as choices:
            plain = mine.rows(prompt, further)
        found = {"ours": (plain, choices[0])}
        figures["graphs_differ_by"] = float((replayed - plain).norm() / plain.norm())
        del mine
        found["float32"] = reference(spec, plan, memory, prompt, further)
    held = {n: Stored(w.scheme, w.shape, {k: v.data.cpu() for k, v in w.parts.items()}) for n, w in memory.held.items()}
    return figures, held, found


def timed(mine: Slice, plan: Plan, prompt: list[int], steps: int) -> dict:
    """Milliseconds of the prompt and of one step behind it, and memory."""
    head = mine.decoder.logits
    return {
        "prefill_ms": milliseconds(lambda: head(mine.hidden(prompt, 0, True)[-1:]), 3),
        "decode_ms": milliseconds(lambda: head(mine.hidden([*prompt, 7], len(prompt), False)), steps),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "predicted_bytes": plan.predicted.devices["cuda:0"].bytes.model_dump(),
        "decode_bytes": plan.predicted.decode_bytes_per_token,
    }


def reference(spec: ModelSpec, plan: Plan, memory: Memory, prompt: list[int], further: list[int]) -> tuple:
    """(logits, choices) of the ops' reference bodies in float32, in one pass over all tokens."""
    wide = plan.model_copy(update={"kv": plan.kv.model_copy(update={"dtype": "float32"})})
    for stored in memory.held.values():
        stored.kernels.clear()
    with force_reference(), noting(1 + len(further)) as choices:
        logits = Slice(spec, wide, memory, torch.float32).whole(prompt, further)
    return logits, choices[0]


def compared(way: tuple[torch.Tensor, torch.Tensor], truth: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """How far logits [N, vocab] are from the truth's, over tokens: all, and those that met the same experts."""
    error = ((way[0] - truth[0]).norm(dim=-1) / truth[0].norm(dim=-1)).cpu()
    same = (way[1] == truth[1]).flatten(1).all(1).cpu()
    both = way[0].argmax(-1).eq(truth[0].argmax(-1)).float().mean()

    def spread(values: torch.Tensor) -> list[float]:
        return [float(values.median()), float(values.max())] if len(values) else []

    return {
        "tokens": len(error),
        "same_experts": int(same.sum()),
        "choices_shared": float(shared(way[1], truth[1])),
        "same_first_choice": float(both),
        "relative_error_median_max": {
            "all": spread(error),
            "same_experts": spread(error[same]),
            "other_experts": spread(error[~same]),
        },
        "by_token": [[round(float(e), 4), bool(s)] for e, s in zip(error, same, strict=True)],
    }


def shared(mine: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Share of the choices [N, layers, k] that are also the truth's."""
    return (mine[..., :, None] == truth[..., None, :]).any(-1).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--further", type=int, default=64, help="tokens after the prompt whose logits are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help="ours only")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = slice_config(args.config)
    prompt = torch.randint(0, config["vocab_size"], (args.prompt,)).tolist()
    further = torch.randint(0, config["vocab_size"], (args.further,)).tolist()
    bandwidth = read_bandwidth()
    mine, held, found = ours(config, prompt, further, args.steps)
    floor = mine["decode_bytes"] / bandwidth * 1e3
    report = {"gpu": torch.cuda.get_device_name(), "read_bytes_per_s": bandwidth, "floor_ms": floor, "ours": mine}
    if not args.alone:
        gc.collect()
        torch.cuda.empty_cache()
        twin = Twin(config, held)
        report["transformers"] = twin.times(prompt, args.steps)
        found["transformers"] = twin.logits(prompt, further)
    report["against_float32"] = {n: compared(w, found["float32"]) for n, w in found.items() if n != "float32"}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads."""
    data = torch.ones(1 << 30, device="cuda")
    return data.nbytes / (milliseconds(data.sum, 5)["median"] / 1e3)


if __name__ == "__main__":
    main()
