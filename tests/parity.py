"""Both sides of a parity test: a mixed batch in our engine, and PEFT with each row's adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from inprocess import InProcess, tokens
from oracle import Oracle
from tiny import make_checkpoint
from torch import Tensor

from hatrack_server.catalog.gate import describe
from hatrack_server.config import EngineConfig
from hatrack_server.engine import step
from hatrack_server.model.paged import PagedModel

# bfloat16 has 8 bits: an absolute tolerance of 2e-2 means something only where logits are about 1.
INITIALIZER_RANGE = 0.03
PRECISIONS = {"float32": (torch.float32, False, 1e-4), "bfloat16": (torch.bfloat16, True, 2e-2)}

MakeAdapters = Callable[[Oracle, Path], dict[str, Path]]


@dataclass
class Case:
    """One base with its adapters, and both sides of the comparison."""

    oracle: Oracle
    model: PagedModel
    config: EngineConfig
    adapters: dict[str, Path | None]
    tolerance: float
    on_plain_linears: Collection[str] = ()  # adapters that PEFT can't run on this base's own

    def forced(self, name: str, who: str, ids: list[int]) -> Tensor:
        """The oracle's logits with the adapter `who`, on linears that both can run on."""
        return self.oracle.logits(self.adapters[who], ids, plain=bool({name, who} & set(self.on_plain_linears)))


def make_case(
    folder: Path,
    family: str,
    precision: str,
    make_adapters: MakeAdapters,
    *,
    quantization: str = "nf4",
    on_plain_linears: Collection[str] = (),
    max_step_tokens: int = 48,
) -> Case:
    """A tiny random base of `family`, quantised, with the adapters that `make_adapters` saves for it."""
    dtype, packed, tolerance = PRECISIONS[precision]
    checkpoint = make_checkpoint(folder / "base", family, initializer_range=INITIALIZER_RANGE)
    oracle = Oracle(checkpoint, quantization=quantization, dtype=dtype, packed=packed)
    config = EngineConfig.model_validate(
        {
            "model": checkpoint,
            "quantization": quantization,
            "dtype": precision,
            "packed": packed,
            "device": "cpu",
            "kv_cache_gb": 0.004,
            "max_rows": 48,
            "max_step_tokens": max_step_tokens,
        }
    )
    adapters = {"base": None, **make_adapters(oracle, folder)}
    model = PagedModel(config)
    for path in filter(None, adapters.values()):
        describe(path, model.layers.shapes, max_rank=config.max_rank)  # the gate lets all of them pass
    return Case(oracle, model, config, adapters, tolerance, on_plain_linears)


def recorded_run(
    case: Case, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[list[int]], list[Tensor], int]:
    """Prompts, tokens and the logits they came from, row by row; and the most adapters that one step held."""
    seen: list[Tensor] = []
    sample = step.sample
    monkeypatch.setattr(step, "sample", lambda logits, draws: (seen.append(logits.float()), sample(logits, draws))[1])
    run = InProcess(case.model, case.config)
    run.load(path for path in case.adapters.values() if path)
    prompts = [[(37 * row + 11 * i) % 256 for i in range(6 + 9 * (row % 8))] for row in range(len(rows))]
    ids = [run.submit(prompt, case.adapters[name]) for prompt, name in zip(prompts, rows, strict=True)]
    logits: dict[int, list[Tensor]] = {i: [] for i in ids}
    answers: dict[int, list[int]] = {i: [] for i in ids}
    most = 0
    while run.engine.has_work:
        seen.clear()
        deltas = run.step()
        most = max(most, *run.engine.stats(stepped=True).adapters_per_step)
        for delta, row in zip(deltas, torch.cat(seen) if seen else [], strict=True):
            answers[delta.id] += tokens([delta])
            logits[delta.id].append(row)
    run.close()
    return prompts, list(answers.values()), [torch.stack(rows) for rows in logits.values()], most


def assert_rows_equal_peft(
    case: Case, rows: list[str], monkeypatch: pytest.MonkeyPatch, controls: Callable[[str], Collection[str]]
) -> None:
    """Runs `rows` in one batch; each must equal PEFT with its own adapter, and miss each of its `controls` by far."""
    prompts, answers, logits, most = recorded_run(case, rows, monkeypatch)
    assert most == len(set(rows) - {"base"})
    for name, prompt, answer, got in zip(rows, prompts, answers, logits, strict=True):
        own = case.forced(name, name, prompt + answer)[len(prompt) - 1 : -1]
        torch.testing.assert_close(got, own, rtol=0, atol=case.tolerance, msg=lambda text, name=name: f"{name}: {text}")
        best = own.topk(2).values
        sure = best[:, 0] - best[:, 1] > case.tolerance
        assert torch.equal(torch.tensor(answer)[sure], own.argmax(-1)[sure])
        # With another adapter, or with none, the same comparison would fail by far.
        for other in controls(name):
            wrong = case.forced(name, other, prompt + answer)[len(prompt) - 1 : -1]
            assert (got - wrong).abs().max() > 10 * case.tolerance, f"{name} is too like {other} to tell"
