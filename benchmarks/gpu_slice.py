"""An R1-wide slice (one dense and two MoE layers, FP8 blocks, random weights) on one GPU, beside transformers in BF16.

    PYTHONPATH=src python benchmarks/gpu_slice.py CONFIG.json [--prompt 4096] [--json OUT] [--alone]

Prints milliseconds a decode step and for the prefill, each beside the time that the bytes touched would take
at the measured memory bandwidth, and how far our logits are from transformers' on the same weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path

import torch

from undistilled.generate.runner import Runner
from undistilled.load.build import DTYPE, Memory
from undistilled.model.decoder import Decoder
from undistilled.model.spec import spec_from_config
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work
from undistilled.scheme import Stored


def slice_config(path: Path) -> dict:
    """R1's config with one dense and two MoE layers and no MTP layer."""
    config = json.loads(path.read_text())
    return config | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


def randomise(memory: Memory) -> None:
    """Random weights, in place: FP8 values as a standard normal rounded, scales that keep activations tame."""
    for name, stored in memory.held.items():
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


def milliseconds(run, repeat: int) -> dict[str, float]:
    """Median, minimum and maximum over `repeat` calls, by device events, after two warm-ups."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ours(
    config: dict, prompt: list[int], steps: int, alone: bool
) -> tuple[dict, dict[str, Stored], torch.Tensor, torch.Tensor]:
    """(figures, our weights in host memory, logits after the prompt, logits after one more token)."""
    spec = spec_from_config(config)
    plan = solve("r1-slice", config, spec, load_machine("this"), Ask("fp8_block", len(prompt) + 256, 1))
    assert list(plan.predicted.devices) == ["cuda:0"], plan.predicted.devices
    memory = Memory(plan)
    with torch.inference_mode():
        decoder = Decoder(memory, spec, DTYPE[plan.compute_dtype])
        randomise(memory)
        runner = Runner(decoder, plan)
        tokens = [*prompt, 7]
        sequence = Sequence(Request("r", prompt, Sampling()), tokens, list(range(plan.kv.blocks)))
        whole, one = Work(sequence, 0, len(prompt)), Work(sequence, len(prompt), len(tokens))

        def run(work: Work, prefill: bool) -> torch.Tensor:
            return decoder.logits(runner.hidden([work], prefill)[-1:])[0]

        after_prompt, after_one = run(whole, True), run(one, False)
        figures = {
            "prefill_ms": milliseconds(lambda: run(whole, True), 3),
            "decode_ms": milliseconds(lambda: run(one, False), steps),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
            "predicted_bytes": plan.predicted.devices["cuda:0"].bytes.model_dump(),
            "decode_bytes": plan.predicted.decode_bytes_per_token,
        }
    if alone:
        return figures, {}, after_prompt, after_one
    held = {n: Stored(w.scheme, w.shape, {k: v.data.cpu() for k, v in w.parts.items()}) for n, w in memory.held.items()}
    return figures, held, after_prompt, after_one


def theirs(
    config: dict, held: dict[str, Stored], prompt: list[int], steps: int
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """transformers on the same weights, dequantised to BF16."""
    import transformers

    plain = {k: v for k, v in config.items() if k != "quantization_config"} | {"torch_dtype": "bfloat16"}
    settings = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(settings).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    fill_twin(model, held)
    rotary = model.model.rotary_emb
    fresh = type(rotary)(settings)
    rotary.inv_freq = fresh.inv_freq.cuda()
    rotary.original_inv_freq = fresh.original_inv_freq.cuda()
    with torch.inference_mode():
        ids = torch.tensor([prompt], device="cuda")
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, torch.tensor([[7]], device="cuda")
        second = model(token, past_key_values=cache, use_cache=True).logits[0, -1]

        def step() -> None:
            model(token, past_key_values=cache, use_cache=True)

        figures = {
            "decode_ms": milliseconds(step, steps),
            "prefill_ms": milliseconds(lambda: model(ids, use_cache=True, logits_to_keep=1), 3),
        }
    return figures, out.logits[0, -1].float(), second.float()


def on_gpu(stored: Stored) -> Stored:
    return Stored(stored.scheme, stored.shape, {k: v.cuda() for k, v in stored.parts.items()})


def fill_twin(model, held: dict[str, Stored]) -> None:
    """Copy our weights, made dense one by one, into transformers' fused parameters. Ours wait in host memory."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, stored in held.items():
            dense = lambda s=stored, e=None: on_gpu(s if e is None else s.expert(e)).dense(torch.bfloat16)  # noqa: E731
            if "*" not in name:
                state[name].copy_(dense() if "bias" not in name else stored.parts["values"])
                continue
            at, which = name.split(".*.")
            width = stored.shape[1]
            for expert in range(stored.shape[0]):
                if which.startswith("down"):
                    state[f"{at}.down_proj"][expert].copy_(dense(e=expert))
                else:
                    half = slice(0, width) if which.startswith("gate") else slice(width, 2 * width)
                    state[f"{at}.gate_up_proj"][expert, half].copy_(dense(e=expert))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help="ours only")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = slice_config(args.config)
    prompt = torch.randint(0, config["vocab_size"], (args.prompt,)).tolist()
    bandwidth = read_bandwidth()
    mine, held, first, second = ours(config, prompt, args.steps, args.alone)
    floor = mine["decode_bytes"] / bandwidth * 1e3
    report = {"gpu": torch.cuda.get_device_name(), "read_bytes_per_s": bandwidth, "floor_ms": floor, "ours": mine}
    print(json.dumps(report, indent=1), flush=True)
    if args.alone:
        return
    gc.collect()
    torch.cuda.empty_cache()
    other, their_first, their_second = theirs(config, held, prompt, args.steps)
    report["transformers"] = other
    report["relative_error"] = {
        "prefill": float((first - their_first).norm() / their_first.norm()),
        "decode": float((second - their_second).norm() / their_second.norm()),
    }
    report["same_first_choice"] = [
        bool(first.argmax() == their_first.argmax()),
        bool(second.argmax() == their_second.argmax()),
    ]
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads."""
    data = torch.ones(1 << 30, device="cuda")
    return data.nbytes / (milliseconds(data.sum, 5)["median"] / 1e3)


if __name__ == "__main__":
    main()
