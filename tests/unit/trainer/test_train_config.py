from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from json_schema import fits

from hatrack_client.cli import run as hatrack
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.config_file import load_config
from hatrack_trainer.config_schema import config_schema
from hatrack_trainer.errors import ConfigError
from hatrack_trainer.methods import DEFAULT, methods, read_method
from hatrack_trainer.objective import learning_rate

MINIMAL = "base: {model: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"
EXAMPLE = Path(__file__).parents[3] / "examples" / "train.yaml"
NO_METHOD = f"adapter.method: must be one of {', '.join(methods())}"


def write(folder: Path, text: str) -> Path:
    file = folder / "train.yaml"
    file.write_text(text)
    return file


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "adapter:\n"))
    assert config.base.quantization == "nf4"
    assert config.data.train == Path("rows.jsonl")
    assert config.adapter == read_method({"method": "lora", "target_modules": "all-linear"})
    assert config.train.optimizer == "paged_adamw_32bit"


def test_the_example_is_valid() -> None:
    config = load_config(EXAMPLE)
    assert config.data.train.name == "greetings.jsonl"


def test_the_example_shows_every_method_with_all_its_keys_and_defaults() -> None:
    blocks = re.findall(r"^# (adapter: \{.*?\})", EXAMPLE.read_text(), re.DOTALL | re.MULTILINE)
    shown = [yaml.safe_load(block.replace("\n#", "\n"))["adapter"] for block in blocks]
    assert sorted(keys["method"] for keys in shown) == sorted(methods().keys() - {DEFAULT})
    for keys in shown:
        fields = methods()[keys["method"]].model_fields
        needed = {name: keys[name] for name, field in fields.items() if field.is_required() or name == "parts"}
        assert keys == read_method({"method": keys["method"], **needed}).model_dump()


def test_a_section_without_a_method_is_lora(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "adapter: {rank: 4, rslora: true}\n"))
    assert config.adapter == read_method({"method": "lora", "rank": 4, "rslora": True})
    assert config.model_dump()["adapter"]["rank"] == 4


def test_the_method_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    text = MINIMAL + "adapter: {method: ia3}\n"
    assert learning_rate(load_config(write(tmp_path, text)), pairs=False) == methods()["ia3"].default_learning_rate
    given = load_config(write(tmp_path, text + "train: {learning_rate: 2e-4}\n"))
    assert learning_rate(given, pairs=False) == learning_rate(given, pairs=True) == 2e-4


def test_a_number_that_yaml_takes_for_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "train: {learning_rate: 2e-4}\n")).train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {learning_rat: 0.1}", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("trian: {epochs: 1}", "trian: unknown key; did you mean train?"),
        ("train: {zzz: 1}", "train.zzz: unknown key"),
        ("train: {batch_size: 0}", "train.batch_size: input should be greater than or equal to 1"),
        ("train: {batch_size: 100000000000}", "train.batch_size: input should be less than or equal to 65536"),
        ("train: {max_steps: 5, warmup_steps: 5}", "train.warmup_steps: must be less than train.max_steps"),
        ("eval: {every: 3}", "eval.every: needs data.eval"),
        ('train: {logging_dir: "\\0"}', "train.logging_dir: must be a path"),
        ("train: {batch_size: '8'}", "train.batch_size: input should be a valid integer"),
        ("train: {batch_size: true}", "train.batch_size: input should be a valid integer"),
        ("train: {learning_rate: true}", "train.learning_rate: must be a number, not true"),
        ("train: {learning_rate: .nan}", "train.learning_rate: input should be a finite number"),
        ("train: {weight_decay: 1e308}", "train.weight_decay: input should be less than or equal to 100"),
        ("train: {dpo_beta: 1e308}", "train.dpo_beta: input should be less than or equal to 100"),
        ("train: {max_grad_norm: 1e-300}", "train.max_grad_norm: input should be greater than or equal to 0.000001"),
        ("train: {neftune_alpha: 1e308}", "train.neftune_alpha: input should be less than or equal to 1000"),
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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {epochs: 1}\ntrain: {seed: 1}", ":5: train: is given twice, first on line 4"),
        ("train:\n  epochs: 1\n  seed: 1\n  epochs: 2\n", ":7: epochs: is given twice, first on line 5"),
        ("train: {epochs: 1, epochs: 2}", ":4: epochs: is given twice, first on line 4"),
    ],
)
def test_a_key_that_is_given_twice_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    file = write(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}{sentence}"


