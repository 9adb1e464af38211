"""transformers' DeepseekV3 on a GPU with our weights, for gpu_slice.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from undistilled.scheme import Stored


def milliseconds(run: Callable[[], object], repeat: int) -> dict[str, float]:
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


class Twin:
    """transformers on the same weights, dequantised to BF16."""

    def __init__(self, config: dict, held: dict[str, Stored]) -> None:
        import transformers

        plain = {k: v for k, v in config.items() if k != "quantization_config"} | {"torch_dtype": "bfloat16"}
        settings = transformers.AutoConfig.for_model(**plain)
        with torch.device("meta"):
            model = transformers.DeepseekV3ForCausalLM(settings).to(torch.bfloat16)
        self.model = model.to_empty(device="cuda").eval()
        fill(self.model, held)
        rotary = self.model.model.rotary_emb
        fresh = type(rotary)(settings)
        rotary.inv_freq = fresh.inv_freq.cuda()
        rotary.original_inv_freq = fresh.original_inv_freq.cuda()
        self.chosen: list[torch.Tensor] = []
        for layer in self.model.model.layers[config["first_k_dense_replace"] :]:
            layer.mlp.experts.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: object, positional: tuple, named: dict) -> None:
        """Keeps which experts were chosen: the argument of the experts that holds whole numbers."""
        ids = [a for a in (*positional, *named.values()) if isinstance(a, torch.Tensor) and not a.is_floating_point()]
        self.chosen.append(ids[0].reshape(-1, ids[0].shape[-1])[-1])

    @torch.inference_mode()
    def logits(self, prompt: list[int], further: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [1 + N, vocab] after the prompt and after each further token, and the experts chosen there
        [1 + N, MoE layers, k], sorted."""
        self.chosen.clear()
        ids = torch.tensor([prompt], device="cuda")
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        found = [out.logits[0, -1].float()]
        for token in further:
            one = torch.tensor([[token]], device="cuda")
            out = self.model(one, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[0, -1].float())
        chosen = torch.stack(self.chosen).unflatten(0, (len(found), -1)).sort(-1).values
        return torch.stack(found), chosen

    @torch.inference_mode()
    def times(self, prompt: list[int], steps: int) -> dict:
        """Milliseconds for a prompt, and for a decode step behind it."""
        ids, token = torch.tensor([prompt], device="cuda"), torch.tensor([[7]], device="cuda")
        cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        return {
            "decode_ms": milliseconds(lambda: self.model(token, past_key_values=cache, use_cache=True), steps),
            "prefill_ms": milliseconds(lambda: self.model(ids, use_cache=True, logits_to_keep=1), 3),
        }


def fill(model: torch.nn.Module, held: dict[str, Stored]) -> None:
    """Copy our weights, made dense one by one, into transformers' fused parameters. Ours wait in host memory."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, stored in held.items():
            if "*" not in name:
                state[name].copy_(stored.parts["values"] if "bias" in name else dense(stored))
                continue
            at, which = name.split(".*.")
            width = stored.shape[1]
            for expert in range(stored.shape[0]):
                one = dense(stored.expert(expert))
                if which.startswith("down"):
                    state[f"{at}.down_proj"][expert].copy_(one)
                else:
                    half = slice(0, width) if which.startswith("gate") else slice(width, 2 * width)
                    state[f"{at}.gate_up_proj"][expert, half].copy_(one)


def dense(stored: Stored) -> torch.Tensor:
    """BF16 on the GPU, of parts in host memory."""
    there = {k: v.cuda() for k, v in stored.parts.items()}
    return Stored(stored.scheme, stored.shape, there).dense(torch.bfloat16)
