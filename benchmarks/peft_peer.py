"""Measures transformers with PEFT over a bitsandbytes NF4 base; a mixed batch goes through `adapter_names`.

    python benchmarks/peft_peer.py FOLDER --rows 1x1 8x8 --run 0 --device cpu

Prints one JSON list, a measurement per case.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteriaList
from workload import DECODE_STEPS, PREFILL_NEW_TOKENS, WARM_UP_NEW_TOKENS, Case, Inputs, Measurement


def main() -> None:
    """Measures every case of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", type=Case.parse, required=True)
    parser.add_argument("--run", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(Inputs(args.folder), max(case.distinct for case in args.rows), args.device)
    print(json.dumps([asdict(measure(model, case, args.run)) for case in args.rows]))


def load(inputs: Inputs, adapters: int, device: str) -> Any:
    """The NF4 base with adapters a0, a1, … beside it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        inputs.base, quantization_config=nf4, dtype=torch.bfloat16, device_map=device
    )
    if adapters:
        model = PeftModel.from_pretrained(model, inputs.adapter("a0"), adapter_name="a0")
    for i in range(1, adapters):
        model.load_adapter(inputs.adapter(f"a{i}"), adapter_name=f"a{i}")
    return model.eval()


def measure(model: Any, case: Case, run: int) -> Measurement:
    """The prefill is what passes until the batch's second token, a decode step the mean of those after it."""
    generate(model, case, case.prompts(run, "warm-up"), WARM_UP_NEW_TOKENS)
    arrivals = generate(model, case, case.prompts(run, "decode"), PREFILL_NEW_TOKENS + DECODE_STEPS)
    prefill = arrivals[PREFILL_NEW_TOKENS - 1]
    return Measurement(step_ms=(arrivals[-1] - prefill) / DECODE_STEPS * 1e3, prefill_s=prefill)


def generate(model: Any, case: Case, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """When one greedy batch got each of its tokens, in seconds from its start."""
    ids = torch.tensor(prompts, device=model.device)
    # Base rows cost PEFT least with its adapters off; a mixed batch names one for each row.
    mixed = {"adapter_names": case.adapters()} if case.distinct else {}
    base_only = model.disable_adapter() if isinstance(model, PeftModel) and not mixed else nullcontext()
    arrivals: list[float] = []

    def note_time(*_: Any, **__: Any) -> torch.Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize()
        arrivals.append(time.perf_counter() - start)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = time.perf_counter()
    with torch.inference_mode(), base_only:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note_time]),
            **mixed,
        )
    return arrivals


if __name__ == "__main__":
    main()
