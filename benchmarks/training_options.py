"""What both trainers are told. Importing this takes no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

TOKENS = 256
LEARNING_RATE = 2e-4


def child_arguments(description: str | None) -> argparse.Namespace:
    """The command line of one system's run; its threads are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="after the first, which only warms up")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    return args
