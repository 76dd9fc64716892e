from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer

from hatrack_server.errors import InvalidRequest
from hatrack_server.text.codec import ChatMessage, TextCodec

BOS, EOS = 256, 257
MESSAGES: list[ChatMessage] = [{"role": "user", "content": "Hi, 你!"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(checkpoint: Path) -> TextCodec:
    return TextCodec(checkpoint)


def with_template(checkpoint: Path, tmp_path: Path, template: object) -> TextCodec:
    """The same tokenizer with a template inside tokenizer_config.json, as older checkpoints have it."""
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<s>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return TextCodec(tmp_path)


def test_encodes_as_transformers_does(codec: TextCodec) -> None:
    tokenizer = make_tokenizer()
    assert codec.encode("Grüße 😀") == tokenizer("Grüße 😀")["input_ids"]
    for generation in (True, False):
        expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=generation, return_dict=False)
        assert codec.encode_chat(MESSAGES, add_generation_prompt=generation) == expected


def test_a_spelled_out_bos_is_not_doubled(codec: TextCodec) -> None:
    assert codec.encode("<s>a") == codec.encode("a")
    assert codec.encode("a")[0] == BOS
    assert codec.encode("a<s>").count(BOS) == 2


def test_decode_and_detokenizer_skip_special_tokens(codec: TextCodec) -> None:
    ids = [*codec.encode("né"), EOS]
    assert codec.decode(ids) == "né"
    assert codec.detokenizer().push(ids) == "né"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, [{"name": "default", "template": CHAT_TEMPLATE}]])
def test_a_template_in_the_config(codec: TextCodec, checkpoint: Path, tmp_path: Path, template: object) -> None:
    assert with_template(checkpoint, tmp_path, template).encode_chat(MESSAGES) == codec.encode_chat(MESSAGES)


def test_no_template(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        with_template(checkpoint, tmp_path, None).encode_chat(MESSAGES)
    assert caught.value.field == "chat"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 + messages }}", "can't render")],
)
def test_a_template_that_refuses(checkpoint: Path, tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        with_template(checkpoint, tmp_path, template).encode_chat(MESSAGES)
    assert caught.value.field == "chat.messages"


@pytest.mark.parametrize("module", ["hatrack_server.text.codec", "hatrack_server.app", "hatrack_server.commands"])
def test_the_front_process_never_imports_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
