"""Every kernel beside its plain reference, and beside what the machine can read and compute.

    python benchmarks/kernel_speed.py            # shapes of TinyLlama-1.1B, bfloat16
    python benchmarks/kernel_speed.py --quick    # fewer repetitions

Each works through copies of its operands that no cache holds together, as a model works through its layers. `share` is
the greater of bytes over read bandwidth and operations over the rate of a dense product, both measured in the same run,
divided by the time taken: 1 is what the machine allows. The table goes to standard error; the last line of standard
output is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from bitsandbytes.nn import Linear4bit
from rich.console import Console
from rich.table import Table
from setting import print_document, setting
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hatrack_server.kernels.bottleneck import add_bottleneck, add_bottleneck_reference
from hatrack_server.kernels.kronecker import add_kronecker, add_kronecker_reference
from hatrack_server.kernels.low_rank import BatchLowRank, add_low_rank_reference
from hatrack_server.kernels.nf4_linear import keep_canonical, nf4_linear, nf4_linear_reference, pack
from hatrack_server.kernels.paged_attention import paged_decode
from hatrack_server.kernels.prefix_attention import add_prefix_attention, add_prefix_attention_reference
from hatrack_server.kernels.rms_norm import fastest_norm
from hatrack_server.kernels.runs import Run

DTYPE = torch.bfloat16
WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 2048, 5632, 32, 4, 64
RANK = 16
COLD_BYTES = 256e6  # of operands worked through before the first ones come again
BLOCK = 16

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel on one batch: calls on operands of their own, what each reads and computes, and its reference."""

    name: str
    calls: list[Call]
    reads: float  # bytes
    operations: float
    reference: Call | None


@dataclass(frozen=True)
class Machine:
    """What it can do at most."""

    bytes_per_s: float
    operations_per_s: float


def main() -> None:
    """Measures, prints the table and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    seconds = 0.2 if parser.parse_args().quick else 1.0
    torch.manual_seed(0)
    with torch.inference_mode():
        machine = measure_machine()
        results = [measured(case, machine, seconds) for case in cases()]
    Console(stderr=True).print(as_table(results))
    found = {"threads": torch.get_num_threads(), "limits": machine.__dict__, "cases": results}
    print_document({"benchmark": "kernels", **setting("cpu"), **found})


def measure_machine() -> Machine:
    """Reading a gigabyte, and one large product in bfloat16; the best of several."""
    values = torch.ones(1 << 28)
    a, b = torch.randn(2048, 2048).to(DTYPE), torch.randn(2048, 2048).to(DTYPE)
    read = min(once(values.sum) for _ in range(5))
    product = min(once(lambda: a @ b) for _ in range(10))
    return Machine(values.nbytes / read, 2 * 2048**3 / product)


def measured(case: Case, machine: Machine, seconds: float) -> dict[str, object]:
    """Times of the kernel and of its reference, in microseconds."""
    taken = timed(case.calls, seconds)
    limit = max(case.reads / machine.bytes_per_s, case.operations / machine.operations_per_s)
    reference = timed([case.reference], seconds) if case.reference else None
    return {
        "kernel": case.name,
        "us": round(taken * 1e6, 1),
        "limit_us": round(limit * 1e6, 1),
        "share": round(limit / taken, 2),
        "reference_us": reference and round(reference * 1e6, 1),
    }


def timed(calls: list[Call], seconds: float) -> float:
    """Mean seconds of one call, once each was made."""
    for call in calls:
        call()
    start = time.perf_counter()
    for count, call in enumerate(cycle(calls), 1):
        call()
        taken = time.perf_counter() - start
        if taken > seconds and count >= len(calls):
            return taken / count
    raise AssertionError("unreachable")


def once(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cases() -> Iterator[Case]:
    """The base's products, attention, and each piece of an adapter, decoding and prefilling."""
    for rows in (1, 8, 32, 512):
        yield nf4_case(rows)
    for rows in (1, 8, 32):
        yield adapted_case(rows)
        yield norm_case(rows)
    for rows in (1, 8, 32):
        yield attention_case(rows)
    for rows, tokens in ((1, 1), (8, 1), (32, 1), (16, 32)):
        yield low_rank_case(rows, tokens)
        yield low_rank_case(rows, tokens, scattered=True)
    for rows, tokens in ((32, 1), (16, 32)):
        yield kronecker_case(rows, tokens)
        yield bottleneck_case(rows, tokens)
        yield prefix_case(rows, tokens)


