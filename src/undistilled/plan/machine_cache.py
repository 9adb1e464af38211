"""Remembers what was measured on this machine, by a fingerprint of what would change it."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from ..errors import BadArtefact
from .hardware import Machine

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$UNDISTILLED_CACHE, else ~/.cache/undistilled (under $XDG_CACHE_HOME if set)."""
    named = os.environ.get("UNDISTILLED_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "undistilled"


def fingerprint(machine: Machine) -> str:
    """16 hex digits over models, cores, memory to the nearest GiB, instruction sets, and PyTorch's version."""
    parts = [machine.torch]
    for d in machine.devices:
        # a kernel's update moves the total by some MB
        parts += [d.name, d.model, str(d.cores), str(round(d.memory_bytes / 2**30)), *d.features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def cache_file(machine: Machine) -> Path:
    return cache_folder() / f"machine-{fingerprint(machine)}.json"


def remember(machine: Machine) -> Path:
    """Write the measured machine; the name is only ever that of a whole file."""
    file = cache_file(machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(machine.to_json())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return file


def remembered(machine: Machine) -> Machine:
    """The machine with the rates measured here before, if any; what is free stays as probed now."""
    file = cache_file(machine)
    try:
        before = Machine.from_json(file.read_text(), str(file))
    except FileNotFoundError:
        return machine
    except (OSError, UnicodeDecodeError, BadArtefact) as error:
        log.warning("%s: ignored: %s", file, error)
        return machine
    rates = {d.name: d.ceilings for d in before.devices}
    devices = tuple(d.model_copy(update={"ceilings": rates.get(d.name, d.ceilings)}) for d in machine.devices)
    disk = machine.disk
    if disk and before.disk and before.disk.path == disk.path:
        disk = disk.model_copy(update={"read_bytes_per_s": before.disk.read_bytes_per_s})
    return machine.model_copy(update={"devices": devices, "links": before.links, "disk": disk})