class TestChanges:
    def test_stand_in_place_of_the_files(self, tmp_path: Path) -> None:
        file = write(tmp_path, MINIMAL + "train: {epochs: 3, seed: 4}")
        changes = ["train.learning_rate=1e-4", "adapter.method=dora", "data.train=x=y.jsonl", "train.seed=5"]
        config = load_config(file, [*changes, "adapter.target_modules=[q_proj, v_proj]", "train.max_steps="])
        assert (config.train.learning_rate, config.train.epochs, config.train.seed) == (1e-4, 3, 5)
        assert config.adapter == read_method({"method": "dora", "target_modules": ["q_proj", "v_proj"]})
        assert config.data.train == Path("x=y.jsonl")
        assert config.train.max_steps is None

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ("foo", "foo: must be SECTION.KEY=VALUE, as in train.epochs=3"),
            ("train.epochs", "train.epochs: must be SECTION.KEY=VALUE, as in train.epochs=3"),
            ("epochs=3", "epochs=3: must be SECTION.KEY=VALUE, as in train.epochs=3"),
            ("train.a.b=3", "train.a.b=3: must be SECTION.KEY=VALUE, as in train.epochs=3"),
        ],
    )
    def test_of_another_form(self, tmp_path: Path, change: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, MINIMAL), [change])
        assert str(caught.value) == f"--set {sentence}"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ("train.learning_rat=1", "--set: train.learning_rat: unknown key; did you mean learning_rate?"),
            ("trian.epochs=1", "--set: trian: unknown key; did you mean train?"),
            ("adapter.rang=1", "--set: adapter.rang: unknown key; did you mean rank?"),
            ("adapter.method=lorra", f"--set: {NO_METHOD}"),
            ("data.train=", "--set: data.train: must be a path"),
            ("eval.every=3", "--set: eval.every: needs data.eval"),
            ("data.max_length=" + "9" * 30, "--set: data.max_length: input should be less than or equal to 10000000"),
            ("train.batch_size=0", "--set: train.batch_size: input should be greater than or equal to 1"),
        ],
    )
    def test_with_a_wrong_key_or_value(self, tmp_path: Path, change: str, sentence: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, MINIMAL), ["train.epochs=2", change])
        assert str(caught.value) == sentence

    def test_that_are_not_yaml(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^--set train\.epochs: not YAML: "):
            load_config(write(tmp_path, MINIMAL), ["train.epochs=["])

    def test_leave_the_files_mistakes_to_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, MINIMAL + "train: {epochs: 0}")
        with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: train.epochs: "):
            load_config(file, ["train.seed=1"])


def shown_configurations() -> list[dict[str, Any]]:
    """The example, and once again with each adapter section that it shows."""
    text = EXAMPLE.read_text()
    blocks = re.findall(r"^# (adapter: \{.*?\})", text, re.DOTALL | re.MULTILINE)
    example = yaml_1_2(text)
    return [example, *({**example, **yaml_1_2(block.replace("\n#", "\n"))} for block in blocks)]


def yaml_1_2(text: str) -> Any:
    """As editors read it: `1e-3` is a number."""
    return yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", text))