def nf4_case(rows: int) -> Case:
    """The widest layer."""
    size = FEED_FORWARD * WIDTH / 2
    layers = [pack(nf4_layer()) for _ in range(math.ceil(COLD_BYTES / size))]
    canonical, x = nf4_layer(), torch.randn(rows, WIDTH).to(DTYPE)
    return Case(
        f"nf4_linear {WIDTH}→{FEED_FORWARD}, {rows} tokens",
        [partial(nf4_linear, x, layer) for layer in layers],
        size + size / 32,
        2.0 * rows * FEED_FORWARD * WIDTH,
        lambda: nf4_linear_reference(x, canonical),
    )


def adapted_case(rows: int) -> Case:
    """The same layer for rows of as many adapters, whose low ranks go with its product."""
    size, added = FEED_FORWARD * WIDTH / 2, rows * RANK * (WIDTH + FEED_FORWARD) * DTYPE.itemsize
    x, run, canonical = tokens_of(rows), [Run(0, 1, tuple(range(rows)))], nf4_layer()
    layers = [
        (pack(nf4_layer()), torch.randn(rows, RANK, WIDTH).to(DTYPE), torch.randn(rows, RANK, FEED_FORWARD).to(DTYPE))
        for _ in range(math.ceil(COLD_BYTES / (size + added)))
    ]

    def reference() -> None:
        add_low_rank_reference(nf4_linear_reference(x, canonical), x, *layers[0][1:], run)

    return Case(
        f"nf4_linear {WIDTH}→{FEED_FORWARD} with r={RANK}, {rows} adapters",
        [partial(nf4_linear, x, layer, BatchLowRank(a, b, run)) for layer, a, b in layers],
        size + size / 32 + added,
        rows * (2.0 * FEED_FORWARD * WIDTH + 2.0 * RANK * (FEED_FORWARD + WIDTH)),
        reference,
    )


def norm_case(rows: int) -> Case:
    """Tokens that the layer before has just made, so in the caches."""
    norm, x = LlamaRMSNorm(WIDTH).to(DTYPE), tokens_of(rows)
    return Case(f"rms_norm, {rows} tokens", [partial(fastest_norm(norm), x)], 0.0, 4.0 * rows * WIDTH, partial(norm, x))


