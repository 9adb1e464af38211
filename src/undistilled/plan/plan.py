"""The plan: a frozen table that says what goes where and what it will cost. Everything downstream reads it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BadArtefact, UsageError
from .mesh import Mesh

MAKE = "Make one with `undistilled plan MODEL -o FILE`."


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Row(Frozen):
    """One weight, or a range of experts: its scheme and home. Bytes are what it takes in memory."""

    name: str
    role: str
    layer: int | None
    experts: tuple[int, int] | None  # [first, past the last)
    shape: tuple[int, ...]  # of one weight: (out, in) or (in,)
    tensors: int  # how many the released checkpoint has for it
    scheme: str
    store: str  # device that keeps it, or "unloaded"; of a plan for ranks, its stage: "stage:0"
    compute: str
    nbytes: int = Field(ge=0)


class Kv(Frozen):
    """The cache: `blocks` of `block_size` tokens. A token takes `bytes_per_token` over all layers."""

    dtype: Literal["bfloat16", "float16", "float32"]
    block_size: int = Field(gt=0, le=4096)
    blocks: int = Field(gt=0)
    bytes_per_token: int = Field(gt=0)


class Limits(Frozen):
    """What a run may ask for: tokens in a context, requests at once, tokens in a prompt chunk."""

    context: int = Field(gt=0)
    batch: int = Field(gt=0)
    chunk: int = Field(gt=0)


class Bytes(Frozen):
    """Bytes on one device. `runtime` is the interpreter, the libraries and buffers of theirs."""

    weights: int
    kv: int
    activations: int
    runtime: int
    total: int


class DevicePrediction(Frozen):
    bytes: Bytes
    available: int = Field(ge=0)  # bytes that a run may use there
    fits: bool


class RankPrediction(Frozen):
    """What one rank's process holds, and how much of a step it computes and talks."""

    device: str
    bytes: Bytes
    collective_s: float = Field(default=0.0, ge=0)  # of a decode step of the plan's batch, over all of its layers


class ContextPrediction(Frozen):
    """Bytes of each device if every one of the batch's requests were this long."""

    context: int = Field(gt=0)
    kv_bytes: dict[str, int]
    total_bytes: dict[str, int]
    fits: bool


class Predicted(Frozen):
    """Speeds are for the plan's batch: all requests together. `basis` says where the ceilings come from."""

    devices: dict[str, DevicePrediction]  # several ranks may share one
    ranks: list[RankPrediction] = []
    contexts: list[ContextPrediction] = Field(min_length=1)
    prefill_tokens_per_s: float = Field(gt=0)
    decode_tokens_per_s: float = Field(gt=0)
    decode_bytes_per_token: int
    basis: str


class Plan(Frozen):
    version: Literal[1] = 1
    model: str
    model_hash: str  # of the config: what the plan was made for
    architecture: str
    machine: str
    scheme: str  # the recipe that every row follows, else MIXED
    compute_dtype: Literal["float32", "bfloat16", "float16", "int8", "int16"]  # of products; activations: below
    parameters: int
    active_parameters: int
    tensors: int
    rows: list[Row]
    kv: Kv
    limits: Limits
    mesh: Mesh | None = None  # None: one process
    policy: Literal["none"] = "none"
    predicted: Predicted
    fits: bool
    advice: str = ""  # where it does not fit: what would
    notes: list[str] = []

    @property
    def activation_dtype(self) -> str:
        """The dtype of the tensors between layers: on a CPU float32, whatever products round them to."""
        return "float32" if list(self.predicted.devices) == ["cpu"] else self.compute_dtype

    def on(self, rank: int, device: str) -> Plan:
        """The same, with what `rank` computes on called as its own process calls it."""
        assert self.mesh is not None
        devices = [*self.mesh.devices[:rank], device, *self.mesh.devices[rank + 1 :]]
        return self.model_copy(update={"mesh": self.mesh.model_copy(update={"devices": tuple(devices)})})

    def digest(self) -> str:
        """SHA-256 of the plan as written."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def write(self, file: Path) -> None:
        """Write as JSON; the name is only ever that of a whole file."""
        write_text(file, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def check_new(file: Path) -> None:
    """UsageError, before any work, where `file` exists, or would have no folder."""
    if file.exists():
        raise UsageError(f"{file} exists.", "Give another name, or remove it.")
    if not file.parent.is_dir():
        raise UsageError(f"Cannot write {file}: there is no folder {file.parent}.", "Make it first.")


def write_text(file: Path, text: str) -> None:
    """Write, so that the name is only ever that of a whole file."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UsageError(f"Cannot write {file}: {error.strerror}.", "Does the folder exist?") from None


def config_hash(config: dict[str, Any]) -> str:
    """What ties a plan to a model: SHA-256 over the config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def read_plan(file: Path) -> Plan:
    """A plan from a file; BadArtefact names the field or row that makes no sense."""
    try:
        return Plan.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", MAKE) from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise BadArtefact(f"{file} is no plan: it is not JSON.", MAKE) from None
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadArtefact(f"{file}: {where}: {first['msg']}.", "Was the plan edited?") from None
