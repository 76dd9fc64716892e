from __future__ import annotations

from pathlib import Path

import pytest

from hatrack_client import Client, HatrackClientError
from hatrack_trainer.demo.server import read_counts, serving
from hatrack_trainer.errors import TrainerError


def test_a_server_of_its_own_process_serves_and_stops(tiny_llama: Path, tmp_path: Path) -> None:
    with serving(tiny_llama, tmp_path) as server, Client(server.address, timeout=30) as client:
        client.generate(prompt="hello", max_tokens=3, temperature=0, ignore_eos=True)
        assert read_counts(server.metrics_url).mixed_steps == 0
    with Client(server.address, timeout=5) as client, pytest.raises(HatrackClientError, match="can't be reached"):
        client.generate(prompt="hello", max_tokens=3)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainerError, match=r"did not start: .*absent does not exist"),
        serving(tmp_path / "absent", tmp_path),
    ):
        pass
