"""A training run as a picture: losses, held-out answers by task, and how evenly experts are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def draw(log: Path, to: Path) -> None:
    """Read the lines of `log` (see train.Log) and write an SVG or PNG to `to`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    news, checks = [n for n in lines if "loss" in n], [n for n in lines if "exact" in n]
    figure, (losses, tasks, experts) = pyplot.subplots(3, 1, figsize=(9, 12), height_ratios=(3, 5, 2))
    _losses(losses, news)
    _tasks(tasks, checks)
    experts.plot([n["step"] for n in news], [n["busiest_expert"] for n in news], linewidth=0.7)
    experts.set(xlabel="step", ylabel="busiest expert,\ntimes its even share", ylim=(1, 4))
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    pyplot.close(figure)


def _losses(axes: Any, news: list[dict[str, Any]]) -> None:
    steps = [n["step"] for n in news]
    axes.plot(steps, [n["loss"] for n in news], linewidth=0.7, label="next token")
    axes.plot(steps, [n["second_loss"] for n in news], linewidth=0.7, label="the token after (MTP)")
    axes.set(yscale="log", ylabel="training loss, nats")
    axes.legend(frameon=False)


def _tasks(axes: Any, checks: list[dict[str, Any]]) -> None:
    steps = [c["step"] for c in checks]
    for at, task in enumerate(sorted(checks[-1]["exact"])):
        style = ("-", "--", ":")[at // 10]
        axes.plot(steps, [100 * c["exact"][task] for c in checks], style, linewidth=1, label=task)
    axes.plot(steps, [100 * c["exact_mean"] for c in checks], color="black", linewidth=2, label="mean")
    axes.set(ylabel="held-out answers right token by token, %", ylim=(0, 101))
    axes.legend(fontsize=7, ncols=3, frameon=False)
