"""An artifact of every method, pushed to a real server and decoded in one batch: each row is PEFT's own answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from parity import INITIALIZER_RANGE, PRECISIONS
from served import Served, until
from tiny import make_checkpoint
from zoo import EXPECTED_WARNINGS, make_zoo, not_on

from hatrack_client import Client, Generation

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]

GREEDY = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True, "logprobs": 20}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_method_is_pushed_and_answers_in_one_batch(precision: str, tmp_path: Path) -> None:
    dtype, packed, tolerance = PRECISIONS[precision]
    checkpoint = make_checkpoint(tmp_path / "base", initializer_range=INITIALIZER_RANGE)
    oracle = Oracle(checkpoint, quantization="nf4", dtype=dtype, packed=packed)
    folders: dict[str, Path | None] = {"": None}
    for name, folder in make_zoo(oracle, tmp_path).items():
        folders[name.replace(", ", "-").replace(" ", "-")] = folder
    prompts = {name: [(37 * row + 11 * i) % 256 for i in range(6 + row % 8)] for row, name in enumerate(folders)}
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"engine: {{packed: {str(packed).lower()}, dtype: {precision}}}\n")
    with Served(checkpoint, tmp_path / "data", "--config", str(settings)) as server, Client(server.address) as client:
        for name, folder in folders.items():
            if folder:
                client.push_adapter(name, folder)
        with ThreadPoolExecutor(len(folders)) as pool:
            calls = {
                name: pool.submit(client.generate, adapter=name, token_ids=prompt, **GREEDY)
                for name, prompt in prompts.items()
            }
            until(lambda: server.metrics()["hatrack_requests_running"] == len(folders))
        answers = {name: call.result() for name, call in calls.items()}
    on_plain = {name.replace(", ", "-").replace(" ", "-") for name in not_on(precision)}
    for name, folder in folders.items():
        tokens = prompts[name] + list(answers[name].token_ids)
        forced = oracle.logits(folder, tokens, plain=name in on_plain)[len(prompts[name]) - 1 : -1]
        assert_equal(answers[name], forced.log_softmax(-1), tolerance, name)


def assert_equal(answer: Generation, wanted: torch.Tensor, tolerance: float, name: str) -> None:
    """Log-probabilities within the tolerance, and the same tokens wherever the oracle is sure of them."""
    assert len(answer.logprobs) == len(answer.token_ids) == len(wanted)
    best = wanted.topk(2).values
    for token, found, row, (first, second) in zip(answer.token_ids, answer.logprobs, wanted, best, strict=True):
        for one in (found.chosen, *found.top):
            assert abs(one.logprob - row[one.token_id].item()) <= tolerance, name
        if first - second > tolerance:
            assert token == row.argmax(), name
