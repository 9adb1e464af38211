"""A student as a checkpoint in R1's release format: FP8 blocks or BF16, sharded safetensors, an index, the config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import scheme as schemes
from ..checkpoint.safetensors import SCALE
from ..checkpoint.source import Source
from ..checkpoint.writer import shard_name, write_index
from ..model.spec import ModelSpec
from ..model.weights import weights
from ..scheme import Stored

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def tensors(spec: ModelSpec, named: dict[str, Stored], fp8: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint as the release stores it: linears FP8 or BF16, the router's bias float32.

    FP8 is made from the BF16 values, so that the one checkpoint is the other, compressed.
    """
    for weight in weights(spec):
        values = named[weight.name].parts["values"].detach().cpu()
        for at, name in enumerate(weight.tensor_names):
            one = values[at] if weight.experts else values
            if weight.role == "router_bias":
                yield name, one.float()
            elif fp8 and weight.is_linear:
                parts = schemes.get("fp8_block").compress(one.bfloat16())
                yield name, parts["values"]
                yield name + SCALE, parts["scales"]
            else:
                yield name, one.bfloat16()


def read(source: Source, spec: ModelSpec) -> dict[str, Stored]:
    """A checkpoint's weights in memory, by name, for `export` to write in another format."""
    named = {}
    for weight in weights(spec):
        values = [source.dense(name, 0, weight.shape[0]) for name in weight.tensor_names]
        stacked = torch.stack(values) if weight.experts else values[0]
        named[weight.name] = Stored(schemes.get("fp32"), weight.full_shape, {"values": stacked})
    return named


def export(
    spec: ModelSpec, config: dict[str, Any], named: dict[str, Stored], folder: Path, *, fp8: bool, shard: int = 14 << 20
) -> None:
    """Write weights, index and config.json to `folder`, in files of at most `shard` bytes of data."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room, total = shard, 0
    for name, tensor in tensors(spec, named, fp8):
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard
        shards[-1][name] = tensor.clone(memory_format=torch.contiguous_format)  # no two names share memory
        room, total = room - tensor.nbytes, total + tensor.nbytes
    where: dict[str, str] = {}
    for at, content in enumerate(shards, 1):
        file = shard_name(at, len(shards))
        save_file(content, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(content, file)
    write_index(folder, where, total, config | ({"quantization_config": FP8} if fp8 else {}))
