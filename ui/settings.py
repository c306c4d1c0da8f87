"""The settings beside a chat: components, and their values as the service takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui.text import text

if TYPE_CHECKING:
    from engine import Engine

DEFAULT_LONGEST = 512
LONGEST_BEFORE_LOAD = 4096


@dataclass(frozen=True)
class Settings:
    """components in the order in which `read` gets their values back from a page."""

    by_name: dict[str, Any]

    @property
    def components(self) -> list[Any]:
        return list(self.by_name.values())

    @property
    def max_new_tokens(self) -> gr.Slider:
        return self.by_name["max_new_tokens"]

    def read(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.by_name, values, strict=True))

    def fit(self, engine: Engine | None) -> Any:
        """The longest answer goes up to the model's context; the user's value is not touched."""
        return gr.update(maximum=engine.max_context if engine else LONGEST_BEFORE_LOAD)


def build_settings() -> Settings:
    with gr.Column(elem_id="settings", min_width=0):
        gr.HTML(_heading_html(), elem_id="settings-head", padding=False)
        system_prompt = gr.Textbox(
            elem_id="system-prompt",
            label=text("settings.system_prompt"),
            placeholder=text("settings.system_prompt.hint"),
            lines=3,
            max_lines=8,
        )
        by_name = {
            "system_prompt": system_prompt,
            "temperature": _slider("temperature", 0, 2, 0.7, 0.05),
            "top_p": _slider("top_p", 0.05, 1, 0.9, 0.05),
            "top_k": _slider("top_k", 0, 200, 0, 1),
            "repetition_penalty": _slider("repetition_penalty", 0.8, 2, 1, 0.05),
            "max_new_tokens": _slider("max_new_tokens", 1, LONGEST_BEFORE_LOAD, DEFAULT_LONGEST, 1),
            "seed": gr.Textbox(
                elem_id="seed",
                label=text("settings.seed"),
                info=text("settings.seed.info"),
                placeholder=text("settings.seed.hint"),
                lines=1,
                max_lines=1,
            ),
        }
    return Settings(by_name)


def _heading_html() -> str:
    """The panel's heading; its close button shows where the panel covers the chat (assets/page.js)."""
    return f"""<h2>{text("settings.title")}</h2><p>{text("settings.note")}</p>
<button id="close-settings" type="button" aria-label="{text("button.close_settings")}"><svg viewBox="0 0 24 24"
 aria-hidden="true"><path d="M6 6l12 12M18 6L6 18"/></svg></button>"""


def _slider(name: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    return gr.Slider(
        low,
        high,
        value,
        step=step,
        elem_id=name.replace("_", "-"),
        label=text(f"settings.{name}"),
        info=text(f"settings.{name}.info"),
    )
