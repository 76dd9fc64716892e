"""Hatrack beside transformers with PEFT: the same base, adapters and prompts, one system at a time.

    python benchmarks/serving.py                                # TinyLlama-1.1B's shape; 3 GB on disk
    python benchmarks/serving.py --shape tiny --rows 1x1 8x8   # a quick check; its figures mean nothing
    python benchmarks/serving.py --mix                          # 12 methods in one batch beside 12 LoRA adapters

A case is ROWSxDISTINCT: that many completions at once, spread over that many LoRA adapters of rank 16; 0 is the base
alone. Each row has 32 prompt tokens; the decode step is a mean over 24 steps, the prefill what passes until the second
token. Every run starts both systems afresh, taking turns at going first, and figures are medians over runs. The table
goes to standard error; the last line of standard output is one JSON document, whose ratios are above 1 where Hatrack is
faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from hatrack_system import measure_hatrack
from rich.console import Console
from rich.table import Table
from workload import DECODE_STEPS, PROMPT_TOKENS, RANK, Case, Inputs, Measurement

HERE = Path(__file__).parent
CASES = ["1x1", "8x8", "32x0", "32x32"]
MIX = (Case(32, 12), Case(32, 12, mixed=True))
PACKAGES = ("hatrack", "torch", "transformers", "peft", "bitsandbytes")

Measure = Callable[[int], list[Measurement]]


def main() -> None:
    """Measures, prints the table and the JSON document."""
    args = parse_arguments()
    console = Console(stderr=True)
    inputs = make_inputs(args)
    if args.mix:
        print(json.dumps(compare_mix(args, inputs, console)))
        return
    systems: dict[str, Measure] = {
        "hatrack": lambda run: measure_hatrack(inputs, args.rows, run, common_options(args)),
        "peft": lambda run: measure_peft(inputs, args.rows, run, common_options(args)),
    }
    runs: dict[str, list[list[Measurement]]] = {name: [] for name in systems}
    for run in range(args.runs):
        for name in list(systems)[:: 1 if run % 2 == 0 else -1]:
            with console.status(f"run {run + 1} of {args.runs}: {name}"):
                runs[name].append(systems[name](run))
    results = summarize(args.rows, runs)
    console.print(as_table(args.shape, results))
    print(json.dumps(as_document(args, results)))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "tinyllama-1.1b"), default="tinyllama-1.1b")
    parser.add_argument("--rows", nargs="+", type=Case.parse, default=list(map(Case.parse, CASES)), metavar="RxD")
    parser.add_argument("--mix", action="store_true", help="Hatrack alone: 32 rows of 12 methods, and of 12 LoRAs")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads, of both systems; default: torch's choice")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench"), help="keeps base and adapters")
    return parser.parse_args()


def make_inputs(args: argparse.Namespace) -> Inputs:
    """The base and as many adapters as the cases need; made in a child, so that no torch stays in this process."""
    folder = args.work_dir / args.shape
    adapters = max(case.distinct for case in (MIX if args.mix else args.rows))
    options = ["--shape", args.shape, "--adapters", str(adapters), *(["--mix"] if args.mix else [])]
    subprocess.run([sys.executable, HERE / "make_inputs.py", folder, *options], check=True)
    return Inputs(folder)


def common_options(args: argparse.Namespace) -> list[str]:
    """What both systems are told."""
    threads = ["--threads", str(args.threads)] if args.threads else []
    return ["--device", args.device, *threads]


def measure_peft(inputs: Inputs, cases: Sequence[Case], run: int, options: Sequence[str]) -> list[Measurement]:
    """Every case in one fresh process."""
    command = [sys.executable, HERE / "peft_peer.py", inputs.folder, "--run", str(run), *options]
    done = subprocess.run([*command, "--rows", *map(str, cases)], check=True, stdout=subprocess.PIPE, text=True)
    return [Measurement(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def compare_mix(args: argparse.Namespace, inputs: Inputs, console: Console) -> dict[str, Any]:
    """Rows of twelve methods beside as many LoRA rows; ratios are the share of LoRA's speed that the mixture keeps.

    PEFT is no peer here: of these methods it mixes LoRA alone.
    """
    runs = []
    for run in range(args.runs):
        with console.status(f"run {run + 1} of {args.runs}"):
            runs.append(measure_hatrack(inputs, MIX, run, common_options(args)))
    loras, mixed = (_medians(case, [run[i] for run in runs]) for i, case in enumerate(MIX))
    ratio = {key: round(loras[key] / mixed[key], 2) for key in ("step_ms", "prefill_s")}
    cases = [{"case": str(case), "hatrack": found} for case, found in zip(MIX, (loras, mixed), strict=True)]
    return as_document(args, cases) | {"ratio": {"decode": ratio["step_ms"], "prefill": ratio["prefill_s"]}}


def summarize(cases: Sequence[Case], runs: dict[str, list[list[Measurement]]]) -> list[dict[str, Any]]:
    """Medians per case and system, and how many times faster Hatrack is."""
    results = []
    for i, case in enumerate(cases):
        ours, peft = (_medians(case, [run[i] for run in runs[name]]) for name in ("hatrack", "peft"))
        ratio = {
            "decode": round(peft["step_ms"] / ours["step_ms"], 2),
            "prefill": round(peft["prefill_s"] / ours["prefill_s"], 2),
        }
        results.append({"rows": case.rows, "distinct": case.distinct, "hatrack": ours, "peft": peft, "ratio": ratio})
    return results


def _medians(case: Case, measurements: Sequence[Measurement]) -> dict[str, float]:
    step_ms = median(each.step_ms for each in measurements)
    return {
        "step_ms": round(step_ms, 2),
        "decode_tok_s": round(case.rows / step_ms * 1e3, 1),
        "prefill_s": round(median(each.prefill_s for each in measurements), 3),
    }


def as_table(shape: str, results: Sequence[dict[str, Any]]) -> Table:
    """The results for people."""
    table = Table(title=f"{shape}: Hatrack | PEFT | times faster", title_justify="left")
    table.add_column("rows x adapters")
    for column in ("decode step, ms", "decode, tokens/s", "prefill, s"):
        table.add_column(column, justify="right")
    for result in results:
        ours, peft, ratio = result["hatrack"], result["peft"], result["ratio"]
        table.add_row(
            f"{result['rows']} x {result['distinct'] or 'base'}",
            f"{ours['step_ms']:.1f} | {peft['step_ms']:.1f} | {ratio['decode']:.2f}",
            f"{ours['decode_tok_s']:.1f} | {peft['decode_tok_s']:.1f}",
            f"{ours['prefill_s']:.2f} | {peft['prefill_s']:.2f} | {ratio['prefill']:.2f}",
        )
    return table


def as_document(args: argparse.Namespace, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results for machines, with what is needed to judge them."""
    return {
        "benchmark": "serving",
        "shape": args.shape,
        "rank": RANK,
        "prompt_tokens": PROMPT_TOKENS,
        "decode_steps": DECODE_STEPS,
        "runs": args.runs,
        "device": args.device,
        "threads": args.threads,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in PACKAGES},
        "cases": results,
    }


if __name__ == "__main__":
    main()