def nf4_layer() -> Linear4bit:
    """Quantised as a loaded base is, in the canonical layout."""
    layer = Linear4bit(WIDTH, FEED_FORWARD, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    layer = layer.to("cpu").eval()
    keep_canonical(layer)
    return layer


def attention_case(rows: int, length: int = 512) -> Case:
    """A decode over `length` keys for each row."""
    size = rows * length * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize
    pools = [
        [torch.randn(rows * length + BLOCK, KV_HEADS, HEAD_DIM).to(DTYPE) for _ in "kv"]
        for _ in range(math.ceil(COLD_BYTES / size))
    ]
    q = torch.randn(rows, HEADS, HEAD_DIM).to(DTYPE)
    slots = BLOCK + torch.randperm(rows * length // BLOCK)[:, None] * BLOCK + torch.arange(BLOCK)
    slots, mask = slots.view(rows, length), torch.ones(rows, length, dtype=torch.bool)
    return Case(
        f"paged_decode, {rows} rows of {length} keys",
        [partial(paged_decode, q, *kv, slots, mask, scale=HEAD_DIM**-0.5) for kv in pools],
        size,
        4.0 * rows * length * HEADS * HEAD_DIM,
        None,
    )


def low_rank_case(rows: int, tokens: int, *, scattered: bool = False) -> Case:
    """Rows of different adapters; `scattered` ones don't lie side by side in the pools."""
    stacks = copies(rows, (RANK, WIDTH), (RANK, WIDTH))
    y, x = tokens_of(rows * tokens), tokens_of(rows * tokens)
    chosen = tuple(range(1, 2 * rows, 2) if scattered else range(rows))
    run = [Run(0, tokens, chosen)]
    return Case(
        f"add_low_rank r={RANK}, {rows} x {tokens} tokens" + (", scattered" if scattered else ""),
        [partial(BatchLowRank(*s, run), y, x) for s in stacks],
        rows * 2 * RANK * WIDTH * DTYPE.itemsize,
        4.0 * rows * tokens * RANK * WIDTH,
        lambda: add_low_rank_reference(y, x, *stacks[0], run),
    )


def kronecker_case(rows: int, tokens: int) -> Case:
    """LoKr's most balanced factors."""
    stacks = copies(rows, (32, 32), (64, 64))
    y, x = tokens_of(rows * tokens), tokens_of(rows * tokens)
    run = [Run(0, tokens, tuple(range(rows)))]
    return Case(
        f"add_kronecker 32² ⊗ 64², {rows} x {tokens} tokens",
        [partial(add_kronecker, y, x, *s, run) for s in stacks],
        rows * (32 * 32 + 64 * 64) * DTYPE.itemsize,
        2.0 * rows * tokens * WIDTH * (32 + 64),
        lambda: add_kronecker_reference(y, x, *stacks[0], run),
    )


def bottleneck_case(rows: int, tokens: int, width: int = 64) -> Case:
    """As wide as users train them."""
    stacks = copies(rows, (width, WIDTH), (width,), (width, WIDTH), (WIDTH,))
    y, run = tokens_of(rows * tokens), [Run(0, tokens, tuple(range(rows)))]
    return Case(
        f"add_bottleneck r={width}, {rows} x {tokens} tokens",
        [partial(add_bottleneck, y, *s, torch.relu, run) for s in stacks],
        rows * 2 * width * WIDTH * DTYPE.itemsize,
        4.0 * rows * tokens * width * WIDTH,
        lambda: add_bottleneck_reference(y, *stacks[0], torch.relu, run),
    )


def prefix_case(rows: int, tokens: int, length: int = 16) -> Case:
    """LLaMA-Adapter's keys."""
    stacks = copies(rows, (length, KV_HEADS, HEAD_DIM), (length, KV_HEADS, HEAD_DIM))
    out, q = (torch.randn(rows * tokens, HEADS, HEAD_DIM).to(DTYPE) for _ in range(2))
    run = [Run(0, tokens, tuple(range(rows)))]
    return Case(
        f"add_prefix_attention n={length}, {rows} x {tokens} tokens",
        [partial(add_prefix_attention, out, q, *s, run) for s in stacks],
        rows * 2 * length * KV_HEADS * HEAD_DIM * DTYPE.itemsize,
        4.0 * rows * tokens * length * HEADS * HEAD_DIM,
        lambda: add_prefix_attention_reference(out, q, *stacks[0], run),
    )


def copies(rows: int, *shapes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Stacks for twice as many rows, as often as it takes that no cache holds them all."""
    size = 2 * rows * sum(map(math.prod, shapes)) * DTYPE.itemsize
    count = min(200, math.ceil(COLD_BYTES / size))
    return [tuple((torch.randn(2 * rows, *shape) * 0.01).to(DTYPE) for shape in shapes) for _ in range(count)]


def tokens_of(count: int) -> Tensor:
    """[count, WIDTH]."""
    return torch.randn(count, WIDTH).to(DTYPE)


def as_table(results: list[dict[str, object]]) -> Table:
    """One line for each case."""
    table = Table("kernel", "µs", "limit, µs", "share", "reference, µs")
    for result in results:
        table.add_row(*("" if value is None else str(value) for value in result.values()))
    return table


if __name__ == "__main__":
    main()
