"""The Chat tab: lays out the conversation, the composer and the settings, then wires them to the service.

Handlers change the conversation and return; `follow` shows what becomes of it. The page holds nothing
but the conversation's id, in a hidden field, kept over a reload by the browser's sessionStorage (no
gr.State: it holds a stream per tab open, and a browser's sixth tab would hang).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from engine import EngineError
from ui.chat_view import View, render, unmark_tags
from ui.service import StudioService
from ui.settings import Settings, build_settings
from ui.text import text

SAMPLES = Path(__file__).parent.parent / "assets" / "samples"
UPDATE_PERIOD_S = 0.05
PICTURE_TYPES = [".png", ".jpg", ".jpeg", ".webp"]
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
RECALL_ID = "() => sessionStorage.getItem('lmdeck-conversation') || ''"
REMEMBER_ID = "(id) => { sessionStorage.setItem('lmdeck-conversation', id); return id; }"


def build(service: StudioService, page: gr.Blocks) -> None:
    """Lay out the tab inside the current context of `page`, and wire it."""
    with gr.Row(elem_id="chat"):
        with gr.Column(elem_id="chat-main", min_width=0):
            with gr.Row(elem_id="chat-bar"):
                new_chat = gr.Button(text("button.new_chat"), elem_id="new-chat", size="sm")
                gr.Button(text("button.settings"), elem_id="toggle-settings", size="sm")
            log = gr.Chatbot(
                elem_id="chat-log",
                label=text("chat.label"),
                show_label=False,
                container=False,
                editable="user",
                group_consecutive_messages=False,
                reasoning_tags=[],
                buttons=["copy"],
                feedback_options=None,
                latex_delimiters=LATEX,
                placeholder=_empty_state(False),
                layout="bubble",
            )
            composer = gr.MultimodalTextbox(
                elem_id="composer",
                label=text("chat.composer"),
                show_label=False,
                container=False,
                placeholder=text("chat.placeholder"),
                file_types=PICTURE_TYPES,
                file_count="multiple",
                lines=1,
                max_lines=10,
                submit_btn=True,
                autofocus=True,
            )
        settings = build_settings()
    model_changed = gr.Button("", elem_id="model-changed", visible="hidden")
    conversation_id = gr.Textbox(elem_id="conversation-id", visible="hidden")
    _wire(service, page, log, composer, settings, new_chat, model_changed, conversation_id)


def _wire(
    service: StudioService,
    page: gr.Blocks,
    log: gr.Chatbot,
    composer: gr.MultimodalTextbox,
    settings: Settings,
    new_chat: gr.Button,
    model_changed: gr.Button,
    conversation_id: gr.Textbox,
) -> None:
    quiet = {"show_progress": "hidden", "api_visibility": "private"}

    def attach(known_id: str) -> tuple[str, Any]:
        conversation = service.open(known_id)
        return conversation.id, _chatbot(service, render(conversation))

    def adapt() -> tuple[Any, Any, Any]:
        """What depends on the model: examples, the hint, the longest answer."""
        key = "chat.placeholder_images" if service.supports_images() else "chat.placeholder"
        return (
            gr.update(**_model_dependent(service)),
            gr.update(placeholder=text(key)),
            settings.fit(service.engine()),
        )

    async def follow(conversation: str) -> AsyncIterator[tuple[Any, Any]]:
        """Show the conversation as it grows, about 20 times a second, until it rests."""
        try:
            followed = service.find(conversation)
        except EngineError:
            return
        shown = -1
        busy_s = 0.0
        while True:
            followed.seen()
            if followed.version != shown:
                view = render(followed)
                shown = view.version
                began = time.monotonic()
                yield view.messages, _composer_mode(view.answering)
                busy_s = time.monotonic() - began
                if not view.answering:
                    return
            # Long chats cost more to send; leave the server at least half of its time.
            await asyncio.sleep(max(UPDATE_PERIOD_S, busy_s))

    def send(conversation: str, said: dict[str, Any], *values: Any) -> tuple[Any, Any]:
        files = [str(file) for file in said.get("files", [])]
        try:
            sent = service.send(conversation, said.get("text", ""), files, settings.read(values))
        except EngineError as error:
            return _refused(service, conversation, error), gr.skip()
        return render(sent).messages, gr.MultimodalTextbox(value=None)

    def use_example(conversation: str, picked: gr.SelectData, *values: Any) -> Any:
        example = _examples(service.supports_images())[picked.index]
        try:
            sent = service.send(
                conversation, example["text"], example.get("files", []), settings.read(values)
            )
        except EngineError as error:
            return _refused(service, conversation, error)
        return render(sent).messages

    def regenerate(conversation: str, data: gr.RetryData, *values: Any) -> Any:
        return _change(service.regenerate, conversation, data.index, settings.read(values))

    def edit(conversation: str, data: gr.EditData, *values: Any) -> Any:
        return _change(service.edit, conversation, data.index, unmark_tags(data.value), settings.read(values))

    def _change(action: Any, conversation: str, index: Any, *arguments: Any) -> Any:
        try:
            view = render(service.find(conversation))
            turn = view.turn_of[index[0] if isinstance(index, list | tuple) else index]
            return render(action(conversation, turn, *arguments)).messages
        except EngineError as error:
            return _refused(service, conversation, error)

    def undo(conversation: str) -> tuple[Any, Any]:
        try:
            undone, turn = service.undo(conversation)
        except EngineError as error:
            return _refused(service, conversation, error), gr.skip()
        value = {"text": turn.text, "files": list(turn.files)} if turn else None
        return render(undone).messages, gr.MultimodalTextbox(value=value)

    def stop(conversation: str) -> Any:
        try:
            return render(service.stop(conversation)).messages
        except EngineError as error:
            return _refused(service, conversation, error)

    def clear(conversation: str) -> tuple[Any, Any]:
        return service.clear(conversation).id, []

    follow_it = {
        "fn": follow,
        "inputs": conversation_id,
        "outputs": [log, composer],
        "trigger_mode": "multiple",
        "concurrency_limit": None,
        **quiet,
    }
    inputs = [conversation_id, *settings.components]
    page.load(attach, conversation_id, [conversation_id, log], js=RECALL_ID, **quiet).then(
        None, conversation_id, conversation_id, js=REMEMBER_ID, **quiet
    ).then(**follow_it)
    model_changed.click(adapt, None, [log, composer, settings.max_new_tokens], **quiet)
    composer.submit(
        send, [conversation_id, composer, *settings.components], [log, composer], **quiet
    ).then(**follow_it)
    composer.stop(stop, conversation_id, log, **quiet)
    log.example_select(use_example, inputs, log, **quiet).then(**follow_it)
    log.retry(regenerate, inputs, log, **quiet).then(**follow_it)
    log.edit(edit, inputs, log, **quiet).then(**follow_it)
    log.undo(undo, conversation_id, [log, composer], **quiet)
    new_chat.click(clear, conversation_id, [conversation_id, log], **quiet).then(
        None, conversation_id, conversation_id, js=REMEMBER_ID, **quiet
    )


def _chatbot(service: StudioService, view: View) -> Any:
    return gr.update(value=view.messages, **_model_dependent(service))


def _model_dependent(service: StudioService) -> dict[str, Any]:
    images = service.supports_images()
    return {"examples": _examples(images), "placeholder": _empty_state(images)}


def _composer_mode(answering: bool) -> Any:
    return gr.MultimodalTextbox(submit_btn=not answering, stop_btn=answering)


def _refused(service: StudioService, conversation_id: str, error: EngineError) -> Any:
    """Say why in the chat; a page whose conversation is gone keeps what it shows and gets a toast."""
    conversation = service.notify(conversation_id, str(error))
    if conversation is None:
        gr.Warning(str(error))
        return gr.skip()
    return render(conversation).messages


def _empty_state(images: bool) -> str:
    body = text("chat.empty_body_images" if images else "chat.empty_body")
    return f"## {text('chat.empty_title')}\n{body}"


def _examples(images: bool) -> list[dict[str, Any]]:
    """Prompts for the empty chat: with sample pictures for a model that sees, else text alone."""
    pictures = sorted(SAMPLES.glob("*.png"))[:2] if images else []
    with_pictures = [
        {"text": text(f"example.picture.{number}"), "files": [str(picture)]}
        for number, picture in enumerate(pictures, 1)
    ]
    return [*with_pictures, {"text": text("example.text.1")}, {"text": text("example.text.2")}]
