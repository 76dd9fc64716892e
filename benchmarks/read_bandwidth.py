"""Prints how many bytes per second the device's memory gives: a gigabyte read, the best of several.

python benchmarks/read_bandwidth.py --device cpu --threads 2
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

READINGS = 7


def main() -> None:
    """Prints one number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    values = torch.ones(1 << 28, device=args.device)
    print(values.nbytes / min(seconds_to_read(values) for _ in range(READINGS)))


def seconds_to_read(values: Tensor) -> float:
    """One sum over all of them."""
    start = time.perf_counter()
    values.sum().item()  # waits for the device
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
