"""The Chat tab: lays out the conversation, the composer and the settings, then wires them to the service.

Actions change the conversation and return its view at once, without Gradio's queue; `follow` then shows
it as it grows. Gradio loses an event now and then (one that joins while the page's stream is closing),
so the page's script compares versions and clicks `refollow` when its view has fallen behind. The page
holds nothing but the conversation's id, kept over a reload by the browser's sessionStorage (no gr.State:
it holds a stream per tab open, and a browser's sixth tab would hang).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from engine import EngineError, RequestError
from ui.chat_view import render, unmark_tags
from ui.conversation import Conversation
from ui.service import StudioService
from ui.settings import Settings, build_settings
from ui.text import text

SAMPLES = Path(__file__).parent.parent / "assets" / "samples"
PICTURE_EXAMPLES = (("boat.png", "example.picture.1"), ("shapes.png", "example.picture.2"))
UPDATE_PERIOD_S = 0.05
PICTURE_TYPES = [".png", ".jpg", ".jpeg", ".webp"]
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
# A message sent while the page is still attaching waits for the conversation that it belongs to.
WITH_ID = """async (id, ...rest) => {
    while (!window.lmdeckConversation) await new Promise((done) => setTimeout(done, 30));
    return [window.lmdeckConversation, ...rest];
}"""
RECALL_ID = "() => sessionStorage.getItem('lmdeck-conversation') || ''"
REMEMBER_ID = """(id) => {
    sessionStorage.setItem('lmdeck-conversation', id);
    window.lmdeckConversation = id;
    return id;
}"""


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
                placeholder=_empty_state(images=False),
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
    hidden = {"visible": "hidden", "show_label": False, "container": False}
    conversation_id = gr.Textbox(elem_id="conversation-id", **hidden)
    shown = gr.Textbox(elem_id="shown-version", **hidden)
    model_changed = gr.Button("", elem_id="model-changed", visible="hidden")
    refollow = gr.Button("", elem_id="refollow", visible="hidden")

    act = _Actions(service, settings)
    view = [log, composer, shown]
    adapted = [log, composer, settings.max_new_tokens]
    inputs = [conversation_id, *settings.components]
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    follow = {
        "fn": act.follow,
        "inputs": conversation_id,
        "outputs": view,
        "trigger_mode": "multiple",
        "concurrency_limit": None,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    remember = {
        "fn": None,
        "inputs": conversation_id,
        "outputs": conversation_id,
        "js": REMEMBER_ID,
    }

    page.load(act.attach, conversation_id, [conversation_id, *adapted], js=RECALL_ID, **quick).then(
        **remember, **quick
    ).then(**follow)
    model_changed.click(act.adapt, None, adapted, **quick)
    refollow.click(**follow)
    said = [conversation_id, composer, *settings.components]
    composer.submit(act.send, said, view, js=WITH_ID, **quick).then(**follow)
    composer.stop(act.stop, conversation_id, view, **quick)
    log.example_select(act.use_example, inputs, view, js=WITH_ID, **quick).then(**follow)
    log.retry(act.regenerate, inputs, view, **quick).then(**follow)
    log.edit(act.edit, inputs, view, **quick).then(**follow)
    log.undo(act.undo, conversation_id, view, **quick)
    new_chat.click(act.clear, conversation_id, [conversation_id, *view], **quick).then(
        **remember, **quick
    )


class _Actions:
    """What a page may do. Each returns the new view: messages, the composer, the version shown."""

    def __init__(self, service: StudioService, settings: Settings) -> None:
        self._service = service
        self._settings = settings

    def attach(self, known_id: str) -> tuple[Any, ...]:
        conversation = self._service.open(known_id)
        log, *others = self.adapt()
        return conversation.id, {**log, "value": render(conversation).messages}, *others

    def adapt(self) -> tuple[Any, Any, Any]:
        """What depends on the model: examples, the hint, the longest answer."""
        images = self._service.supports_images()
        hint = text("chat.placeholder_images" if images else "chat.placeholder")
        return (
            gr.update(examples=_examples(images), placeholder=_empty_state(images)),
            gr.update(placeholder=hint),
            self._settings.fit(self._service.engine()),
        )

    async def follow(self, conversation_id: str) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Show the conversation as it grows, about 20 times a second, until it rests."""
        try:
            conversation = self._service.find(conversation_id)
        except EngineError:
            return
        version, answering, busy_s = -1, None, 0.0
        while True:
            conversation.seen()
            if conversation.version != version:
                view = render(conversation)
                mode = gr.skip() if view.answering == answering else _mode(view.answering)
                version, answering = view.version, view.answering
                began = time.monotonic()
                yield view.messages, mode, str(version)
                busy_s = time.monotonic() - began
                if not answering:
                    return
            # A long chat costs more to send; leave the server at least half of its time.
            await asyncio.sleep(max(UPDATE_PERIOD_S, busy_s))

    def send(self, conversation_id: str, said: dict[str, Any], *values: Any) -> tuple[Any, ...]:
        words, files = said.get("text") or "", [str(file) for file in said.get("files") or []]
        settings = self._settings.read(values)
        return self._do(
            conversation_id,
            lambda: self._service.send(conversation_id, words, files, settings),
            composer={"value": None},
        )

    def use_example(
        self, conversation_id: str, picked: gr.SelectData, *values: Any
    ) -> tuple[Any, ...]:
        example = _examples(self._service.supports_images())[picked.index]
        settings = self._settings.read(values)
        return self._do(
            conversation_id,
            lambda: self._service.send(
                conversation_id, example["text"], example.get("files", []), settings
            ),
        )

    def regenerate(
        self, conversation_id: str, picked: gr.RetryData, *values: Any
    ) -> tuple[Any, ...]:
        settings = self._settings.read(values)
        return self._do(
            conversation_id,
            lambda: self._service.regenerate(
                conversation_id, self._turn(conversation_id, picked.index), settings
            ),
        )

    def edit(self, conversation_id: str, edited: gr.EditData, *values: Any) -> tuple[Any, ...]:
        settings = self._settings.read(values)
        words = unmark_tags(edited.value)
        return self._do(
            conversation_id,
            lambda: self._service.edit(
                conversation_id, self._turn(conversation_id, edited.index), words, settings
            ),
        )

    def undo(self, conversation_id: str) -> tuple[Any, ...]:
        taken: dict[str, Any] = {}

        def act() -> Conversation:
            conversation, turn = self._service.undo(conversation_id)
            if turn is not None:
                taken["value"] = {"text": turn.text, "files": list(turn.files)}
            return conversation

        return self._do(conversation_id, act, composer=taken)

    def stop(self, conversation_id: str) -> tuple[Any, ...]:
        return self._do(conversation_id, lambda: self._service.stop(conversation_id))

    def clear(self, conversation_id: str) -> tuple[Any, ...]:
        conversation = self._service.clear(conversation_id)
        return conversation.id, *self._do(conversation.id, lambda: conversation)

    def _do(
        self,
        conversation_id: str,
        action: Callable[[], Conversation],
        composer: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """Act and show; a refusal is said in the chat, and the composer keeps what it holds."""
        try:
            conversation = action()
        except EngineError as error:
            conversation, composer = self._service.notify(conversation_id, str(error)), None
            if conversation is None:
                raise gr.Error(str(error), print_exception=False) from error
        view = render(conversation)
        return view.messages, _mode(view.answering, **(composer or {})), str(view.version)

    def _turn(self, conversation_id: str, message: int | list[int]) -> int:
        """The turn that a message of the view belongs to."""
        index = message[0] if isinstance(message, list) else message
        turn_of = render(self._service.find(conversation_id)).turn_of
        if not 0 <= index < len(turn_of):
            raise RequestError(text("error.unknown_message"))
        return turn_of[index]


def _mode(answering: bool, **values: Any) -> Any:
    """The composer offers Stop while an answer is being written, else Send."""
    return gr.update(submit_btn=not answering, stop_btn=answering, **values)


def _empty_state(images: bool) -> str:
    body = text("chat.empty_body_images" if images else "chat.empty_body")
    return f"## {text('chat.empty_title')}\n{body}"


def _examples(images: bool) -> list[dict[str, Any]]:
    """Prompts for the empty chat: with sample pictures for a model that sees, else text alone."""
    with_pictures = [
        {"text": text(key), "files": [str(SAMPLES / name)]}
        for name, key in PICTURE_EXAMPLES
        if images and (SAMPLES / name).is_file()
    ]
    return [*with_pictures, {"text": text("example.text.1")}, {"text": text("example.text.2")}]
