from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hatrack_client.cli import run as hatrack
from hatrack_server.errors import StartupError
from hatrack_server.model.load import load_base
from hatrack_trainer.artifact import check_logging_folder, check_output_folder, check_temporary_folder
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.errors import UsageError
from hatrack_trainer.targets import check_targets


class TestTargets:
    @pytest.mark.parametrize(
        "targets", ["all-linear", ["q_proj", "down_proj"], ["self_attn.q_proj"], ["model.layers.0.mlp.up_proj"]]
    )
    def test_linear_layers(self, tiny_llama: Path, targets: list[str]) -> None:
        check_targets(targets, tiny_llama)

    @pytest.mark.parametrize("targets", [["nowhere"], ["q_proj", "nowhere"], ["nowhere", "embed_tokens"]])
    def test_every_name_must_be_a_module(self, tiny_llama: Path, targets: list[str]) -> None:
        sentence = r"adapter\.target_modules: nowhere is no module of the base; take some of down_proj, .*, v_proj$"
        with pytest.raises(UsageError, match=sentence):
            check_targets(targets, tiny_llama)

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "self_attn", "norm", "0"])
    def test_other_modules_than_the_blocks_linear_layers(self, tiny_llama: Path, target: str) -> None:
        with pytest.raises(UsageError, match=rf"adapter\.target_modules: {target} can't have an adapter"):
            check_targets(["q_proj", target], tiny_llama)

    def test_a_base_that_is_quantised_on_disk(self, tiny_llama: Path, tmp_path: Path) -> None:
        load_base(tiny_llama, quantization="nf4", dtype=None, device="cpu").save_pretrained(tmp_path)
        check_targets(["q_proj"], tmp_path)

    def test_a_base_that_is_no_causal_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(StartupError, match=r"config\.json can't be loaded: Unrecognized .* class .*ViTConfig"):
            check_targets(["q_proj"], tmp_path)


class TestOutputFolder:
    @pytest.mark.parametrize("name", ["new", "deep/new", "empty", "link"])
    def test_room_for_an_artifact(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("nowhere")
        before = sorted(tmp_path.rglob("*"))
        check_output_folder(tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("name", ["new", "deep/new"])
    def test_what_a_kill_has_left_is_removed_by_the_next_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        with monkeypatch.context() as killed:
            killed.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
            check_output_folder(tmp_path / name)
        [left] = tmp_path.iterdir()
        assert left.name.startswith(".new")
        check_output_folder(tmp_path / name)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("file", "exists already"),
            (".", "exists already"),
            ("new/..", "exists already"),
            ("file/new", "can't be made: Not a directory"),
            ("x" * 300, "can't be made: File name too long"),
            ("/proc/new", "can't be made: "),
            ("circle", "is made of links that lead in a circle"),
            ("circle/new", "is made of links that lead in a circle"),
        ],
    )
    def test_no_room(self, tmp_path: Path, name: str, reason: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "circle").symlink_to("circle")
        with pytest.raises(UsageError, match=f"^output.dir: .*{reason}"):
            check_output_folder(tmp_path / name)


class TestLoggingFolder:
    @pytest.mark.parametrize("name", ["new", "deep/new", "."])
    def test_room_for_events(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "of another run").touch()
        check_logging_folder(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["of another run"]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("file", "can't be written to: Not a directory"),
            ("file/new", "can't be written to: Not a directory"),
            ("x" * 300, "can't be written to: File name too long"),
            ("/proc/new", "can't be written to: "),
            ("circle", "is made of links that lead in a circle"),
        ],
    )
    def test_no_room(self, tmp_path: Path, name: str, reason: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "circle").symlink_to("circle")
        with pytest.raises(UsageError, match=rf"^train\.logging_dir: .*{reason}"):
            check_logging_folder(tmp_path / name)

    def test_is_checked_before_the_base(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = tmp_path / "train.yaml"
        config.write_text(
            f"base: {{model: {tmp_path}/absent}}\ndata: {{train: rows.jsonl}}\noutput: {{dir: {tmp_path}/out}}\n"
            f"train: {{logging_dir: {config}}}\n"
        )
        assert hatrack(["train", "run", str(config)]) == 2
        assert capsys.readouterr().err.endswith(
            f"hatrack: train.logging_dir: {config} can't be written to: Not a directory\n"
        )


def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"^TMPDIR: no temporary folder can be made: No such file or directory$"):
        check_temporary_folder()


def test_links_in_a_circle_are_no_output_folder_beside_events(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for output, events in (("circle", "events"), ("out", "circle")):
        TrainConfig.model_validate(
            {
                "base": {"model": "base"},
                "data": {"train": "rows.jsonl"},
                "output": {"dir": tmp_path / output},
                "train": {"logging_dir": tmp_path / events},
            }
        )
