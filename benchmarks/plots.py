"""Draws what the documents in a folder say: a figure for each, and all numbers as tables.

    python benchmarks/plots.py                 # docs/benchmarks/*.json → *.svg and results.md
    python benchmarks/plots.py OTHER/FOLDER

Nothing is measured here, so figures and tables can't say what no document says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.rcsetup import cycler
from setting import HERE, Document
from tables import as_markdown

FOLDER = HERE.parent / "docs" / "benchmarks"
# Okabe and Ito's palette: told apart by colour-blind readers too. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "hatrack",  # equal documents give equal files
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
}
NAMES = {"hatrack": "Hatrack", "peft": "transformers + PEFT", "vllm": "vLLM"}

Series = dict[str, list[float]]
Draw = Callable[[Axes, Document], None]


def main() -> None:
    """Draws every document of the folder and writes its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    documents = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    figures = {name: draw(document, folder / name) for name, document in documents.items()}
    (folder / "results.md").write_text(as_markdown(documents, figures))


def draw(document: Document, stem: Path) -> list[str]:
    """All figures of one document; the names of their files."""
    files = []
    for suffix, draw_axes in FIGURES.get(document["benchmark"], {}).items():
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
            draw_axes(axes, document)
            figure.supxlabel(caption(document), fontsize=7, color="#555555")
            files.append(f"{stem.name}{suffix}.svg")
            figure.savefig(stem.with_name(files[-1]), metadata={"Date": None})
            plt.close(figure)
    return files


def caption(document: Document) -> str:
    """Where and with what it was measured."""
    machine, versions = document["machine"], document["versions"]
    hardware = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{document['shape']} on {hardware}; {document['date']}\n{packages}"


def decode_steps(axes: Axes, document: Document) -> None:
    """Milliseconds by case, a bar for each system."""
    cases = document["cases"]
    systems = [name for name in NAMES if name in cases[0]]
    grouped_bars(
        axes,
        [f"{case['rows']} x {case['distinct'] or 'base'}" for case in cases],
        {NAMES[name]: [case[name]["step_ms"] for case in cases] for name in systems},
    )
    axes.set(title="Decode step: lower is better", xlabel="rows x distinct adapters", ylabel="ms")


def throughput(axes: Axes, document: Document) -> None:
    """Tokens per second by phase."""
    phases = [phase for phase in document["phases"] if phase["rate"] is None]
    grouped_bars(axes, phase_names(phases), {"": [phase["tokens_per_s"] for phase in phases]})
    axes.set(title=f"Throughput, {document['registered']} adapters registered: higher is better", ylabel="tokens/s")


def first_token(axes: Axes, document: Document) -> None:
    """Percentiles of the time to the first token by phase."""
    phases = document["phases"]
    shares = {share: [phase["first_token_ms"][share] for phase in phases] for share in ("p50", "p95", "p99")}
    grouped_bars(axes, phase_names(phases), shares)
    axes.set(title="Time to first token: lower is better", ylabel="ms")


def phase_names(phases: Sequence[Document]) -> list[str]:
    """What the traffic was, in three lines."""
    loads = (f"{phase['rate']:.3g} per second" if phase["rate"] else f"{phase['clients']} clients" for phase in phases)
    return [
        f"{phase['name'].partition(',')[0]}\n{phase['popularity']}, {phase['adapters']}\n{load}"
        for phase, load in zip(phases, loads, strict=True)
    ]


def load_times(axes: Axes, document: Document) -> None:
    """Milliseconds to load one adapter by tier, median and worst."""
    tiers = document["tiers"]
    shares = {share: [tier["load_ms"][share] for tier in tiers] for share in ("p50", "p95", "max")}
    grouped_bars(axes, [tier["tier"] for tier in tiers], shares)
    size = document["adapter_bytes"] / 1e6
    axes.set(title=f"Loading one adapter of {size:.3g} MB: lower is better", xlabel="from", ylabel="ms")


def neighbour(axes: Axes, document: Document) -> None:
    """Milliseconds between the tokens of a completion while others' adapters are loaded."""
    tiers = document["tiers"]
    series = {
        f"{share}, {state}": [tier["neighbour"][state][share] for tier in tiers]
        for share in ("p95", "max")
        for state in ("quiet", "loads")
    }
    grouped_bars(axes, [tier["tier"] for tier in tiers], series)
    axes.set(title="A neighbour's inter-token time: lower is better", xlabel="loads from", ylabel="ms")


def grouped_bars(axes: Axes, groups: Sequence[str], series: Series) -> None:
    """A group of bars for each name, a bar for each series, its value over it."""
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        at = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(at, values, width, label=name)
        axes.bar_label(
            bars, labels=[f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values], fontsize=7
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    if len(series) > 1:
        axes.legend()


FIGURES: dict[str, dict[str, Draw]] = {
    "serving": {"": decode_steps},
    "many_adapters": {"": throughput, "_first_token": first_token},
    "adapter_loading": {"": load_times, "_neighbour": neighbour},
}

if __name__ == "__main__":
    main()
