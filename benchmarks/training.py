"""Hatrack's trainer beside TRL and PEFT: the same NF4 base, LoRA, rows and steps, one system at a time.

    python benchmarks/training.py                            # TinyLlama-1.1B's shape
    python benchmarks/training.py --checkpointing --rows 8   # activations computed twice, in both
    python benchmarks/training.py --shape tiny               # a quick check; its figures mean nothing

Rows are random letters of 256 tokens. Every run is a process of its own, the systems take turns at going first, and
figures are medians over runs. A run's first step only warms up. The table goes to standard error; the last line of
standard output is one JSON document:
- `tokens_per_s`: over the steps after the first;
- `steps_peak_gb`: the most memory while those ran, `peak_gb`: since the start, loading the base included. On a CPU
  resident memory of the process, on a GPU what torch has allocated;
- `ratio`: Hatrack's figure over the other's. Bars: at least 0.95 of the throughput, at most 1.05 of the memory;
- `losses`: of the first run's steps; both systems must learn the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from setting import HERE, Document, as_document, device_options, make_inputs, options, print_document
from training_options import TOKENS
from workload import RANK

SYSTEMS = ("hatrack", "trl")
BARS = {"tokens_per_s": 0.95, "steps_peak_gb": 1.05, "peak_gb": 1.05}
DIFFERENCES = [
    "hatrack: the adapter in float32; trl: TRL rounds it to bfloat16 on a quantised base",
    "hatrack: embedding, norms and head as the checkpoint has them, bfloat16; trl: prepare_model_for_kbit_training "
    "makes them float32",
    "both: NF4 with double quantisation, computing in bfloat16, under autocast; transformers' choice of attention",
    "both: AdamW in 32 bits, paged on a GPU; gradients clipped at 1; losses logged at each step",
]

Measurement = dict[str, Any]
"""A `TrainingMeasurement` of training_clock.py, which takes torch."""


def main() -> None:
    """Measures, prints the table and the JSON document."""
    args = parse_arguments()
    console = Console(stderr=True)
    base = make_inputs(args, "--adapters", "0").base
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, args.rows * (args.steps + 1))
        runs = measure(args, base, data, console)
    found = summarize(runs, args.rows)
    console.print(as_table(args.shape, found))
    document = as_document("training", args, protocol(args) | found | {"differences": DIFFERENCES})
    document["versions"] |= {name: version(name) for name in ("trl", "accelerate")}
    print_document(document)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=2, help="in a batch")
    parser.add_argument("--steps", type=int, default=3, help="that are measured, after a first one")
    parser.add_argument("--runs", type=int, default=2, help="of each system")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, in both systems")
    return parser.parse_args()


def write_rows(file: Path, rows: int) -> None:
    """Texts which, with the stop token behind them, have TOKENS tokens each."""
    draw = random.Random(0)
    texts = ("".join(draw.choices(string.ascii_lowercase, k=TOKENS - 1)) for _ in range(rows))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def measure(args: argparse.Namespace, base: Path, data: Path, console: Console) -> dict[str, list[Measurement]]:
    """Every system `runs` times, in turns."""
    found: dict[str, list[Measurement]] = {name: [] for name in SYSTEMS}
    for run in range(args.runs):
        for name in SYSTEMS[:: 1 if run % 2 == 0 else -1]:
            with console.status(f"run {run + 1} of {args.runs}: {name}"):
                found[name].append(train(name, args, base, data))
    return found


def train(name: str, args: argparse.Namespace, base: Path, data: Path) -> Measurement:
    """One system once, in a fresh process."""
    command = [sys.executable, str(HERE / f"{name}_training.py"), str(base), str(data), *device_options(args)]
    command += ["--rows", str(args.rows), "--steps", str(args.steps)]
    command += ["--checkpointing"] if args.checkpointing else []
    # Both libraries take a GPU that they see.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | hidden)
    measured: Measurement = json.loads(done.stdout.splitlines()[-1])
    return measured


def protocol(args: argparse.Namespace) -> Document:
    """How both systems were measured."""
    return {
        "rank": RANK,
        "rows": args.rows,
        "tokens": TOKENS,
        "steps": args.steps,
        "runs": args.runs,
        "checkpointing": args.checkpointing,
    }


def summarize(runs: dict[str, list[Measurement]], rows: int) -> Document:
    """Medians by system, and Hatrack's over the other's."""
    found = {name: medians(measurements, rows) for name, measurements in runs.items()}
    ratio = {key: round(found["hatrack"][key] / found["trl"][key], 3) for key in BARS}
    losses = {name: measurements[0]["losses"] for name, measurements in runs.items()}
    return found | {"ratio": ratio, "bars": BARS, "losses": losses}


def medians(measurements: Sequence[Measurement], rows: int) -> dict[str, float]:
    """One system, over its runs; a run's throughput is that of all its measured steps."""
    step_s = median(sum(each["steps_s"]) / len(each["steps_s"]) for each in measurements)
    return {
        "step_s": round(step_s, 3),
        "tokens_per_s": round(rows * TOKENS / step_s, 1),
        "steps_peak_gb": round(median(each["steps_peak_bytes"] for each in measurements) / 1e9, 3),
        "peak_gb": round(median(each["peak_bytes"] for each in measurements) / 1e9, 3),
    }


def as_table(shape: str, found: Document) -> Table:
    """The results for people."""
    table = Table(title=f"{shape}: training a LoRA adapter", title_justify="left")
    table.add_column("system")
    for key in found["hatrack"]:
        table.add_column(key, justify="right")
    for name in SYSTEMS:
        table.add_row(name, *map(str, found[name].values()))
    table.add_row("ratio", "", *map(str, found["ratio"].values()))
    return table


if __name__ == "__main__":
    main()
