"""Measures vLLM with its LoRA support over the base in bfloat16; runs where vLLM is installed, not Hatrack.

    /tmp/vllm/bin/python benchmarks/vllm_peer.py FOLDER --rows 1x1 8x8 --run 0 --device cpu

LoRA support is on as soon as one case wants an adapter, and then slows down rows without one: measure these apart.
Prints one JSON list, a measurement per case.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workload import (
    DECODE_NEW_TOKENS,
    PREFILL_NEW_TOKENS,
    RANK,
    WARM_UP_NEW_TOKENS,
    Case,
    Inputs,
    Measurement,
    decode_ms,
)

MAX_TOKENS = 512  # of one row
KV_CACHE_GB = 4


def main() -> None:
    """Measures every case of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", type=Case.parse, required=True)
    parser.add_argument("--run", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)  # which of them, its build decides
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    os.environ.update(environment(args.threads))
    inputs = Inputs(args.folder)
    engine = load(inputs, args.rows)
    print(json.dumps([asdict(measure(engine, inputs, case, args.run)) for case in args.rows]))


def environment(threads: int | None) -> dict[str, str]:
    """What vLLM reads when it is imported: offline, silent, its engine in this process, its threads on our cores."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads else "all",
    }


def load(inputs: Inputs, cases: list[Case]) -> Any:
    """vLLM's engine, with as many places for adapters as the cases want."""
    from vllm import LLM

    adapters = max(case.distinct for case in cases)
    lora = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": RANK} if adapters else {}
    return LLM(
        model=str(inputs.base),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        max_num_seqs=max(case.rows for case in cases),
        enable_prefix_caching=False,
        **lora,
    ).llm_engine


def measure(engine: Any, inputs: Inputs, case: Case, run: int) -> Measurement:
    """As Hatrack is measured, without a network between."""
    generate(engine, inputs, case, case.prompts(run, "warm-up"), WARM_UP_NEW_TOKENS)
    start = time.perf_counter()
    generate(engine, inputs, case, case.prompts(run, "prefill"), PREFILL_NEW_TOKENS)
    prefill = time.perf_counter() - start
    rows = generate(engine, inputs, case, case.prompts(run, "decode"), DECODE_NEW_TOKENS)
    return Measurement(step_ms=decode_ms(rows), prefill_s=prefill)


def generate(engine: Any, inputs: Inputs, case: Case, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
    """When each row got each of its tokens, in seconds."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    for row, (adapter, prompt) in enumerate(zip(case.adapters(), prompts, strict=True)):
        engine.add_request(str(row), {"prompt_token_ids": prompt}, sampling, lora_request=lora_request(inputs, adapter))
    arrivals: list[list[float]] = [[] for _ in prompts]
    while engine.has_unfinished_requests():
        for output in engine.step():
            times = arrivals[int(output.request_id)]
            times += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(times))
    return arrivals


def lora_request(inputs: Inputs, adapter: str) -> Any:
    """None for the base alone."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter, 1 + int(adapter[1:]), str(inputs.adapter(adapter))) if adapter else None


if __name__ == "__main__":
    main()
