from __future__ import annotations

from pathlib import Path

import pytest

from hatrack_trainer.config import load_config
from hatrack_trainer.errors import ConfigError

MINIMAL = "base: {model: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "train.yaml"
    file.write_text(text)
    return file


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "adapter:\n"))
    assert config.base.quantization == "nf4"
    assert config.data.train == Path("rows.jsonl")
    assert config.adapter.target_modules == "all-linear"
    assert config.train.optimizer == "paged_adamw_32bit"


def test_the_example_is_valid() -> None:
    config = load_config(Path(__file__).parents[3] / "examples" / "train.yaml")
    assert config.data.train.name == "greetings.jsonl"


def test_a_number_that_yaml_takes_for_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "train: {learning_rate: 2e-4}\n")).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {learning_rat: 0.1}", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("trian: {epochs: 1}", "trian: unknown key; did you mean train?"),
        ("train: {zzz: 1}", "train.zzz: unknown key"),
        ("train: {batch_size: 0}", "train.batch_size: input should be greater than or equal to 1"),
        ("train: {batch_size: '8'}", "train.batch_size: input should be a valid integer"),
        ("train: {batch_size: true}", "train.batch_size: input should be a valid integer"),
        ("train: {learning_rate: .nan}", "train.learning_rate: input should be a finite number"),
        ("train: {schedule: step}", "train.schedule: input should be 'constant', 'linear' or 'cosine'"),
        ("adapter: {target_modules: 3}", "adapter.target_modules: input should be a valid list"),
        (
            "adapter: {target_modules: []}",
            "adapter.target_modules: list should have at least 1 item after validation, not 0",
        ),
        ("train: {seed: 4294967296}", "train.seed: input should be less than 4294967296"),
        ("train: [epochs]", "train: must be a section, with keys of its own"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = write(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {sentence}"


def test_a_misspelt_required_key_is_reported_as_misspelt(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("train: rows", "trian: rows"))
    with pytest.raises(ConfigError, match=r"data\.trian: unknown key; did you mean train\?"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {train: a}\noutput: {dir: b}", "base: missing"),
        ("- a list", "must hold the sections base, adapter, data, train, output"),
        ("base: {model: [", "not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(write(tmp_path, text))


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "absent.yaml")
