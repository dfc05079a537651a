"""Conversations in the words of a model's chat template."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from alloc_moe.runtime.errors import ArtifactError, GenerationError
from alloc_moe.runtime.text.chat import ChatTemplate
from alloc_moe.runtime.text.model import TextModel, load

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&amp; 'you'"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "{{ 7 * 7 }} é"},
]
# What templates in the wild use: loops that break, namespaces, filters, special tokens, marks.
WILD = """{{ bos_token }}{% set ns = namespace(n=0) %}
{% for message in messages %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
<|{{ message['role'] }}|>
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}

    {% else %}
{{ message.content | tojson }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{{ ns.n }}{% endif %}"""


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> TextModel:
    return load(chat_bundle, ep="cpu")


def template(source: str) -> ChatTemplate:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, name="a test", tokens=tokens)


@pytest.mark.parametrize("source", [WILD, "{{ messages | tojson(indent=2) }}"])
def test_prompts_equal_those_of_transformers(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import models

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    theirs.chat_template = source
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert template(source).render(TALK) == expected


def test_an_answer_continues_the_rendered_messages(model: TextModel) -> None:
    [answer] = model.generate(messages=TALK[:2], max_new_tokens=6)
    assert answer.prompt == "s:Be brief.\nu:Hi <b>&amp; 'you'\na:"
    [same] = model.generate([answer.prompt], max_new_tokens=6)
    assert (answer.ids, answer.prompt_ids) == (same.ids, same.prompt_ids)


def test_several_conversations_are_answered_together(model: TextModel) -> None:
    talks = [TALK[1:2], TALK[:2]]
    together = model.generate(messages=talks, max_new_tokens=5)
    assert together == [model.generate(messages=talk, max_new_tokens=5)[0] for talk in talks]


def test_a_stop_string_ends_one_row_and_not_the_other(model: TextModel) -> None:
    free = model.generate(["The", "A"], max_new_tokens=12)
    stop = free[0].text[4:6]
    ended = model.generate(["The", "A"], max_new_tokens=12, stop_strings=stop)
    assert ended[0].text == free[0].text.partition(stop)[0]
    assert ended[0].stopped == "stop_string"
    assert ended[0].ids == free[0].ids[: len(ended[0].ids)]
    if stop not in free[1].text:
        assert ended[1] == free[1]


def test_the_calls_outputs_can_be_looked_at(chat_bundle: Path) -> None:
    counting = load(chat_bundle, ep="cpu", count_activations=True)
    counts = []
    counting.generate(["abc"], max_new_tokens=4, on_output=lambda o: counts.append(o.activations))
    assert len(counts) == 4
    assert all(c is not None and sum(c) >= 2 for c in counts)


def test_a_model_without_a_template_says_so_kindly(bundle: Path) -> None:
    with pytest.raises(GenerationError, match=r"has no chat template: .*wasn't trained to chat"):
        load(bundle, ep="cpu").generate(messages=TALK)


def test_a_template_can_be_given(bundle: Path, chat_bundle: Path) -> None:
    given = load(bundle, ep="cpu", chat_template=chat_bundle / "chat_template.jinja")
    assert given.chat_prompt(TALK[1:2]) == "u:Hi <b>&amp; 'you'\na:"
    with pytest.raises(ArtifactError, match="nowhere can't be read"):
        load(bundle, ep="cpu", chat_template="nowhere").chat_prompt(TALK)
    with pytest.raises(ArtifactError, match="can't be read: no file can be called so"):
        load(bundle, ep="cpu", chat_template="a\0b").chat_prompt(TALK)


@pytest.mark.parametrize("kind", ["text", "named"])
def test_a_template_in_the_tokenizers_configuration_is_found(
    chat_bundle: Path, tmp_path: Path, kind: str
) -> None:
    folder = shutil.copytree(chat_bundle, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    source: Any = "{{ eos_token }}{{ messages[0].content }}"
    if kind == "named":
        named = {"name": "default", "template": source}
        source = [{"name": "tools", "template": "no"}, named]
    config = {"chat_template": source, "eos_token": {"content": "<end>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(folder, ep="cpu").chat_prompt(TALK) == "<end>Be brief."


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "these messages: roles must alternate"),
        ("{{ messages[9].content.nothing }}", "can't take these messages"),
        ("{{ 1 / 0 }}", "can't take these messages: division by zero"),
        ("{{ messages.append(1) }}", "can't take these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't take these messages: .*unsafe"),
        ("{% include 'x' %}", "can't take these messages"),
        ("{{ range(1000000) | list }}", "can't take these messages: Range too big"),
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(source: str, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        template(source).render(TALK)


def test_a_broken_template_is_reported_with_its_place() -> None:
    with pytest.raises(ArtifactError, match="chat template of a test can't be read: "):
        template("{% if %}").render(TALK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "The conversation has no messages"),
        ([{"role": "user"}], "Message 1 isn't one"),
        ([TALK[0], {"role": "user", "content": None}], "Message 2 isn't one"),
        ([["user", "Hi"]], "Message 1 isn't one"),
        ("Hi", "The messages are of type str"),
    ],
)
def test_what_are_no_messages_is_rejected(model: TextModel, messages: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(messages=messages)


def test_prompts_and_messages_exclude_each_other(model: TextModel) -> None:
    with pytest.raises(GenerationError, match="Give either prompts or messages"):
        model.generate(["a"], messages=TALK)
    with pytest.raises(GenerationError, match="Give either prompts or messages"):
        model.generate()


def test_missing_jinja2_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_jinja(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(GenerationError, match=r"Install alloc-moe\[chat\]"):
        template("{{ messages }}").render(TALK)
