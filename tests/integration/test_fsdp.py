"""Two processes on the CPU, as `accelerate launch` starts them: gloo carries what NCCL carries between GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_checkpoint

from hatrack.manifest import Manifest, folder_digest
from hatrack_client.cli import run as hatrack
from hatrack_server.catalog.gate import describe
from hatrack_server.model.shapes import shapes_of_checkpoint

ROOT = Path(__file__).parents[2]
PROCESSES, ROWS = 2, 2
# name: (quantization, adapter, whether the base is sharded)
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "sharded": ("none", {"rank": 4}, True),
    "sharded-nf4": ("nf4", {"rank": 4}, True),
    "sharded-dora": ("none", {"method": "dora", "rank": 3}, True),
    "plain": ("none", {"rank": 4}, False),
}


@dataclass(frozen=True)
class Launched:
    """What two processes have left, and one, with twice the rows in each batch."""

    folder: Path
    base: Path
    stdout: list[str]
    stderr: str

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "training" / "log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "adapter_model.safetensors")


def write_config(folder: Path, base: Path, name: str, quantization: str, adapter: dict[str, Any], rows: int) -> str:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": "x" * (i + 1)}) + "\n" for i in range(8)))
    sections = {
        "base": {"model": str(base), "quantization": quantization},
        "adapter": adapter,
        "data": {"train": str(data)},
        "train": {"max_steps": 4, "batch_size": rows, "learning_rate": 1e-2},
        "output": {"dir": str(folder / name)},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(sections))  # JSON is YAML
    return str(file)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("launched")
    base = make_checkpoint(folder / "base")
    arguments = []
    for name, (quantization, adapter, shards) in RUNS.items():
        config = write_config(folder, base, name, quantization, adapter, ROWS)
        arguments.append(config if shards else f"plain:{config}")
        alone = write_config(folder, base, f"alone-{name}", quantization, adapter, PROCESSES * ROWS)
        assert hatrack(["train", "run", alone]) == 0
    done = launch(str(ROOT / "tests" / "launched.py"), *arguments)
    assert done.returncode == 0, done.stderr
    return Launched(folder, base, done.stdout.splitlines(), done.stderr)


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/fsdp.yaml")]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_with_twice_the_rows(launched: Launched, name: str) -> None:
    # NF4 computes in bfloat16, whose rounding depends on the rows of a batch.
    tolerance = 1e-2 if RUNS[name][0] == "nf4" else 1e-5
    assert launched.losses(name) == pytest.approx(launched.losses(f"alone-{name}"), rel=tolerance)
    if tolerance < 1e-2:
        torch.testing.assert_close(launched.weights(name), launched.weights(f"alone-{name}"), atol=1e-4, rtol=1e-3)


def test_each_process_keeps_its_share_of_the_base(launched: Launched) -> None:
    shares = [float(line.split()[1]) for line in launched.stdout if line.startswith("share")]
    assert shares == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("name", RUNS)
def test_the_artifact_is_whole_and_one_that_the_server_takes(launched: Launched, name: str) -> None:
    artifact = launched.folder / name
    manifest = Manifest.from_json((artifact / "manifest.json").read_text())
    assert manifest.artifact == folder_digest(artifact)
    assert manifest.training["processes"] == PROCESSES
    assert describe(artifact, shapes_of_checkpoint(launched.base), max_rank=8).rank == RUNS[name][1]["rank"]
    assert {weight.dtype for weight in launched.weights(name).values()} == {torch.float32}


def test_one_process_speaks_for_all(launched: Launched) -> None:
    assert [line for line in launched.stdout if "steps, loss" in line] == [
        line for line in launched.stdout if not line.startswith("share")
    ]
    assert len(launched.stdout) == 2 * len(RUNS)
    assert launched.stderr.count("rows read as prompt-completion") == len(RUNS)
    assert sorted(file.name for file in launched.folder.iterdir() if file.name.startswith(".")) == []


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path, "out", "none", {"rank": 0}, ROWS)  # found before torch is imported
    done = launch("-m", "hatrack_client", "train", "run", config)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("hatrack:")] == [
        f"hatrack: {config}: adapter.rank: input should be greater than or equal to 1"
    ]
    assert "hatrack_trainer/" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()
