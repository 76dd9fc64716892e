"""The loss over the steps, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from hatrack_trainer.log import LogEntry, losses

SUFFIXES = (".svg", ".png")
SMOOTHED = 20  # parts of a run: the line's mean goes over as many steps as one of them has
# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = {"loss": "#56B4E9", "smoothed": "#0072B2", "eval_loss": "#D55E00"}


def draw_losses(entries: Sequence[LogEntry], stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png; equal entries give equal files."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    train, evaluation = losses(entries, "loss"), losses(entries, "eval_loss")
    if train:
        steps = [step for step, _ in train]
        axes.plot(steps, [loss for _, loss in train], color=COLOURS["loss"], linewidth=1, label="each step")
        axes.plot(steps, smoothed([loss for _, loss in train]), color=COLOURS["smoothed"], label="mean")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color=COLOURS["eval_loss"], label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    files = [stem.with_suffix(suffix) for suffix in SUFFIXES]
    with mpl.rc_context({"svg.hashsalt": "hatrack"}):
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over the last values at each place."""
    width = max(1, len(values) // SMOOTHED)
    return [sum(part) / len(part) for n in range(len(values)) if (part := values[max(0, n + 1 - width) : n + 1])]
