from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, models, normalizers

from hatrack_server.text.codec import TextCodec
from hatrack_trainer.config import DataSection
from hatrack_trainer.data.detect import FORMATS, SHAPES
from hatrack_trainer.data.problems import InvalidData
from hatrack_trainer.data.read import ExampleSet, read_data, read_examples
from hatrack_trainer.data.tokens import TargetTokenizer
from hatrack_trainer.errors import DataError

EOS = 257
ASK: Any = {"role": "user", "content": "a"}
ANSWER: Any = {"role": "assistant", "content": "b"}
ROWS: dict[str, Any] = {
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [ASK, ANSWER]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text": {"text": "ab"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


def read(checkpoint: Path, folder: Path, *rows: Any, max_length: int = 64, format_name: str = "auto") -> ExampleSet:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_examples(file, TargetTokenizer(TextCodec(checkpoint), [EOS]), max_length, format_name)


def problems(checkpoint: Path, folder: Path, *rows: Any, **options: Any) -> list[str]:
    with pytest.raises(InvalidData) as caught:
        read(checkpoint, folder, *rows, **options)
    return [line.removeprefix(f"{folder}/rows.jsonl:") for line in str(caught.value).splitlines()]


def test_the_configuration_names_every_format() -> None:
    assert get_args(DataSection.model_fields["format"].annotation) == ("auto", *FORMATS)
    assert ROWS.keys() == FORMATS.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_told_from_the_keys(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    found = read(tiny_llama, tmp_path, ROWS[name], {**ROWS[name], "id": 7})
    assert found.format.name == name
    assert [line.number for line in found.lines] == [1, 2]
    assert found.examples[0].labels[-1] == EOS


def test_a_chat_in_other_words_gives_the_same_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    names = ("chat", "alpaca", "sharegpt")
    chat, alpaca, sharegpt = (read(tiny_llama, tmp_path, ROWS[name]).examples for name in names)
    assert chat == alpaca == sharegpt


def test_alpaca_s_input_stands_below_the_instruction(tiny_llama: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "sum up\nthis"}, ANSWER]}
    alpaca = {"instruction": "sum up", "input": "this", "output": "b"}
    assert read(tiny_llama, tmp_path, alpaca).examples == read(tiny_llama, tmp_path, chat).examples
    without = {"instruction": "sum up", "input": None, "output": "b"}
    assert "this" not in TextCodec(tiny_llama).decode(read(tiny_llama, tmp_path, without).examples[0].input_ids)


class TestPreferences:
    def test_a_pair_is_two_completions_of_one_prompt(self, tiny_llama: Path, tmp_path: Path) -> None:
        chosen, rejected = read(tiny_llama, tmp_path, ROWS["preference"]).examples
        assert [chosen] == read(tiny_llama, tmp_path, {"prompt": "a", "completion": "b"}).examples
        assert [rejected] == read(tiny_llama, tmp_path, {"prompt": "a", "completion": "c"}).examples

    def test_a_pair_of_chats(self, tiny_llama: Path, tmp_path: Path) -> None:
        worse = {"role": "assistant", "content": "c"}
        found = read(tiny_llama, tmp_path, {"prompt": [ASK], "chosen": [ANSWER], "rejected": [worse]})
        assert len(found.lines) == 1
        assert found.examples[:1] == read(tiny_llama, tmp_path, {"messages": [ASK, ANSWER]}).examples
        assert found.examples[1:] == read(tiny_llama, tmp_path, {"messages": [ASK, worse]}).examples

    def test_equal_ends_teach_nothing(self, tiny_llama: Path, tmp_path: Path) -> None:
        row = {"prompt": "a", "chosen": "b", "rejected": "b"}
        assert problems(tiny_llama, tmp_path, row) == ["1: rejected: is the same as chosen"]

    def test_text_and_chat_don_t_mix_in_a_row(self, tiny_llama: Path, tmp_path: Path) -> None:
        row = {"prompt": "a", "chosen": [ANSWER], "rejected": [ASK]}
        assert problems(tiny_llama, tmp_path, row) == [
            "1: prompt: must be an array, not text",
            "1: rejected: the last one must be the assistant's",
        ]

    def test_ends_that_answer_different_conversations(self, tiny_llama: Path, tmp_path: Path) -> None:
        longer = {"prompt": [ASK], "chosen": [ANSWER, ASK, ANSWER], "rejected": [ANSWER]}
        sentence = "1: rejected: must differ from chosen in the last message alone"
        assert problems(tiny_llama, tmp_path, longer) == [sentence]

    def test_a_pair_is_never_cut(self, tiny_llama: Path, tmp_path: Path) -> None:
        row = {"prompt": "a", "chosen": "b", "rejected": "bcd"}
        assert len(read(tiny_llama, tmp_path, row, max_length=6).examples) == 2
        sentence = "1: rejected: its 6 tokens, with the prompt's, are more than max_length=5"
        assert problems(tiny_llama, tmp_path, row, max_length=5) == [sentence]

    def test_pairs_and_other_rows_don_t_share_a_run(self, tiny_llama: Path, tmp_path: Path) -> None:
        files = {name: tmp_path / f"{name}.jsonl" for name in ("preference", "text")}
        for name, file in files.items():
            file.write_text(json.dumps(ROWS[name]))
        section = DataSection(train=files["preference"], eval=files["text"])
        with pytest.raises(DataError, match=r"text\.jsonl: preference pairs and other rows can't share a run$"):
            read_data(section, tiny_llama)

    def test_pairs_are_compared_by_one_answer(self, tiny_llama: Path, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(ROWS["preference"]))
        with pytest.raises(DataError, match=r"compared by their last answers: leave out data\.loss$"):
            read_data(DataSection(train=file, loss="assistant"), tiny_llama)


