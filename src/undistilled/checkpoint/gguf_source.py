"""A GGUF model, in one file or split, seen as a Hugging Face checkpoint: same names, layouts and configuration."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from undistilled.checkpoint.gguf import GGUFFile, GGUFTensor
from undistilled.checkpoint.gguf_names import block_of, hf_config, hf_names, llama3_rope, unpermute_rows
from undistilled.checkpoint.gguf_types import quantised_parts
from undistilled.errors import BadArtefact

MAX_FILES = 1024
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Weight:
    """Where one Hugging Face weight lies: a tensor, or one expert of it, or `rows` of that; or two tensors
    (`second`) to be joined into kv_b_proj. `heads` is set if the rows are permuted."""

    tensor: GGUFTensor
    expert: int | None = None
    rows: slice | None = None
    heads: int | None = None
    second: GGUFTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape if self.expert is None else self.tensor.shape[1:]
        return shape if self.rows is None else (self.rows.stop - self.rows.start, *shape[1:])


def split_files(first: GGUFFile) -> list[GGUFFile]:
    """All files of a split model (llama.cpp's NAME-00001-of-00009.gguf), in order, given any one of them."""
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_FILES:
        raise BadArtefact(f"{first.path}: metadata 'split.count' is {str(count)[:40]!r}.", "The file is damaged.")
    if count <= 1:
        return [first]
    match = _SPLIT.fullmatch(first.path.name)
    if not match or int(match[3]) != count:
        raise BadArtefact(
            f"{first.path}: is part of a model in {count} files, but its name does not say which part.",
            f"Name the parts NAME-00001-of-{count:05d}.gguf and so on.",
        )
    paths = [first.path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    files = [first if path == first.path else GGUFFile(path) for path in paths]
    for number, file in enumerate(files):
        if file.metadata.get("split.no") != number or file.metadata.get("split.count") != count:
            raise BadArtefact(f"{file.path}: is not part {number + 1} of {count}.", "Fetch the parts again.")
    total = files[0].metadata.get("split.tensors.count")
    if total is not None and total != sum(len(file.tensors) for file in files):
        raise BadArtefact(f"{first.path}: the parts do not hold {total} tensors in all.", "Fetch the parts again.")
    return files


class GGUFSource:
    """`config` is Hugging Face style. Weights read as the released checkpoint lays them out: q and k rows in
    the rotate-half order, kv_b_proj in one piece, a name per expert. Raises BadArtefact for what is wrong."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = split_files(GGUFFile(self.path))
        self.metadata: dict[str, Any] = self.files[0].metadata
        self._architecture = self.metadata.get("general.architecture")
        self._file_of: dict[str, GGUFFile] = {}
        tensors = self._gather()
        self.config: dict[str, Any] = hf_config(self.metadata, tensors, str(self.path))
        self._add_llama3_rope(tensors)
        self._weights: dict[str, _Weight] = {}
        for tensor in tensors.values():
            self._map(tensor, tensors)

    def _gather(self) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        for file in self.files:
            for name, tensor in file.tensors.items():
                if name in tensors:
                    raise BadArtefact(f"{file.path}: tensor {name!r} is in another part too.", "Fetch the parts again.")
                tensors[name], self._file_of[name] = tensor, file
        return tensors

    def _add_llama3_rope(self, tensors: dict[str, GGUFTensor]) -> None:
        if "rope_freqs.weight" not in tensors or self.config["model_type"] != "llama":
            return
        factors = self._read_tensor(tensors["rope_freqs.weight"], torch.float32)
        try:
            scaling = llama3_rope(factors.view(-1), self.config["rope_theta"], self.config["head_dim"])
        except ValueError as error:
            self._fail(tensors["rope_freqs.weight"], str(error))
        self.config["rope_scaling"] = None if scaling["factor"] == 1 else scaling

    def _map(self, tensor: GGUFTensor, tensors: dict[str, GGUFTensor]) -> None:
        layer = block_of(tensor.name)
        layers = self.config["num_hidden_layers"]
        blocks = layers + self.config["gguf_nextn_layers"]
        if layer is not None and layer >= blocks:
            self._fail(tensor, f"belongs to layer {layer}, but the model has {blocks} layers")
        if layer is not None and layer >= layers:
            # Layers after the model's own predict further tokens (MTP); the model runs whole without them.
            return
        names = hf_names(tensor.name)
        if names is None:
            self._fail(tensor, "has a name that this architecture does not use")
        if tensor.name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
            self._map_split(tensor, tensors, names[0])
        elif names and "*" in names[0]:
            self._map_experts(tensor, names)
        elif names:
            self._weights[names[0]] = _Weight(tensor, heads=self._permuted_heads(tensor))

    def _map_experts(self, tensor: GGUFTensor, names: tuple[str, ...]) -> None:
        experts = self.config.get("n_routed_experts")
        if len(tensor.shape) != 3 or tensor.shape[0] != experts or tensor.shape[1] % len(names):
            self._fail(tensor, f"has shape {tensor.shape}, which does not hold {experts} experts")
        height = tensor.shape[1] // len(names)
        for expert in range(experts):
            for index, name in enumerate(names):
                rows = None if len(names) == 1 else slice(index * height, (index + 1) * height)
                self._weights[name.replace("*", str(expert))] = _Weight(tensor, expert, rows)

    def _map_split(self, tensor: GGUFTensor, tensors: dict[str, GGUFTensor], name: str) -> None:
        stem = tensor.name[: -len("k_b.weight")]
        if f"{stem}kv_b.weight" in tensors:
            return
        k, v = tensors.get(f"{stem}k_b.weight"), tensors.get(f"{stem}v_b.weight")
        if k is None or v is None:
            self._fail(tensor, "lacks its counterpart (attn_k_b and attn_v_b come together)")
        heads, rank = self.config["num_attention_heads"], self.config.get("kv_lora_rank", 0)
        sizes = ((k, self.config.get("qk_nope_head_dim", 0)), (v, self.config.get("v_head_dim", 0)))
        for part, width in sizes:
            if prod(part.shape) != heads * rank * width:
                self._fail(part, f"has shape {part.shape}, not {heads} heads of {width} by {rank}")
        self._weights[name] = _Weight(k, second=v)

    def _permuted_heads(self, tensor: GGUFTensor) -> int | None:
        if self._architecture != "llama":
            return None
        part = tensor.name.split(".")[-2]
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
        if key is None:
            return None
        heads = self.config[key]
        if tensor.shape[0] % (2 * heads):
            self._fail(tensor, f"has {tensor.shape[0]} rows, which do not divide into {heads} heads")
        return heads

    def _fail(self, tensor: GGUFTensor, what: str) -> NoReturn:
        file = self._file_of[tensor.name]
        raise BadArtefact(f"{file.path}: tensor {tensor.name!r} {what}.", "The file is damaged or not supported.")

    def _find(self, name: str) -> _Weight:
        if name not in self._weights:
            raise BadArtefact(f"{self.path}: has no weight {name!r}.", "The model file is incomplete.")
        return self._weights[name]

    def names(self) -> Iterator[str]:
        """Hugging Face weight names, in the file's order."""
        return iter(self._weights)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def dtype(self, name: str) -> str:
        """The stored type, such as "Q4_1"; "A+B" for a weight joined from two types."""
        weight = self._find(name)
        kinds = [weight.tensor.type] + ([weight.second.type] if weight.second else [])
        return "+".join(dict.fromkeys(kinds))

    def shape(self, name: str) -> tuple[int, ...]:
        """The released weight's shape, (out, in) for a matrix."""
        weight = self._find(name)
        if weight.second is None:
            return weight.shape
        config = self.config
        width = config["qk_nope_head_dim"] + config["v_head_dim"]
        return config["num_attention_heads"] * width, config["kv_lora_rank"]

    def nbytes(self, name: str) -> int:
        """Bytes that the weight takes in the file."""
        weight = self._find(name)
        if weight.second is not None:
            return weight.tensor.nbytes + weight.second.nbytes
        return weight.tensor.nbytes * prod(weight.shape) // prod(weight.tensor.shape)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The released layout, dequantised."""
        weight = self._find(name)
        if weight.second is not None:
            return self._join(weight.tensor, weight.second, dtype)
        if weight.expert is None:
            values = self._read_tensor(weight.tensor, dtype)
            return values if weight.heads is None else values[unpermute_rows(values.shape[0], weight.heads)]
        one = slice(weight.expert, weight.expert + 1)
        values = self._read_tensor(weight.tensor, dtype, one)[0]
        return values if weight.rows is None else values[weight.rows].clone()

    def plain_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Rows [start, stop) without touching the others; None where the layout has to be put together first."""
        weight = self._find(name)
        if weight.second is not None or weight.expert is not None or weight.heads is not None:
            return None
        return self._read_tensor(weight.tensor, dtype, slice(start, stop))

    def _read_tensor(self, tensor: GGUFTensor, dtype: torch.dtype, rows: slice | None = None) -> torch.Tensor:
        return self._file_of[tensor.name].read(tensor.name, dtype, rows)

    def _join(self, k_b: GGUFTensor, v_b: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
        """k_b [heads, rank, nope], which the converter transposed, and v_b [heads, v, rank] -> [heads * (nope + v),
        rank]."""
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        k = self._read_tensor(k_b, dtype).view(heads, rank, -1).transpose(1, 2)
        v = self._read_tensor(v_b, dtype).view(heads, -1, rank)
        return torch.cat([k, v], dim=1).reshape(-1, rank)

    def splits(self, name: str) -> bool:
        """Whether `quantised` may have an answer: a matrix that lies in one piece."""
        weight = self._find(name)
        return weight.second is None and len(weight.shape) == 2

    def quantised(self, name: str) -> tuple[str, dict[str, torch.Tensor]] | None:
        """("int4", values, scales, mins) or ("int8", values, scales) with the stored numbers, rows in the
        released order; None where the stored type has no exact form, or the weight is not a matrix."""
        weight = self._find(name)
        if weight.second is not None or len(weight.shape) != 2:
            return None
        raw = self._file_of[weight.tensor.name].raw(weight.tensor.name)
        if weight.expert is not None:
            raw = raw.reshape(weight.tensor.shape[0], -1)[weight.expert]
        if weight.rows is not None:
            raw = raw.reshape(weight.tensor.shape[1], -1)[weight.rows]
        found = quantised_parts(weight.tensor.kind, raw, weight.shape[0])
        if found is None:
            return None
        parts = {key: torch.from_numpy(part) for key, part in found[1].items()}
        if weight.heads is not None:
            order = unpermute_rows(weight.shape[0], weight.heads)
            parts = {key: part[order] for key, part in parts.items()}
        return found[0], parts
