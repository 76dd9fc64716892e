"""What is learned of a chat begins with the very tokens that the server makes of the same messages, quirks and all."""

from __future__ import annotations

from pathlib import Path

import pytest
from contract.fake_engine import BASE, BOS, EOS
from tiny import make_tokenizer
from transformers import AutoTokenizer

from hatrack.v1 import inference_pb2
from hatrack_server.api.requests import read_prompt
from hatrack_server.text.codec import TextCodec
from hatrack_trainer.data.example import IGNORED
from hatrack_trainer.data.formats import Conversation, Turn
from hatrack_trainer.data.tokens import TargetTokenizer

MESSAGES = [
    {"role": "user", "content": "  hi \n"},
    {"role": "assistant", "content": " yo  "},
    {"role": "user", "content": "\tso?"},
    {"role": "assistant", "content": "  ok  \n"},
]

QUIRKS = {
    "strips, and writes the start itself": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "no start, and a system message nobody gave": (
        "{% if messages[0].role != 'system' %}<|system|>Be kind.{{ eos_token }}\n{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "another role, and line breaks that blocks take away": (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% set role = 'model' if m.role == 'assistant' else m.role %}\n"
        "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}"
        "    {% endfor %}\n"
        "{% if add_generation_prompt %}\n{{ '<turn>model\n' }}{% endif %}"
    ),
    "no stop, and a space before the answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}


@pytest.mark.parametrize("template", QUIRKS.values(), ids=QUIRKS)
def test_training_server_and_transformers_make_the_same_tokens_of_a_chat(tmp_path: Path, template: str) -> None:
    make_tokenizer(chat_template=template).save_pretrained(tmp_path)
    codec, theirs = TextCodec(tmp_path), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    turns = [Turn(**message, field="messages") for message in MESSAGES]
    example = TargetTokenizer(codec, [EOS]).tokenise(Conversation(turns))

    chat = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=MESSAGES[:-1]))
    served = list(read_prompt(chat, codec, BASE))
    assert served == theirs.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(served)] == served
    assert served.count(BOS) == template.count("bos_token")

    answer = example.input_ids[len(served) :]
    assert example.labels == [IGNORED] * len(served) + answer
    assert answer[-1] == EOS
    assert EOS not in answer[:-1]
    whole = theirs.apply_chat_template(MESSAGES, return_dict=False)
    assert [*whole, EOS][: len(example.input_ids)] == example.input_ids