class TestDetection:
    def test_a_first_row_that_lacks_a_key_doesn_t_decide(self, tiny_llama: Path, tmp_path: Path) -> None:
        found = problems(tiny_llama, tmp_path, {"prompt": "a"}, ROWS["alpaca"])
        assert found == ["1: instruction: missing", "1: output: missing"]

    def test_misspelt_keys_still_tell(self, tiny_llama: Path, tmp_path: Path) -> None:
        assert problems(tiny_llama, tmp_path, {"promt": "a", "completions": "b"}) == [
            '1: promt: unknown key (did you mean "prompt"?)',
            '1: completions: unknown key (did you mean "completion"?)',
        ]

    def test_a_named_format_needs_no_telling(self, tiny_llama: Path, tmp_path: Path) -> None:
        both = {**ROWS["alpaca"], **ROWS["text"]}
        found = problems(tiny_llama, tmp_path, both)
        assert found == ["1: can be read as alpaca and as text: name one in data.format"]
        assert read(tiny_llama, tmp_path, both, format_name="text").examples[0].learned == 3

    def test_a_named_format_that_the_rows_don_t_have(self, tiny_llama: Path, tmp_path: Path) -> None:
        found = problems(tiny_llama, tmp_path, ROWS["text"], format_name="chat")
        assert found == ["1: messages: missing"]

    def test_keys_that_are_not_read(self, tiny_llama: Path, tmp_path: Path) -> None:
        found = read(tiny_llama, tmp_path, ROWS["alpaca"], {"instruction": "a", "imput": "x", "output": "b", "id": 1})
        assert {key: len(lines) for key, lines in found.format.unread(found.lines).items()} == {"imput": 1, "id": 1}
        assert list(found.format.misspelt(found.lines)) == [("imput", "input")]

    def test_an_extra_key_beside_the_one_it_resembles_is_no_misspelling(self, tiny_llama: Path, tmp_path: Path) -> None:
        found = read(tiny_llama, tmp_path, {**ROWS["alpaca"], "inputs": 1})
        assert found.format.misspelt(found.lines) == {}


class TestLength:
    def test_a_long_row_loses_its_end_and_is_counted(self, tiny_llama: Path, tmp_path: Path) -> None:
        rows = '{"prompt": "ab", "completion": "cdef"}', "", '{"prompt": "a", "completion": "b"}'
        found = read(tiny_llama, tmp_path, *rows, max_length=5)
        assert [line.number for line in found.truncated] == [1]
        assert [len(example.input_ids) for example in found.examples] == [5, 4]
        assert [entry.length for entry in found.entries] == [8, 4]
        assert EOS not in found.examples[0].labels

    def test_one_learned_token_is_enough(self, tiny_llama: Path, tmp_path: Path) -> None:
        row = {"prompt": "abc", "completion": "d"}
        assert read(tiny_llama, tmp_path, row, max_length=5).examples[0].learned == 1
        sentence = "1: the prompt's 4 tokens leave nothing of the completion in max_length=4"
        assert problems(tiny_llama, tmp_path, row, max_length=4) == [sentence]


def test_text_of_which_the_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": EOS - 1}, unk_token="a"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert problems(tmp_path, tmp_path, {"text": "  "}) == ["1: no token of it can be learned"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tiny_llama: Path, tmp_path: Path) -> None:
    row = ROWS["prompt-completion"]
    found = read(tiny_llama, tmp_path, "\ufeff" + json.dumps(row))
    assert found.examples == read(tiny_llama, tmp_path, row).examples


def test_line_separators_inside_text_and_windows_line_ends_are_fine(tiny_llama: Path, tmp_path: Path) -> None:
    rows = '{"prompt": "a\u2028b", "completion": "c"}\r', '{"prompt": "a", "completion": "b"}\r'
    assert [line.number for line in read(tiny_llama, tmp_path, *rows).lines] == [1, 2]
