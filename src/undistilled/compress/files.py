"""Files that are whole or not there, and folders that one run at a time works in."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..checkpoint.writer import DiskFull
from ..errors import UsageError

LOCK = "lock"


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write what gets the name `file` when the block ends well. DiskFull where it cannot be written."""
    part = file.with_name(file.name + ".part")
    try:
        yield part
        part.replace(file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        said = error.strerror if isinstance(error, OSError) else error
        raise DiskFull(
            f"Cannot write {file}: {said}.", "Make room and give the same command again: it goes on."
        ) from None


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_room(folder: Path, need: int, what: str) -> None:
    """DiskFull, before anything is computed, where the disk of `folder` has less than `need` bytes for `what`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise DiskFull(
            f"{what} takes {_size(need)}; {folder} has {_size(free)} free.",
            "Make room and give the same command again, or name a folder on another disk.",
        )


def keep(file: Path, value: object) -> None:
    """Write JSON; the file has its name when it is whole."""
    with whole(file) as part:
        part.write_text(json.dumps(value))


def kept(file: Path) -> Any:
    """What `keep` wrote. UsageError where it is something else."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UsageError(f"{file} is not what a run left there.", f"Remove {file.parent}.") from None


@contextmanager
def alone(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there; where one is in it, UsageError or wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}.", "Name a folder.") from None
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise UsageError(f"{folder} is in use by another run.", "Wait for it, or name another folder.") from None
        yield
