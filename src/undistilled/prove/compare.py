"""Receipts side by side: what each form of a model costs in quality, beside its bytes, as rows and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadArtefact, UsageError
from .receipt import verify_receipt

PICTURES = (".png", ".svg")
PROVE = "Make one with `undistilled prove MODEL -o FILE`."
SAME = ("text", "tasks asked", "reasoning questions", "original")  # what must be one for figures to be compared


def read(file: Path) -> dict[str, Any]:
    """A receipt; BadArtefact where it is none, or where it was edited."""
    try:
        receipt = json.loads(file.read_text())
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", PROVE) from None
    except ValueError:
        raise BadArtefact(f"{file} is no receipt: it is not JSON.", PROVE) from None
    if not verify_receipt(receipt):
        raise BadArtefact(f"{file} is no receipt, or was edited since it was made.", PROVE)
    return receipt


def rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a receipt, smallest first. UsageError where two are not about the same questions."""
    receipts = {file: read(file) for file in files}
    first, *rest = receipts
    for file in rest:
        for what, one, other in zip(SAME, _about(receipts[first]), _about(receipts[file]), strict=True):
            if one != other:
                raise UsageError(f"{first} and {file} differ in their {what}.", "Prove both with the same options.")
    return sorted((_row(file, r) for file, r in receipts.items()), key=lambda row: row["bytes"])


def _about(receipt: dict[str, Any]) -> tuple[Any, ...]:
    suite, original = receipt["suite"], receipt["original"]
    return (
        receipt["text"]["sha256"],
        sorted(receipt["tasks"]),
        suite and suite["questions_sha256"],
        original.get("fingerprint") or original["digest"],
    )


def _row(file: Path, receipt: dict[str, Any]) -> dict[str, Any]:
    plan, suite, speed = receipt["plan"], receipt["suite"], receipt["speed"]["measured"]
    return {
        "name": file.stem,
        "scheme": plan["scheme"],
        "bytes": plan["bytes"],
        "bits_per_weight": plan["bits_per_weight"],
        "kl_nats": receipt["kl_nats"]["mean"],
        "kl_se": receipt["kl_nats"]["se"],
        "top1_agreement": receipt["top1_agreement"],
        "suite": suite["mean"]["plan"] if suite else None,
        "suite_original": suite["mean"]["original"] if suite else None,
        "decode_tokens_per_s": speed and speed["decode_tokens_per_s"]["median"],
    }


def check_picture(to: Path) -> None:
    """UsageError where `draw` could not write it for its name."""
    if to.suffix.lower() not in PICTURES:
        raise UsageError(f"{to} is no name of a picture.", f"End it in {' or '.join(PICTURES)}.")


def draw(found: list[dict[str, Any]], to: Path) -> None:
    """Divergence (and accuracy, where asked) over bytes, as SVG or PNG. UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("A picture needs matplotlib.", "Run `pip install 'undistilled[tune]'`.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = picture(found)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    pyplot.close(figure)


def picture(found: list[dict[str, Any]]) -> Any:
    """The figure of `draw`, for who closes it."""
    from matplotlib import pyplot

    asked = [row for row in found if row["suite"] is not None]
    figure, all_axes = pyplot.subplots(1, 1 + bool(asked), figsize=(6 * (1 + bool(asked)), 4.5), squeeze=False)
    _scatter(all_axes[0][0], found, "kl_nats", "KL divergence from the original, nats a token")
    all_axes[0][0].set_yscale("log")
    if asked:
        _scatter(all_axes[0][1], asked, "suite", "reasoning questions answered right")
        all_axes[0][1].axhline(asked[0]["suite_original"], color="grey", linewidth=0.8, label="original")
        all_axes[0][1].legend(frameon=False)
    figure.tight_layout()
    return figure


def _scatter(axes: Any, found: list[dict[str, Any]], key: str, label: str) -> None:
    sizes = [row["bytes"] / 1e6 for row in found]
    axes.scatter(sizes, [row[key] for row in found], s=18)
    for size, row in zip(sizes, found, strict=True):
        side, by = ("right", -3) if 2 * size > min(sizes) + max(sizes) else ("left", 3)  # names stay between the edges
        axes.annotate(row["name"], (size, row[key]), fontsize=7, ha=side, xytext=(by, 3), textcoords="offset points")
    axes.set(xlabel="weights, MB", ylabel=label)
