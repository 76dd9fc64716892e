from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from hatrack_server.errors import StartupError
from hatrack_server.text.codec import ChatMessage, TextCodec
from hatrack_trainer.config import DataSection
from hatrack_trainer.data import IGNORED, Example
from hatrack_trainer.data.formats import Completion, Conversation, Document, Target, Turn
from hatrack_trainer.data.problems import WrongRow
from hatrack_trainer.data.read import read_data
from hatrack_trainer.data.tokens import Loss, TargetTokenizer, stop_token_ids
from hatrack_trainer.errors import DataError

BOS, EOS = 256, 257
TALK = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")]
STOPPING = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenise(
    checkpoint: Path, target: Target, *, stops: tuple[int, ...] = (EOS,), loss: Loss = "completion"
) -> Example:
    return TargetTokenizer(TextCodec(checkpoint), stops, loss).tokenise(target)


def completion(prompt: str, text: str) -> Completion:
    return Completion(prompt, text, "completion")


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation([Turn(role, text, f"messages[{index}].content") for index, (role, text) in enumerate(turns)])


def messages(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [{"role": role, "content": text} for role, text in turns]


def flaws(checkpoint: Path, target: Target, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(WrongRow) as caught:
        tokenise(checkpoint, target, **options)
    return [(flaw.field, flaw.what) for flaw in caught.value.flaws]


def with_template(folder: Path, template: str) -> Path:
    make_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


def chat_of(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


class TestLongPrompts:
    LONG = "word " * 2_000_000

    @pytest.mark.parametrize("row", [{"prompt": LONG, "completion": "a"}, {"messages": chat_of(LONG)}])
    def test_are_refused_at_once(self, tiny_llama: Path, tmp_path: Path, row: dict[str, Any]) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row))
        began = time.process_time()
        with pytest.raises(DataError, match=r":1: the prompt leaves nothing of the completion in max_length=1024$"):
            read_data(DataSection(train=file), tiny_llama)
        assert time.process_time() - began < 2  # in full they take ten times that

    def test_fit_where_the_tokenizer_drops_most_of_them(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for prompt in ("a" + " " * 10_000 + "b", "x" * 10_000):
            own = TargetTokenizer(TextCodec(tmp_path), [3])
            assert not own.exceeds(completion(prompt, " a"), 4)
            assert len(own.tokenise(completion(prompt, " a")).input_ids) <= 4
        assert own.exceeds(completion("a b " * 10_000, "a"), 4)

    def test_that_are_short_are_not_told_before_they_are_tokenised(self, tiny_llama: Path) -> None:
        own = TargetTokenizer(TextCodec(tiny_llama), [EOS])
        assert not own.exceeds(completion("a" * 20, "b"), 4)
        assert not own.exceeds(Document("a" * 20_000), 4)


class TestCompletions:
    def test_loss_is_on_the_completion_and_its_end_alone(self, tiny_llama: Path) -> None:
        example = tokenise(tiny_llama, completion("ab", "cd"))
        codec = TextCodec(tiny_llama)
        assert example.input_ids == [*codec.encode("abcd"), EOS]
        assert example.labels == [IGNORED] * 3 + [*codec.encode("cd")[1:], EOS]
        assert example.input_ids[0] == BOS
        assert example.learned == 3

    def test_an_empty_prompt_is_the_start_token(self, tiny_llama: Path) -> None:
        example = tokenise(tiny_llama, completion("", "x"))
        assert example.labels[0] == IGNORED
        assert example.labels[1:] == example.input_ids[1:]

    def test_a_spelled_out_stop_at_the_end_is_not_doubled(self, tiny_llama: Path) -> None:
        assert tokenise(tiny_llama, completion("ab", "cd</s>")) == tokenise(tiny_llama, completion("ab", "cd"))

    def test_a_stop_inside_would_hide_what_follows(self, tiny_llama: Path) -> None:
        sentence = "spells the base's stop token: what follows it would never be generated"
        assert flaws(tiny_llama, completion("ab", "c</s>d")) == [("completion", sentence)]

    def test_raw_text_is_learned_from_its_second_token_on(self, tiny_llama: Path) -> None:
        example = tokenise(tiny_llama, Document("ab"))
        assert example.input_ids == [*TextCodec(tiny_llama).encode("ab"), EOS]
        assert example.labels == [IGNORED, *example.input_ids[1:]]


class TestBorders:
    """The prompt's tokens are the server's, whatever the completion begins with."""

    def test_a_token_that_spans_the_border(self, tmp_path: Path) -> None:
        model = models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3, "</s>": 4}, merges=[("b", "c")])
        tokenizer = Tokenizer(model)
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode("abc").ids == [0, 3]
        example = tokenise(tmp_path, completion("ab", "c"), stops=(4,))
        assert example == Example([0, 1, 2, 4], [IGNORED, IGNORED, 2, 4])

    def test_a_tokenizer_that_puts_a_space_before_every_text(self, tmp_path: Path) -> None:
        vocab = {symbol: i for i, symbol in enumerate(["▁", "a", "b", "c", "bc", "\n", "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode("c").tokens == ["▁", "c"]
        example = tokenise(tmp_path, completion("ab", "c"), stops=(6,))
        assert example == Example([0, 1, 2, 3, 6], [IGNORED] * 3 + [3, 6])

    def test_a_border_inside_a_word_of_a_word_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({"un": 0, "do": 1, "undo": 2, "</s>": 3}, unk_token="un"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        sentence = "its first token would reach into the prompt: begin it with a space"
        assert flaws(tmp_path, completion("un", "do"), stops=(3,)) == [("completion", sentence)]
        assert tokenise(tmp_path, completion("un", " do"), stops=(3,)).input_ids == [0, 1, 3]

    def test_a_tokenizer_that_ends_every_text(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer().backend_tokenizer
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        example = tokenise(tmp_path, completion("ab", "cd"))
        prompt, answer = TextCodec(tmp_path).encode("ab"), TextCodec(tmp_path).encode("cd")[1:]
        assert example == Example(prompt + answer, [IGNORED] * len(prompt) + answer)

    def test_no_prompt_and_no_start_token(self, tmp_path: Path) -> None:
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        sentence = "is empty, and the base has no start token to go on from"
        assert flaws(tmp_path, completion("", "a")) == [("prompt", sentence)]


class TestConversations:
    def test_a_chat_is_tokenised_as_it_is_served(self, tiny_llama: Path) -> None:
        example = tokenise(tiny_llama, conversation(*TALK))
        codec = TextCodec(tiny_llama)
        served = codec.encode_chat(messages(*TALK[:-1]), add_generation_prompt=True)
        assert example.input_ids[: len(served)] == served
        assert example.labels[: len(served)] == [IGNORED] * len(served)
        assert example.labels[len(served) :] == example.input_ids[len(served) :]
        assert codec.decode(example.labels[len(served) :]) == "ok\n"
        assert example.labels[-1] == EOS

    def test_a_chat_ends_at_the_template_s_own_stop(self, tiny_llama: Path) -> None:
        newline = TextCodec(tiny_llama).encode("\n")[-1]
        assert tokenise(tiny_llama, conversation(*TALK), stops=(EOS, newline)).labels[-1] == newline

    @pytest.mark.parametrize("template", [STOPPING, None], ids=["with stops", "without"])
    def test_every_answer_is_asked_for_as_it_is_served(
        self, tiny_llama: Path, tmp_path: Path, template: str | None
    ) -> None:
        checkpoint = with_template(tmp_path, template) if template else tiny_llama
        codec = TextCodec(checkpoint)
        example = tokenise(checkpoint, conversation(*TALK), loss="assistant")
        whole = codec.encode_chat(messages(*TALK), add_generation_prompt=False)
        assert example.input_ids[:-1] == whole[: len(example.input_ids) - 1]
        learned = [IGNORED] * len(example.labels)
        for index in (1, 3):
            served = codec.encode_chat(messages(*TALK[:index]), add_generation_prompt=True)
            assert example.input_ids[: len(served)] == served
            answer = [*codec.encode(TALK[index][1] + ("" if template else "\n"))[1:], EOS]
            learned[len(served) : len(served) + len(answer)] = answer
        assert example.labels == learned
        assert example.labels.count(EOS) == 2

    def test_a_stop_that_the_template_leaves_out_is_learned_where_the_next_turn_begins(self, tiny_llama: Path) -> None:
        example = tokenise(tiny_llama, conversation(*TALK), loss="assistant")
        [inner] = [place for place, label in enumerate(example.labels[:-1]) if label == EOS]
        assert example.input_ids[inner] == TextCodec(tiny_llama).encode("[")[-1]

    def test_a_template_that_rewrites_earlier_answers(self, tmp_path: Path) -> None:
        kept = "message['content'] if loop.last or message['role'] == 'user' else '-'"
        forgetful = STOPPING.replace("message['content']", kept)
        checkpoint = with_template(tmp_path, forgetful)
        sentence = "the template rewrites answers once turns follow: set data.loss to completion"
        assert flaws(checkpoint, conversation(*TALK), loss="assistant") == [("messages", sentence)]
        assert tokenise(checkpoint, conversation(*TALK)).learned == 3

    def test_a_template_that_writes_an_answer_otherwise_than_it_asks_for_one(self, tmp_path: Path) -> None:
        checkpoint = with_template(tmp_path, STOPPING.replace("%}[assistant]{%", "%}[bot]{%"))
        sentence = "the chat template writes an answer otherwise than it asks for one"
        assert flaws(checkpoint, conversation(*TALK)) == [("messages", sentence)]

    def test_a_template_that_refuses_an_order(self, tmp_path: Path) -> None:
        checkpoint = with_template(
            tmp_path,
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}" + STOPPING,
        )
        sentence = "the chat template refuses them: no system"
        assert flaws(checkpoint, conversation(("system", "be brief"), *TALK)) == [("messages", sentence)]

    def test_a_stop_inside_an_answer_is_no_end(self, tiny_llama: Path) -> None:
        talk = [("user", "hi</s>there"), ("assistant", "yo</s>hm"), *TALK[2:]]
        field = "messages[1].content"
        assert [place for place, _ in flaws(tiny_llama, conversation(*talk), loss="assistant")] == [field]
        assert tokenise(tiny_llama, conversation(*talk)).labels[-1] == EOS

    def test_a_base_without_a_chat_template(self, tmp_path: Path) -> None:
        make_tokenizer(chat_template=None).save_pretrained(tmp_path)
        with pytest.raises(DataError, match="the base has no chat template: write prompt and completion instead"):
            tokenise(tmp_path, conversation(*TALK))


def test_stop_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert stop_token_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert stop_token_ids(tmp_path) == [7, 8]


@pytest.mark.parametrize("ids", ["</s>", [], [[1]], {"id": 1}, -1, 320, [1, 99999], True, 1.5])
def test_stop_ids_must_be_of_the_vocabulary(tmp_path: Path, ids: Any) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(StartupError, match=r"generation_config\.json: eos_token_id: must be a token's id, or a list"):
        stop_token_ids(tmp_path)


def test_a_base_that_never_stops_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="never learn to stop"):
        stop_token_ids(tmp_path)
