"""What stands around every measurement: options, inputs, and the words that a document needs to be judged by."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workload import SHAPES, Inputs

HERE = Path(__file__).parent
PACKAGES = ("hatrack", "torch", "transformers", "peft", "bitsandbytes")

Document = dict[str, Any]


def options(description: str | None) -> argparse.ArgumentParser:
    """A command line with what all measurements have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads, of every system; default: torch's choice")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bench"), help="keeps base and adapters")
    return parser


def device_options(args: argparse.Namespace) -> list[str]:
    """What every system is told."""
    threads = ["--threads", str(args.threads)] if args.threads else []
    return ["--device", args.device, *threads]


def make_inputs(args: argparse.Namespace, *wanted: str) -> Inputs:
    """The base and what is `wanted`; made in a child, so that no torch stays in this process."""
    folder = args.work_dir / args.shape
    _python("make_inputs.py", str(folder), "--shape", args.shape, *wanted)
    return Inputs(folder)


def read_bandwidth(args: argparse.Namespace) -> float:
    """Bytes per second that the device reads; measured in a child, like everything that takes torch."""
    return float(_python("read_bandwidth.py", *device_options(args)))


def _python(script: str, *arguments: str) -> str:
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def as_document(benchmark: str, args: argparse.Namespace, found: Document) -> Document:
    """What was found, under what it was found with."""
    return {
        "benchmark": benchmark,
        "shape": args.shape,
        "device": args.device,
        "threads": args.threads,
        **setting(args.device),
        **found,
    }


def setting(device: str) -> Document:
    """When, on what and with what something is measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(device),
        "versions": {name: version(name) for name in PACKAGES},
    }


def machine(device: str) -> dict[str, str | int | None]:
    """The processor, its cores, and the accelerator if it was used."""
    described: dict[str, str | int | None] = {"cpu": _processor(), "cores": os.cpu_count()}
    return described | ({"gpu": _gpu()} if device == "cuda" else {})


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[0]


def print_document(document: Document) -> None:
    """The last line of standard output."""
    print(json.dumps(document))
