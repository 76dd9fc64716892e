from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hatrack_server.text.codec import TextCodec
from hatrack_trainer.data import IGNORED, Example, read_examples, stop_token_ids
from hatrack_trainer.errors import DataError

BOS, EOS = 256, 257


def read(checkpoint: Path, folder: Path, *rows: Any, max_length: int = 64, stops: tuple[int, ...] = (EOS,)) -> Example:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_examples(file, TextCodec(checkpoint), stops, max_length).examples[-1]


def test_loss_is_on_the_completion_and_its_end_alone(tiny_llama: Path, tmp_path: Path) -> None:
    example = read(tiny_llama, tmp_path, {"prompt": "ab", "completion": "cd"})
    codec = TextCodec(tiny_llama)
    assert example.input_ids == [*codec.encode("abcd"), EOS]
    assert example.labels == [IGNORED] * 3 + [*codec.encode("cd")[1:], EOS]
    assert example.input_ids[0] == BOS


def test_an_empty_prompt_is_the_start_token(tiny_llama: Path, tmp_path: Path) -> None:
    example = read(tiny_llama, tmp_path, {"prompt": "", "completion": "x"})
    assert example.labels[0] == IGNORED
    assert example.labels[1:] == example.input_ids[1:]


def test_a_chat_is_tokenised_as_it_is_served(tiny_llama: Path, tmp_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    example = read(tiny_llama, tmp_path, {"messages": messages})
    codec = TextCodec(tiny_llama)
    served = codec.encode_chat(messages[:1], add_generation_prompt=True)
    assert example.input_ids[: len(served)] == served
    assert example.labels[: len(served)] == [IGNORED] * len(served)
    assert codec.decode(example.labels[len(served) :]) == "yo\n"
    assert example.labels[-1] == EOS


def test_a_chat_ends_at_the_template_s_own_stop(tiny_llama: Path, tmp_path: Path) -> None:
    newline = TextCodec(tiny_llama).encode("\n")[-1]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    example = read(tiny_llama, tmp_path, {"messages": messages}, stops=(EOS, newline))
    assert example.labels[-1] == newline


def test_a_long_row_loses_its_end_and_is_counted(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "ab", "completion": "cdef"}\n\n{"prompt": "a", "completion": "b"}\n')
    found = read_examples(file, TextCodec(tiny_llama), [EOS], 5)
    assert found.truncated == 1
    assert [len(example.input_ids) for example in found.examples] == [5, 4]
    assert EOS not in found.examples[0].labels


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "2: not JSON: "),
        ("[]", "2: must be a JSON object"),
        ({"instruction": "a", "output": "b"}, "2: must have either messages, or prompt and completion"),
        ({"prompt": "a"}, "2: completion: missing or not text"),
        ({"prompt": 1, "completion": "b"}, "2: prompt: missing or not text"),
        ({"prompt": "a", "completion": ""}, "2: completion: is empty"),
        ({"prompt": "a" * 80, "completion": "b"}, "2: the prompt's 81 tokens leave nothing of the completion in max_l"),
        ({"messages": "hi"}, "2: messages: must be a list of at least two"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "2: messages: the last"),
        ({"messages": [{"role": "user"}, {}]}, r"2: messages\[0\].content: missing or not text"),
        ({"messages": [7, {}]}, r"2: messages\[0\]: must be an object"),
    ],
)
def test_a_wrong_row_is_named(tiny_llama: Path, tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:{sentence}"):
        read(tiny_llama, tmp_path, {"prompt": "a", "completion": "b"}, row)


def test_a_base_without_a_chat_template_refuses_chats(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="1: messages: this model has no chat template"):
        read(tmp_path, tmp_path, {"messages": messages})


def test_a_byte_order_mark_is_no_part_of_the_first_row(tiny_llama: Path, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    assert read(tiny_llama, tmp_path, "\ufeff" + json.dumps(row)) == read(tiny_llama, tmp_path, row)


def test_a_file_without_rows(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read(tiny_llama, tmp_path, "\n")


def test_stop_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert stop_token_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert stop_token_ids(tmp_path) == [7, 8]


def test_a_base_that_never_stops_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="never learn to stop"):
        stop_token_ids(tmp_path)
