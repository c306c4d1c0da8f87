"""How a conversation is shown: messages and their turns, statistics, thoughts, markup."""

import json
import string

import pytest

from ui.chat_view import mark_tags, render, split_thinking, statistics, unmark_tags
from ui.conversation import Answer, Conversation, Phase, Turn
from ui.text import TEXTS


def words(message):
    return message["content"]["text"]


def test_each_message_knows_its_turn():
    conversation = Conversation()
    done = Answer({}, "Red.", Phase.DONE, completion_tokens=2, finish_reason="stop")
    conversation.turns = [Turn("What?", ("a.png", "b.png"), done), Turn("And?", (), Answer({}))]
    view = render(conversation)
    assert [message["role"] for message in view.messages] == ["user"] * 3 + ["assistant"] * 2 + [
        "user",
        "assistant",
    ]
    assert view.turn_of == [0, 0, 0, 0, 0, 1, 1]
    assert view.answering


def test_statistics_say_what_is_known_and_no_more():
    answer = Answer({}, "x", Phase.STOPPED, completion_tokens=12, first_token_s=0.25)
    assert statistics(answer) == "first token after 250 ms · 12 out · stopped by you"
    answer = Answer(
        {},
        "x",
        Phase.DONE,
        finish_reason="length",
        prompt_tokens=1216,
        image_tokens=576,
        completion_tokens=512,
        first_token_s=1.25,
        decode_tps=52.4,
    )
    assert statistics(answer) == (
        "first token after 1.2 s · 52 tokens/s · 1,216 tokens in (576 from pictures) · 512 out · "
        "cut at the longest answer allowed"
    )


def test_indentation_and_markup_of_an_error_stay_literal():
    conversation = Conversation()
    failed = Answer({}, "    x = 1", Phase.FAILED, error="No <b>room</b> for *this*")
    conversation.turns = [Turn("Hi", (), failed)]
    _, answer, error = render(conversation).messages
    assert words(answer) == "    x = 1"
    assert "<b>" not in words(error)
    assert "*" not in words(error)


@pytest.mark.parametrize(
    ("answer", "thinking", "rest", "ended"),
    [
        ("Plain.", "", "Plain.", True),
        ("<think>\nHm", "Hm", "", False),
        ("<think>\nHm\n</think>\n\nYes.", "Hm", "Yes.", True),
        ("Hm\n</think>\nYes.", "Hm", "Yes.", True),
        ("A <think> in the middle", "", "A <think> in the middle", True),
    ],
)
def test_thoughts_are_split_from_the_answer(answer, thinking, rest, ended):
    assert split_thinking(answer) == (thinking, rest, ended)


@pytest.mark.parametrize("said", ["a < b", "<b>bold</b>", "<!-- x -->", "1<2>0 <p", "no markup"])
def test_marked_tags_come_back_as_they_were(said):
    assert unmark_tags(mark_tags(said)) == said
    assert not any(f"<{letter}" in mark_tags(said) for letter in string.ascii_letters + "/!")


def test_every_locale_has_the_same_texts_with_the_same_fields():
    fields = {}
    for file in TEXTS.glob("*.json"):
        texts = json.loads(file.read_text(encoding="utf-8"))
        fields[file.name] = {
            key: sorted(name for _, name, _, _ in string.Formatter().parse(value) if name)
            for key, value in texts.items()
        }
    assert all(found == fields["en.json"] for found in fields.values())