class TestSchema:
    def test_takes_every_configuration_that_the_example_shows(self) -> None:
        shown = shown_configurations()
        assert len(shown) == len(methods())
        for sections in shown:
            assert fits(sections, config_schema())

    @pytest.mark.parametrize(
        "changes",
        [
            {"train": {"learning_rat": 1}},
            {"train": {"batch_size": 0}},
            {"train": {"learning_rate": 0}},
            {"adapter": {"method": "lorra"}},
            {"adapter": {"tokens": 3}},
            {"adapter": {"method": "llama_adapter"}},
            {"base": None},
            {"extra": {}},
        ],
    )
    def test_takes_no_wrong_ones(self, changes: dict[str, Any]) -> None:
        minimal = yaml.safe_load(MINIMAL)
        assert fits(minimal, config_schema())
        assert not fits(minimal | changes, config_schema())

    def test_explains_the_keys(self) -> None:
        definitions = config_schema()["$defs"]
        assert definitions["TrainSection"]["properties"]["batch_size"]["description"] == "Rows in memory at once."

    def test_is_printed_without_torch(self) -> None:
        code = "import sys; from hatrack_client.cli import run; sys.exit(run() or 70 * ('torch' in sys.modules))"
        command = [sys.executable, "-c", code, "train", "schema"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == config_schema()


def test_a_misspelt_required_key_is_reported_as_misspelt(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL.replace("train: rows", "trian: rows"))
    with pytest.raises(ConfigError, match=r"data\.trian: unknown key; did you mean train\?"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {train: a}\noutput: {dir: b}", "base: missing"),
        ("- a list", f"must hold the sections {', '.join(TrainConfig.model_fields)}"),
        ("base: {model: [", "not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(write(tmp_path, text))


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ("{method: lorra}", NO_METHOD),
        ("{method: [lora], rang: 4}", NO_METHOD),
        ("[lora]", "adapter: must be a section, with keys of its own"),
        ("{method: lora, rang: 4}", "adapter.rang: unknown key; did you mean rank?"),
        ("{rank: 1000000000000000000}", "adapter.rank: input should be less than or equal to 4096"),
        ("{method: adalora, initial_rank: 4097}", "adapter.initial_rank: input should be less than or equal to 4096"),
        ("{alpha: " + "9" * 400 + "}", "adapter.alpha: input should be less than or equal to 1000000"),
        ("{method: p_tuning, tokens: 100001}", "adapter.tokens: input should be less than or equal to 100000"),
        (
            "{method: llama_adapter, layers: 1, tokens: 1000000000000}",
            "adapter.tokens: input should be less than or equal to 100000",
        ),
        ("{method: vera, initial_scale: 1e300}", "adapter.initial_scale: input should be less than or equal to 1000"),
        ("{" + "k" * 1000 + ": 1}", f"adapter.{'k' * 40} … {'k' * 40}: unknown key"),
        ("{method: prefix_tuning, token: 4}", "adapter.token: unknown key; did you mean tokens?"),
        ("{method: prefix_tuning, rank: 4}", "adapter.rank: unknown key"),
        ("{method: lora, rank: 0}", "adapter.rank: input should be greater than or equal to 1"),
        ("{method: rslora, rslora: false}", "adapter.rslora: input should be True"),
        ("{method: dora, dropout: 0.91}", "adapter.dropout: input should be less than or equal to 0.9"),
        ("{method: loha, rank: 4.5}", "adapter.rank: input should be a valid integer"),
        ("{method: loha, decompose_both: true}", "adapter.decompose_both: unknown key"),
        ("{method: lokr, decompose_factor: 0}", "adapter.decompose_factor: must be positive, or -1"),
        ("{method: lokr, rank_dropout: -1}", "adapter.rank_dropout: input should be greater than or equal to 0"),
        ("{method: adalora, rank: 12}", "adapter: initial_rank must be more than rank"),
        (
            "{method: adalora, prune_from: 0.5, prune_until: 0.5}",
            "adapter: prune_until must be more than prune_from",
        ),
        ("{method: vera, initial_scale: 0}", "adapter.initial_scale: input should be greater than 0"),
        (
            "{method: ia3, target_modules: [a], feedforward_modules: [b]}",
            "adapter: feedforward_modules: b is not in target_modules",
        ),
        ("{method: bottleneck, placement: up}", "adapter.placement: input should be 'houlsby' or 'pfeiffer'"),
        ("{method: llama_adapter}", "adapter.layers: missing"),
        ("{method: partial}", "adapter: partial needs parts, some of norms, biases and lm_head, or last_layers"),
        ("{method: partial, parts: [head]}", "adapter.parts: input should be 'norms', 'biases' or 'lm_head'"),
        ("{method: prompt_tuning, init: text}", "adapter.init: input should be 'vocabulary' or 'random'"),
        ("{method: p_tuning, hidden_size: 0}", "adapter.hidden_size: input should be greater than or equal to 1"),
        (
            "{method: prefix_tuning}\ntrain: {activation_checkpointing: true}",
            "train.activation_checkpointing: does not work with adapter.method prefix_tuning",
        ),
    ],
)
def test_a_wrong_key_of_a_method_is_named(tmp_path: Path, adapter: str, sentence: str) -> None:
    file = write(tmp_path, f"{MINIMAL}adapter: {adapter}")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {sentence}"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2024-13-45", "'2024-13-45' is no timestamp"),
        ("!!timestamp foo", "'foo' is no timestamp"),
        ("!!bool foo", "'foo' is no bool"),
        ('!!int ""', "'' is no int"),
        ('!!float ""', "'' is no float"),
        ("9" * 5000, f"'{'9' * 40} … {'9' * 40}' is no int"),
        ("!foo 3", "could not determine a constructor for the tag '!foo'"),
        ("\7", r"'\x07': special characters are not allowed"),
        ("@", "while scanning for the next token, found character '@' that cannot start any token"),
    ],
)
def test_what_yaml_can_not_make_a_value_of_is_one_sentence(tmp_path: Path, value: str, reason: str) -> None:
    file = write(tmp_path, f"{MINIMAL}eval:\n  every: {value}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}:5: not YAML: {reason}"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), [f"eval.every={value}"])
    assert str(caught.value) == f"--set eval.every: not YAML: {reason}"


def test_yaml_that_is_nested_without_end(tmp_path: Path) -> None:
    file = write(tmp_path, "base: " + "[" * 3000)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: not YAML: nested too deeply$"):
        load_config(file)


def test_what_controls_a_terminal_is_printed_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MINIMAL + r'"\e[31m\u202eb\nc": 1')
    assert hatrack(["train", "run", str(file)]) == 2
    assert capsys.readouterr().err == f"hatrack: {file}: \\u001b[31m\\u202eb c: unknown key\n"
