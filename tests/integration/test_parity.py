"""Every row of a mixed batch gives what PEFT gives for that adapter alone on the same base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from inprocess import InProcess, tokens
from oracle import Oracle, make_adapter
from tiny import FAMILIES, make_checkpoint
from torch import Tensor

from hatrack_server.config import EngineConfig
from hatrack_server.engine import step
from hatrack_server.model.paged import PagedModel

# PEFT is right to warn whoever would merge such an adapter; here the head alone is adapted.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

# bfloat16 has 8 bits: an absolute tolerance of 2e-2 means something only where logits are about 1.
INITIALIZER_RANGE = 0.03
PRECISIONS = {"float32": (torch.float32, False, 1e-4), "bfloat16": (torch.bfloat16, True, 2e-2)}
ADAPTERS = {
    "r4": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "r8": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "alpha_pattern": {"q_proj": 4}},
    "r64": {
        "r": 64,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["k_proj", "v_proj", "down_proj", "fc2", "lm_head"],
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {"lm_head": 1},
        "layers_to_transform": [1],
    },
}
ROWS = ["base", "r4", "r8", "r64", "r8", "base", "r4"]


@dataclass
class Case:
    """One base with its adapters, and both sides of the comparison."""

    oracle: Oracle
    model: PagedModel
    config: EngineConfig
    adapters: dict[str, Path | None]
    tolerance: float


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in PRECISIONS], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, precision = request.param
    dtype, packed, tolerance = PRECISIONS[precision]
    folder = tmp_path_factory.mktemp(f"{family}-{precision}")
    checkpoint = make_checkpoint(folder / "base", family, initializer_range=INITIALIZER_RANGE)
    oracle = Oracle(checkpoint, quantization="nf4", dtype=dtype, packed=packed)
    adapters: dict[str, Path | None] = {"base": None}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        adapters[name] = make_adapter(oracle.base, folder / name, seed=seed, **settings)
    config = EngineConfig(
        model=checkpoint,
        dtype=precision,
        packed=packed,
        device="cpu",
        kv_cache_gb=0.004,
        max_rows=16,
        max_step_tokens=48,
    )
    return Case(oracle, PagedModel(config), config, adapters, tolerance)


def recorded_run(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[list[int]], list[Tensor], int]:
    """Prompts, tokens and the logits they came from, row by row; and the most adapters that one step held."""
    seen: list[Tensor] = []
    sample = step.sample
    monkeypatch.setattr(step, "sample", lambda logits, draws: (seen.append(logits.float()), sample(logits, draws))[1])
    run = InProcess(case.model, case.config)
    prompts = [[(37 * row + 11 * i) % 256 for i in range(20 + 7 * row)] for row in range(len(ROWS))]
    ids = [run.submit(prompt, case.adapters[name]) for prompt, name in zip(prompts, ROWS, strict=True)]
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


def test_rows_of_a_mixed_batch_equal_peft_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, answers, logits, most = recorded_run(case, monkeypatch)
    assert most == 3
    for name, prompt, answer, got in zip(ROWS, prompts, answers, logits, strict=True):
        forced = {
            who: case.oracle.logits(path, prompt + answer)[len(prompt) - 1 : -1] for who, path in case.adapters.items()
        }
        own = forced.pop(name)
        torch.testing.assert_close(got, own, rtol=0, atol=case.tolerance, msg=lambda text, name=name: f"{name}: {text}")
        best = own.topk(2).values
        sure = best[:, 0] - best[:, 1] > case.tolerance
        assert torch.equal(torch.tensor(answer)[sure], own.argmax(-1)[sure])
        # The control: with another adapter, or with none, the same comparison would fail by far.
        for other, wrong in forced.items():
            assert (got - wrong).abs().max() > 10 * case.tolerance, f"{name} is too like {other} to tell"


def test_unquantised_base_equals_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "base", initializer_range=INITIALIZER_RANGE)
    oracle = Oracle(checkpoint, quantization="none", dtype=torch.float32, packed=False)
    adapters: dict[str, Path | None] = {"base": None}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        adapters[name] = make_adapter(oracle.base, tmp_path / name, seed=seed, **settings)
    config = EngineConfig(
        model=checkpoint, quantization="none", device="cpu", kv_cache_gb=0.004, max_rows=16, max_step_tokens=48
    )
    case = Case(oracle, PagedModel(config), config, adapters, 1e-4)
    test_rows_of_a_mixed_batch_equal_peft_alone(case, monkeypatch)
