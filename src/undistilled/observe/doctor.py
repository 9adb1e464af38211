"""What this machine is, how fast, and which kernel serves each scheme on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import __version__
from .. import scheme as schemes
from ..plan.hardware import describe, known_machines, load_machine
from ..plan.recipes import INTEGERS, products_of

BLOCKS = schemes.get("tiles16x32-2x1-3x1-4x1")  # stands for dynamic blocks of any shape


def examine(
    measure: bool = False, links: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The machine, its ceilings, the presets, and a row for each scheme and device: kernel and reason."""
    import torch

    from ..ops.cpu import native

    machine = load_machine("this")
    if measure:
        from ..plan.measure import measure as run

        machine = run(machine, progress=progress or (lambda _: None))
    if links:
        from ..parallel.links import measure_links
        from ..plan.machine_cache import remember

        machine = machine.model_copy(update={"links": measure_links(machine, progress or (lambda _: None))})
        remember(machine)
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": machine.to_dict(),
        "rows": describe(machine),
        "presets": known_machines(),
        "native_kernels": build.name if (build := native.build()) else "",
        "native_tiles": native.tiles(),
        "native_why_missing": native.why_missing(),
        "kernels": [row for d in machine.devices for row in kernels(d.kind)],
    }


def kernels(kind: str) -> list[dict[str, str]]:
    """Which kernel each scheme's linears resolve to on a kind of device, asked of the registry itself.

    On a CPU a scheme has a row for products of BF16 and of integers too, where it has them; `products` says which.
    """
    import torch

    from ..ops import triton as cuda
    from ..ops.cpu import native
    from ..ops.linear import linear

    if kind == "cuda" and not torch.cuda.is_available():
        return []
    rows = []
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    rounding = ("bfloat16", *INTEGERS) if native.rounds() else INTEGERS
    for name, scheme in {**schemes.SCHEMES, "dynamic blocks": BLOCKS}.items():
        parts = {k: v.to(kind) for k, v in scheme.compress(torch.zeros(64, 64)).items()}
        rounded = (products_of("attention.o", scheme.name, kind, to) for to in rounding)
        for products in (None, *filter(None, rounded)):
            kernel = linear.resolve(schemes.Stored(scheme, (64, 64), parts, products), dtype)
            missing = kind == "cuda" and kernel is linear.reference and cuda.why_missing()
            why = f"no fast kernel: {missing}" if missing else kernel.why
            made = products or str(dtype).removeprefix("torch.")
            rows.append({"device": kind, "products": made, "scheme": name, "kernel": kernel.name, "why": why})
    return rows
