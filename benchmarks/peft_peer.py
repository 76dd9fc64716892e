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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
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
    """A decode step is what the long run takes more than the short one, per token."""
    long = PREFILL_NEW_TOKENS + DECODE_STEPS
    generate(model, case, case.prompts(run, "warm-up"), WARM_UP_NEW_TOKENS)
    prefill = generate(model, case, case.prompts(run, "prefill"), PREFILL_NEW_TOKENS)
    whole = generate(model, case, case.prompts(run, "decode"), long)
    return Measurement(step_ms=(whole - prefill) / DECODE_STEPS * 1e3, prefill_s=prefill)


def generate(model: Any, case: Case, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of one greedy batch."""
    ids = torch.tensor(prompts, device=model.device)
    # Base rows cost PEFT least with its adapters off; a mixed batch names one for each row.
    mixed = {"adapter_names": case.adapters()} if case.distinct else {}
    base_only = model.disable_adapter() if isinstance(model, PeftModel) and not mixed else nullcontext()
    start = time.perf_counter()
    with torch.inference_mode(), base_only:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **mixed,
        )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
