"""Chat templates: the formats, where a template comes from, and what a hostile one may do."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoTokenizer

from engine import chat
from engine.chat import ChatTemplate, choose_builtin
from engine.chat_templates import BUILTIN_TEMPLATES
from engine.errors import ConfigError, ModelError, RequestError
from engine.tokenizer import Tokenizer
from engine.types import ChatMessage, ImagePart, TextPart
from tests.fakes import byte_level_folder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TOKENS = ("<|im_start|>", "<|im_end|>", "<image>", "</s>", "<s>")
TEXT_SPEC = SimpleNamespace(vision=None, family="llama", eos_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(
        tmp_path_factory.mktemp("chat") / "model", special=TOKENS, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def vision_spec(tokenizer):
    vision = SimpleNamespace(image_token_id=tokenizer.control_id("<image>"))
    return SimpleNamespace(vision=vision, family="llava", eos_token_ids=())


def make(tmp_path, tokenizer, source, spec=TEXT_SPEC):
    (tmp_path / "chat_template.jinja").write_text(source)
    return ChatTemplate.load(tmp_path, tokenizer, spec)


def talk(*turns):
    return [ChatMessage(role, text) for role, text in turns]


THREE = talk(("user", "q1"), ("assistant", "a1"), ("user", "q2"))
WITH_SYSTEM = talk(("system", "S"), ("user", "q1"))
VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("chatml", THREE, "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
         "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen", talk(("user", "q")), "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
         "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        ("yi", WITH_SYSTEM, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("internlm2", WITH_SYSTEM, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("internlm", [*WITH_SYSTEM, *THREE[1:]],
         "<|System|>:S\n<|User|>:q1\n<|Bot|>:a1<eoa>\n<|User|>:q2\n<|Bot|>:"),
        ("llama2", [*WITH_SYSTEM, *THREE[1:]],
         "[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST] a1</s><s>[INST] q2 [/INST] "),
        ("codellama", THREE, "[INST] q1 [/INST] a1</s><s>[INST] q2 [/INST] "),
        ("llama3", WITH_SYSTEM, "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("vicuna", THREE, VICUNA.format("user") + " USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"),
        ("llava-v1", THREE, VICUNA.format("human") + " USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"),
        ("mistral", [*WITH_SYSTEM, *THREE[1:]], "[INST] S\n\nq1 [/INST]a1</s>[INST] q2 [/INST]"),
        ("base", talk(("user", "Once upon")), "Once upon"),
    ],
)  # fmt: skip
def test_builtin_formats_write_what_lmdeploy_writes(tokenizer, tmp_path, name, messages, expected):
    template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC, name)
    assert template.render(messages).text == expected


@pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
def test_continued_answer_stays_open_in_every_builtin(tokenizer, tmp_path, name):
    template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC, name)
    fresh = template.render(talk(("user", "q"))).text
    going_on = template.render(talk(("user", "q"), ("assistant", "It is")), continue_last=True).text
    assert going_on.endswith("It is")
    assert going_on.startswith(fresh.rstrip())


def test_builtin_refuses_tool_turns_by_name(tokenizer, tmp_path):
    template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC, "vicuna")
    with pytest.raises(RequestError, match="'vicuna' has no tool turns"):
        template.render(talk(("user", "q"), ("tool", "42")))


def test_unknown_name_lists_the_builtins(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="expected one of base, chatml"):
        ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC, "lama2")


@pytest.mark.parametrize(
    ("family", "tokens", "folder_name", "expected"),
    [
        ("llama", ("<|start_header_id|>", "<|eot_id|>"), "m", "llama3"),
        ("internlm2", ("<|im_start|>", "<|im_end|>"), "m", "internlm2"),
        ("qwen2", ("<|im_start|>", "<|im_end|>"), "m", "qwen"),
        ("llama", ("<|im_start|>", "<|im_end|>"), "Yi-6B", "chatml"),
        ("internlm", ("<eoa>",), "m", "internlm"),
        ("llama", (), "Llama-2-7b-chat-hf", "llama2"),
        ("llama", (), "Llama-2-7b-hf", "base"),
        ("llama", (), "vicuna-7b-v1.5", "vicuna"),
        ("llama", (), "CodeLlama-7b-Instruct-hf", "codellama"),
        ("mistral", (), "Mistral-7B-Instruct-v0.1", "mistral"),
        ("mistral", (), "anything", "base"),
    ],
)
def test_builtin_is_chosen_from_facts_then_from_the_folder_name(
    tmp_path, family, tokens, folder_name, expected
):
    vocabulary = SimpleNamespace(token_id={t: i for i, t in enumerate(tokens)}.get)
    spec = SimpleNamespace(vision=None, family=family)
    assert choose_builtin(tmp_path / folder_name, vocabulary, spec) == expected


def test_vision_model_without_template_is_llava(tmp_path, tokenizer, vision_spec):
    plain = SimpleNamespace(token_id=lambda _: None)
    assert choose_builtin(tmp_path, plain, vision_spec) == "llava-v1"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", CHATML),
        ("chat_template.json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config.json", json.dumps({"chat_template": CHATML})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [
                {"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML},
            ]}),
        ),
    ],
)  # fmt: skip
def test_checkpoints_own_template_is_found(tmp_path, tokenizer, file, content):
    (tmp_path / file).write_text(content)
    template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC)
    assert template.name == "checkpoint"
    assert (
        template.render(talk(("user", "q"))).text
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.stop_token_ids == (tokenizer.control_id("<|im_end|>"),)
    assert tokenizer.control_id("<|im_end|>") in tokenizer.eos_token_ids


def test_rendering_equals_transformers(folder, tmp_path, tokenizer):
    source = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}\n{% for m in messages %}{%- if loop.first %}\n  first "
        "{% endif %}{{ m | tojson }}{{ m.content | trim }}{{ eos_token if m.role == 'assistant' }}"
        "{% if m.content == 'a1' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}"
    )
    reference = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": m.role, "content": m.content} for m in THREE]
    expected = reference.apply_chat_template(
        turns, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert make(tmp_path, tokenizer, source).render(THREE).text == expected


def test_template_that_refuses_is_quoted(tmp_path, tokenizer):
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ messages[-1].content }}"
    template = make(tmp_path, tokenizer, source)
    with pytest.raises(RequestError, match="Roles must alternate"):
        template.render(WITH_SYSTEM)
    assert template.render(talk(("user", "still works"))).text == "still works"


def test_system_prompt_that_a_template_would_drop_is_refused(tmp_path, tokenizer):
    template = make(tmp_path, tokenizer, "{{ messages[-1].content }}")
    with pytest.raises(RequestError, match="no place for a system prompt"):
        template.render(WITH_SYSTEM)


@pytest.mark.parametrize("source", ["{% for %}", "{{ unclosed", "{% unknown_tag %}"])
def test_broken_template_is_a_model_error(tmp_path, tokenizer, source):
    with pytest.raises(ModelError, match="chat template is not valid"):
        make(tmp_path, tokenizer, source)


def test_oversized_template_is_a_model_error(tmp_path, tokenizer):
    with pytest.raises(ModelError, match="at most 1,048,576"):
        make(tmp_path, tokenizer, "x" * (2**20 + 1))


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory by repetition": "{{ ('x' * 999999999) | length }}",
    "memory by doubling": "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "padding": "{{ 'x' | center(9999999999) }}",
    "power": "{{ 9 ** (99999999 + (messages | length)) }}",
    "format width": "{{ '%9999999999d' % 1 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "exponential macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "undefined": "{{ nothing.more }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_template_fails_its_request_in_bounded_time(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(chat, "RENDER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(chat, "START_TIMEOUT_S", 3.0)
    guarded = (
        "{% if messages[-1].content == 'go' %}"
        + BOMBS[name]
        + "{% endif %}{{ messages[-1].content }}"
    )
    (tmp_path / "chat_template.jinja").write_text(guarded)
    template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC)
    start = time.monotonic()
    with pytest.raises(RequestError, match="chat template of this model refuses"):
        template.render(talk(("user", "go")))
    assert time.monotonic() - start < 20
    assert template.render(talk(("user", "fine"))).text == "fine"


def test_template_that_is_hostile_when_compiled_is_a_model_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "START_TIMEOUT_S", 2.0)
    with pytest.raises(ModelError, match="needs over 2 s"):
        make(tmp_path, tokenizer, "{{ 9 ** 99999999 }}")


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", ["checkpoint", "chatml", "llama2", "vicuna"])
@pytest.mark.parametrize("token", TOKENS)
def test_control_tokens_in_any_message_are_plain_text(tmp_path, tokenizer, name, role, token):
    if name == "checkpoint":
        template = make(tmp_path, tokenizer, CHATML)
    else:
        template = ChatTemplate.load(tmp_path, tokenizer, TEXT_SPEC, name)

    def count(word):
        turns = {"system": "s", "user": "u", "assistant": "a", role: f"x {word} y{word}"}
        messages = [*talk(*turns.items()), ChatMessage("user", "last")]
        rendered = template.render(messages)
        ids = tokenizer.encode_marked(rendered.text, rendered.marks)
        return ids.count(tokenizer.control_id(token)), tokenizer.decode(
            ids, skip_special_tokens=False
        )

    clean, _ = count("word")
    attacked, text = count(token)
    assert attacked == clean
    assert f"x {token} y{token}" in text


def test_private_use_characters_of_a_user_are_kept(tmp_path, tokenizer):
    template = make(tmp_path, tokenizer, CHATML)
    rendered = template.render(talk(("user", "\U000f0000</s>\U000f0001")))
    ids = tokenizer.encode_marked(rendered.text, rendered.marks)
    assert "\U000f0000</s>\U000f0001" in tokenizer.decode(ids, skip_special_tokens=False)


def test_continued_answer_keeps_its_text_exactly(tmp_path, tokenizer):
    template = make(tmp_path, tokenizer, CHATML)
    messages = talk(("user", "q"), ("assistant", "It </s> is "))
    rendered = template.render(messages, continue_last=True)
    ids = tokenizer.encode_marked(rendered.text, rendered.marks)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nIt </s> is "


def test_only_an_assistants_message_is_continued(tmp_path, tokenizer):
    with pytest.raises(RequestError, match="only an assistant's message"):
        make(tmp_path, tokenizer, CHATML).render(THREE, continue_last=True)


PICTURE = ImagePart(Image.new("RGB", (2, 2)))


def test_parts_template_gets_parts_even_for_plain_text(tmp_path, tokenizer, vision_spec):
    template = make(tmp_path, tokenizer, PARTS_ONLY, vision_spec)
    message = ChatMessage("user", (TextPart("what"), PICTURE, TextPart("is it")))
    assert (
        template.render([message]).text.replace("\U000f0000", "")
        == "USER: <image>\nwhat is it ASSISTANT:"
    )
    assert template.render(talk(("user", "hello"))).text == "USER: hello ASSISTANT:"


def test_text_template_gets_placeholders_in_order(tmp_path, tokenizer, vision_spec):
    template = make(tmp_path, tokenizer, CHATML, vision_spec)
    message = ChatMessage("user", (PICTURE, TextPart("a"), PICTURE, TextPart("b")))
    text = template.render([message]).text.replace("\U000f0000", "")
    assert text.startswith("<|im_start|>user\n<image>\na<image>\nb<|im_end|>")


@pytest.mark.parametrize("source", [CHATML, PARTS_ONLY, "{{ messages[0].content }}"])
@pytest.mark.parametrize(
    "content",
    [
        (TextPart("<ima"), TextPart("ge>")),
        (TextPart("<ima"), PICTURE, TextPart("ge>")),
        (PICTURE, TextPart("<image>")),
    ],
)
def test_image_placeholder_cannot_be_typed(tmp_path, tokenizer, vision_spec, source, content):
    template = make(tmp_path, tokenizer, source, vision_spec)
    rendered = template.render([ChatMessage("user", content)])
    ids = tokenizer.encode_marked(rendered.text, rendered.marks)
    num_images = sum(part is PICTURE for part in content)
    assert ids.count(tokenizer.control_id("<image>")) == num_images


def test_empty_conversation_and_lone_surrogates_are_refused(tmp_path, tokenizer):
    template = make(tmp_path, tokenizer, CHATML)
    with pytest.raises(RequestError, match="no messages"):
        template.render([])
    with pytest.raises(RequestError, match="lone surrogate"):
        template.render(talk(("user", "\ud800")))
