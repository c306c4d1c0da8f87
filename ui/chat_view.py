"""A conversation as the chat component's messages, with a map from each message back to its turn.

Pictures and text are separate messages, because the component cannot edit a message that holds both.
Text travels as a content dict: a plain string would lose its indentation on the way.
"""

from __future__ import annotations

import html
import re
from typing import Any, NamedTuple

from ui.conversation import Answer, Conversation, Phase
from ui.text import text

MARKDOWN_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "*_`[]~$\\|"}
TAG_MARK = "\N{WORD JOINER}"
TAG_START = re.compile(r"<(?=[A-Za-z/!?])")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class View(NamedTuple):
    """messages for the component; turn_of[i] is the turn that message i belongs to."""

    messages: list[dict[str, Any]]
    turn_of: list[int]
    version: int
    answering: bool


def render(conversation: Conversation) -> View:
    messages: list[dict[str, Any]] = []
    turn_of: list[int] = []
    with conversation.lock:
        for index, turn in enumerate(conversation.turns):
            for number, file in enumerate(turn.files, 1):
                picture = {"path": file, "alt_text": text("chat.picture", number=number)}
                messages.append({"role": "user", "content": picture})
            if turn.text.strip():
                messages.append(_message("user", mark_tags(turn.text)))
            if turn.answer is not None:
                messages.extend(_answer(turn.answer))
            turn_of.extend([index] * (len(messages) - len(turn_of)))
        if conversation.notice:
            messages.append(_aside(conversation.notice, "notice"))
            turn_of.append(max(0, len(conversation.turns) - 1))
        return View(messages, turn_of, conversation.version, conversation.answering is not None)


def statistics(answer: Answer) -> str:
    """One line under an answer: how fast, how many tokens, why it ended; only what is known."""
    parts = []
    if answer.first_token_s is not None:
        parts.append(text("stats.first_token", seconds=_seconds(answer.first_token_s)))
    if answer.decode_tps and answer.completion_tokens > 1:
        parts.append(text("stats.speed", tps=_rate(answer.decode_tps)))
    if answer.prompt_tokens is not None:
        key = "stats.tokens_in_images" if answer.image_tokens else "stats.tokens_in"
        parts.append(text(key, tokens=answer.prompt_tokens, images=answer.image_tokens))
    if answer.completion_tokens:
        parts.append(text("stats.tokens_out", tokens=answer.completion_tokens))
    if answer.phase is Phase.STOPPED:
        parts.append(text("finish.stopped"))
    elif answer.finish_reason:
        parts.append(text(f"finish.{answer.finish_reason}"))
    return " · ".join(parts)


def mark_tags(said: str) -> str:
    """Keep what a person wrote from being read as HTML: `<` + letter gets an invisible mark between."""
    return TAG_START.sub("<" + TAG_MARK, said)


def unmark_tags(shown: str) -> str:
    return shown.replace("<" + TAG_MARK, "<")


def split_thinking(answer: str) -> tuple[str, str, bool]:
    """(thinking, rest, whether the thinking has ended). Some templates open the tag in the prompt."""
    before, close, after = answer.partition(THINK_CLOSE)
    opened = before.lstrip().startswith(THINK_OPEN)
    if not opened and not close:
        return "", answer, True
    thinking = before.lstrip().removeprefix(THINK_OPEN)
    return thinking.strip("\n"), after.lstrip("\n"), bool(close)


def _answer(answer: Answer) -> list[dict[str, Any]]:
    messages = []
    thinking, rest, thought = split_thinking(answer.text)
    if thinking.strip():
        pending = not thought and not answer.phase.is_final
        metadata = {
            "title": text("chat.thinking" if pending else "chat.thought"),
            "status": "pending" if pending else "done",
        }
        messages.append(_message("assistant", thinking) | {"metadata": metadata})
    if rest.strip():
        messages.append(_message("assistant", rest))
    elif answer.phase is Phase.WAITING:
        key = "chat.waiting_model" if answer.waits_for_model else "chat.waiting"
        messages.append(_aside(text(key), "waiting"))
    if answer.phase is Phase.FAILED:
        messages.append(_aside(answer.error, "error"))
    elif answer.phase.is_final:
        messages.append(_aside(statistics(answer), "stats"))
    return messages


def _message(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": {"type": "text", "text": words}}


def _aside(words: str, kind: str) -> dict[str, Any]:
    """A line that is not the model's: the class is for the style sheet, the words are literal."""
    classes = f"lm-{kind} lm-boxed" if kind in ("error", "notice") else f"lm-{kind}"
    literal = html.escape(words).translate(MARKDOWN_SIGNS)
    return _message("assistant", f'<span class="lm-aside {classes}">{literal}</span>')


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
