"""Files that are whole or not there, and folders that one run at a time works in."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError

LOCK = "lock"


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write what gets the name `file` when the block ends well."""
    part = file.with_name(file.name + ".part")
    yield part
    part.replace(file)


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
