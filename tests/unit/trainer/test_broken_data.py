"""What each way to break a file is called: the list that both `train validate` and `train run` print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hatrack_client.cli import run as hatrack
from hatrack_server.text.codec import TextCodec
from hatrack_trainer.data.problems import InvalidData
from hatrack_trainer.data.read import read_examples
from hatrack_trainer.data.tokens import TargetTokenizer

EOS = 257
GOOD = '{"prompt": "a", "completion": "b"}\n'
ASK = '{"role": "user", "content": "a"}'
ANSWER = '{"role": "assistant", "content": "b"}'
ENDLESS = "k" * 40 + " … " + "k" * 40


def chat(*messages: str) -> str:
    return f'{{"messages": [{", ".join(messages)}]}}'


BROKEN: dict[str, tuple[str | bytes, list[str]]] = {
    # the file
    "empty": ("", [": holds no rows"]),
    "blank lines": ("\n  \n\n", [": holds no rows"]),
    "UTF-16": (GOOD.encode("utf-16"), [": is UTF-16: save it as UTF-8"]),
    "Latin-1": (GOOD.encode() + '{"prompt": "café"}'.encode("latin-1"), [":2: not UTF-8: byte 0xe9 at column 16"]),
    "one array": (
        '[\n {"prompt": "a",\n  "completion": "b"}\n]',
        [": is one JSON array: write one object per line, as `jq -c '.[]'` does"],
    ),
    # the line
    "an array among the rows": (GOOD + "[1]\n", [":2: must be a JSON object, not an array"]),
    "a comma too few": (
        GOOD + '{"prompt": "a" "completion": "b"}',
        [":2: not JSON: expecting ',' delimiter at column 16"],
    ),
    "not a number": (GOOD + '{"prompt": "a", "completion": NaN}', [":2: not JSON: NaN is not a number in JSON"]),
    "one key twice": (
        GOOD + '{"prompt": "a", "completion": "b", "prompt": "c"}',
        [':2: the key "prompt" comes twice in one object'],
    ),
    "nested without end": (GOOD + "[" * 100_000, [":2: not JSON: nested too deeply"]),
    "one array without end": ("[" * 100_000, [":1: not JSON: nested too deeply"]),
    # its format
    "unknown keys": (
        '{"question": "a", "answer": "b"}',
        [':1: has "question", "answer": no format that is known'],
    ),
    "an endless key": (
        json.dumps({"k" * 3_000_000: 1}),
        [f':1: has "{ENDLESS}": no format that is known'],
    ),
    "keys without end": (
        json.dumps(dict.fromkeys(map(str, range(100_000)))),
        [":1: has " + ", ".join(f'"{key}"' for key in range(20)) + " and 99980 more: no format that is known"],
    ),
    "no keys": ("{}", [":1: has no keys: no format that is known"]),
    "two formats in a file": (
        GOOD + chat(ASK, ANSWER),
        [":2: is chat, but line 1 is prompt-completion: a file holds one format"],
    ),
    "two formats in a row": (
        '{"prompt": "a", "completion": "b", "messages": []}',
        [":1: can be read as prompt-completion and as chat: name one in data.format"],
    ),
    # its fields
    "a key too few": ('{"prompt": "a"}', [":1: completion: missing"]),
    "a misspelt key": (
        GOOD + '{"prompt": "a", "completon": "b"}',
        [':2: completon: unknown key (did you mean "completion"?)'],
    ),
    "a number for text": (GOOD + '{"prompt": 1, "completion": "b"}', [":2: prompt: must be text, not a number"]),
    "a number of any length": (
        '{"prompt": "a", "completion": ' + "9" * 5000 + "}",
        [":1: completion: must be text, not a number"],
    ),
    "null for text": (GOOD + '{"prompt": "a", "completion": null}', [":2: completion: must be text, not null"]),
    "nothing to learn": (GOOD + '{"prompt": "a", "completion": ""}', [":2: completion: is empty"]),
    "half a surrogate pair": (
        GOOD + r'{"prompt": "a", "completion": "\ud83d"}',
        [":2: completion: holds half of a surrogate pair"],
    ),
    # its messages
    "messages that are text": ('{"messages": "hi"}', [":1: messages: must be an array, not text"]),
    "a message that is a number": (chat("7", ANSWER), [":1: messages[0]: must be an object, not a number"]),
    "a message in parts": (
        chat('{"role": "user", "content": [{"type": "text", "text": "a"}]}', ANSWER),
        [":1: messages[0].content: must be text, not an array"],
    ),
    "a misspelt role": (
        chat(ASK, ANSWER, '{"role": "asistant", "content": "b"}'),
        [':1: messages[2].role: "asistant" (did you mean "assistant"?)'],
    ),
    "an unknown role": (
        chat('{"role": "critic", "content": "a"}', ANSWER),
        [':1: messages[0].role: "critic" is none of system, developer, user, assistant, tool'],
    ),
    "an endless role": (
        chat(json.dumps({"role": "k" * 2_000_000, "content": "a"}), ANSWER),
        [f':1: messages[0].role: "{ENDLESS}" is none of system, developer, user, assistant, tool'],
    ),
    "a misspelt key of a message": (
        chat('{"role": "user", "contents": "a"}', ANSWER),
        [':1: messages[0].contents: unknown key (did you mean "content"?)'],
    ),
    "no answer": (chat(ASK, ANSWER, ASK), [":1: messages: the last one must be the assistant's"]),
    "nobody asks": (chat(ANSWER), [":1: messages: must hold at least two messages"]),
    "a misspelt sender": (
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gtp", "value": "b"}]}',
        [':1: conversations[1].from: "gtp" (did you mean "gpt"?)'],
    ),
    # its tokens
    "a prompt that is too long": (
        GOOD + json.dumps({"prompt": "a" * 80, "completion": "b"}),
        [":2: the prompt's 81 tokens leave nothing of the completion in max_length=64"],
    ),
    "a stop inside": (
        chat(ASK, '{"role": "assistant", "content": "b</s>c"}'),
        [":1: messages[1].content: spells the base's stop token: what follows it would never be generated"],
    ),
    # all at once
    "more than one problem": (
        '{"prompt": 1}\n' + GOOD + "{\n" + '{"prompt": "a", "completion": "</s>b"}',
        [
            ":1: prompt: must be text, not a number",
            ":1: completion: missing",
            ":3: not JSON: expecting property name enclosed in double quotes at column 2",
            ":4: completion: spells the base's stop token: what follows it would never be generated",
        ],
    ),
}


def problems(checkpoint: Path, file: Path) -> InvalidData:
    with pytest.raises(InvalidData) as caught:
        read_examples(file, TargetTokenizer(TextCodec(checkpoint), [EOS]), 64)
    return caught.value


@pytest.mark.parametrize(("content", "sentences"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tiny_llama: Path, tmp_path: Path, content: str | bytes, sentences: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert str(problems(tiny_llama, file)).splitlines() == [f"{file}{sentence}" for sentence in sentences]


def test_an_absent_file(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "absent.jsonl"
    assert str(problems(tiny_llama, file)) == f"{file}: can't be read: No such file or directory"


def test_twenty_problems_are_shown_and_the_rest_counted(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("[]\n" * 25 + GOOD)
    found = problems(tiny_llama, file)
    assert len(found.problems) == 25
    assert str(found).splitlines()[-2:] == [f"{file}:20: must be a JSON object, not an array", "… and 5 more"]
    file.write_text("[]\n" * 20 + GOOD)
    assert len(str(problems(tiny_llama, file)).splitlines()) == 20


def test_no_line_of_a_list_is_broken_by_what_a_row_holds(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(r'{"a\nb": 1, "\ud83d": 2}')
    assert str(problems(tiny_llama, file)) == rf'{file}:1: has "a\nb", "\ud83d": no format that is known'


def test_no_line_of_a_list_is_broken_by_a_files_name(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "a\n\x1b[31m\u202eb.jsonl"
    file.write_text("[]\n" + GOOD)
    assert str(problems(tiny_llama, file)) == (
        rf"{tmp_path}/a\u000a\u001b[31m\u202eb.jsonl:1: must be a JSON object, not an array"
    )


@pytest.mark.parametrize("command", ["validate", "run"])
def test_both_commands_print_the_list_and_nothing_is_begun(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    rows, config, out = tmp_path / "rows.jsonl", tmp_path / "train.yaml", tmp_path / "out"
    rows.write_text('{"prompt": 1, "completion": "b"}\n' + GOOD + json.dumps({"prompt": "a" * 80, "completion": "b"}))
    config.write_text(
        f"base: {{model: {tiny_llama}}}\ndata: {{train: {rows}, max_length: 64}}\noutput: {{dir: {out}}}\n"
    )
    assert hatrack(["train", command, str(config)]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-2:] == [
        f"{rows}:1: prompt: must be text, not a number",
        f"{rows}:3: the prompt's 81 tokens leave nothing of the completion in max_length=64",
    ]
    assert (said.out, out.exists()) == ("", False)
