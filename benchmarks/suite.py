"""Every benchmark, each document kept as a file, and the figures drawn from them.

python benchmarks/suite.py --short                                # minutes on two cores
python benchmarks/suite.py --vllm /tmp/vllm/bin/python            # the real sizes; hours on two cores
python benchmarks/suite.py --device cuda --shape llama-3-8b --out docs/benchmarks/h200
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from plots import FOLDER
from setting import HERE, device_options, options

RUNS = 3  # of serving, whose systems take turns
SHORT = {
    "adapter_loading": ["--tokens", "32"],
    "many_adapters": ["--adapters", "64", "--fit", "24", "--requests", "48", "--clients", "12"],
    "training": ["--runs", "1"],
}


def main() -> None:
    """Runs one after another; a benchmark that fails ends it, and what was found before is kept."""
    parser = options(__doc__)
    parser.add_argument("--short", action="store_true", help="few repetitions, few adapters")
    parser.add_argument("--vllm", metavar="PYTHON", help="measure vLLM too, with a python that can import it")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the documents and figures go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, command in commands(args).items():
        print(f"== {name}", file=sys.stderr)
        done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
        document = json.loads(done.stdout.splitlines()[-1])
        (args.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    subprocess.run([sys.executable, HERE / "plots.py", args.out], check=True)


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each document."""
    common = ["--shape", args.shape, "--work-dir", str(args.work_dir), *device_options(args)]
    serving = ["--runs", "1" if args.short else str(RUNS), *(["--vllm", args.vllm] if args.vllm else [])]
    found = {"serving": [*common, *serving]}
    for name, short in SHORT.items():
        found[name] = [*common, *(short if args.short else [])]
    if args.device == "cpu":  # whose kernels it measures
        found["kernel_speed"] = ["--quick"] if args.short else []
    return {name: [str(HERE / f"{name}.py"), *arguments] for name, arguments in found.items()}


if __name__ == "__main__":
    main()
