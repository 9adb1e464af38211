"""The limits that a container puts on this process: cgroup v2, v1, or both at once. Absent is None."""

from __future__ import annotations

from pathlib import Path

NO_LIMIT = 1 << 60  # bytes: v1 writes a number near 2^63 for none


def memory_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """(limit, bytes still free under it) of the tightest level, or None where no level sets a limit.

    File pages that the kernel can drop count as free.
    """
    rooms = []
    for folder in _levels(root, own, "memory"):
        limits = [_number(folder / f) for f in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((n for n in limits if n is not None and n < NO_LIMIT), default=None)
        used = _first(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None:
            held = max((used or 0) - _inactive_file(folder), 0)
            rooms.append((limit, max(limit - held, 0)))
    return min(rooms, key=lambda r: r[1]) if rooms else None


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that this process may use, or None where there is no quota."""
    quotas = []
    for folder in _levels(root, own, "cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _levels(root: Path, own: Path, controller: str) -> list[Path]:
    """The folders from this process's cgroup up to the mount, of either version that is mounted."""
    found: list[Path] = []
    for line in _text(own).splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            bases = [root, root / "unified"]
        elif controller in names.split(","):
            bases = [root / controller, root / names]
        else:
            continue
        for base in bases:
            inside = [p for p in path.split("/") if p not in ("", "..")]
            found += [base.joinpath(*inside[:n]) for n in range(len(inside), -1, -1)]
    return list(dict.fromkeys(folder for folder in found if folder.is_dir()))


def _inactive_file(folder: Path) -> int:
    stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    # v1 counts its own level only under `inactive_file` and the whole subtree, as `usage` does, under `total_`
    value = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _first(folder: Path, *names: str) -> int | None:
    return next((n for n in (_number(folder / name) for name in names) if n is not None), None)


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
