"""Chat messages to the text of a prompt, by the checkpoint's own template or a built-in format.

The checkpoint's template is code from a stranger. It runs sandboxed in a child process that may use
512 MiB, and 5 s for one render, and is killed beyond that; the built-in formats are data and run here.
What users write is never read as control tokens: before rendering, each control token in a message's
text is replaced by a private-use character (a mark), and the tokenizer encodes marks as plain text.

Which template: the one that was asked for by name; else the checkpoint's (chat_template.jinja,
chat_template.json, tokenizer_config.json); else a built-in, from the tokens in the vocabulary and
the model's kind; then from the folder's name, as LMDeploy does; else plain text ('base').
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.chat_templates import BUILTIN_TEMPLATES, BuiltinTemplate
from engine.errors import ConfigError, ModelError, RequestError
from engine.models.spec import ModelSpec
from engine.tokenizer import Tokenizer, check_text
from engine.types import ChatMessage, ImagePart, TextPart

MAX_TEMPLATE_BYTES = 2**20
MAX_PROMPT_CHARS = 8 * 2**20
RENDER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0

# tokens that end a turn: where a checkpoint's template writes one, it ends answers too, even if
# generation_config.json forgets it (Qwen's base models name <|endoftext|> only)
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<eoa>",
    "<|action_end|>",
)
_PROBE_TEXT, _PROBE_SYSTEM = "probe-text-7391", "probe-system-7391"


@dataclass(frozen=True)
class RenderedPrompt:
    """marks: single characters of the text that stand for plain strings (Tokenizer.encode_marked)."""

    text: str
    marks: Mapping[str, str] = field(default_factory=dict)


class ChatTemplate:
    """How one checkpoint writes a conversation. `render` may be called from any thread.

    name: a built-in's name, or 'checkpoint'.
    adds_bos: whether the tokenizer's BOS goes first. A checkpoint's text template writes its own or
    wants none (as in transformers); processors of vision models add it.
    """

    def __init__(
        self,
        name: str,
        format_: BuiltinTemplate | _TemplateProcess,
        tokenizer: Tokenizer,
        spec: ModelSpec,
    ) -> None:
        self.name = name
        self._format = format_
        self._tokenizer = tokenizer
        self._has_vision = spec.vision is not None
        self._image_token = (
            tokenizer.token_text(spec.vision.image_token_id) if spec.vision is not None else ""
        )
        self._takes_text = True
        self._takes_parts = False
        self._drops_system = False
        if isinstance(format_, BuiltinTemplate):
            self.adds_bos = True
            written_ends = format_.stops
        else:
            self.adds_bos = self._has_vision
            written_ends = tuple(end for end in _TURN_ENDS if end in format_.source)
            self._probe()
        ids = (tokenizer.token_id(end) for end in written_ends)
        self.stop_token_ids: tuple[int, ...] = tuple(i for i in ids if i is not None)

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Tokenizer, spec: ModelSpec, name: str | None = None
    ) -> ChatTemplate:
        """Raises ConfigError for an unknown name, ModelError for a template that cannot be used.

        The template's end-of-turn tokens are added to tokenizer.eos_token_ids.
        """
        folder = Path(folder)
        if name is not None and name not in BUILTIN_TEMPLATES:
            known = ", ".join(sorted(BUILTIN_TEMPLATES))
            raise ConfigError(f"chat_template is {name!r}; expected one of {known}.")
        source = _find_template(folder) if name is None else None
        if source is not None:
            template = cls("checkpoint", _TemplateProcess(source), tokenizer, spec)
        else:
            name = name or choose_builtin(folder, tokenizer, spec)
            template = cls(name, BUILTIN_TEMPLATES[name], tokenizer, spec)
        tokenizer.add_eos_token_ids(template.stop_token_ids)
        return template

    def render(
        self, messages: Sequence[ChatMessage], *, continue_last: bool = False
    ) -> RenderedPrompt:
        """The prompt's text. Raises RequestError with the template's own words where it refuses."""
        self._check(messages, continue_last)
        marks: dict[str, str] = {}
        free = _unused_characters(messages)
        written = [self._written(message, marks, free) for message in messages]
        if isinstance(self._format, BuiltinTemplate):
            texts = [(m.role, content) for m, content in zip(messages, written, strict=True)]
            special = self._tokenizer.special_tokens
            text = self._format.render(texts, open_last=continue_last, special=special)
        else:
            turns = [
                {"role": m.role, "content": content}
                for m, content in zip(messages, written, strict=True)
            ]
            text = self._render_turns(turns, next(free) if continue_last else None)
        if len(text) > MAX_PROMPT_CHARS:
            raise RequestError(
                f"The prompt has {len(text):,} characters; at most {MAX_PROMPT_CHARS:,} are accepted. "
                "Shorten the conversation."
            )
        return RenderedPrompt(text, marks)

    def _check(self, messages: Sequence[ChatMessage], continue_last: bool) -> None:
        if not messages:
            raise RequestError("The request has no messages. Give at least one.")
        num_chars = 0
        for message in messages:
            for text in _texts(message):
                check_text(text)
                num_chars += len(text)
        if num_chars > MAX_PROMPT_CHARS:
            raise RequestError(
                f"The messages have {num_chars:,} characters; at most {MAX_PROMPT_CHARS:,} are "
                "accepted. Shorten the conversation."
            )
        if continue_last and messages[-1].role != "assistant":
            raise RequestError(
                f"The last message is of role {messages[-1].role}; only an assistant's message can be "
                "continued."
            )
        if self._drops_system and any(message.role == "system" for message in messages):
            raise RequestError(
                "The chat template of this model has no place for a system prompt. Put its text into "
                "the first user message."
            )

    def _written(self, message: ChatMessage, marks: dict[str, str], free: Iterator[str]) -> Any:
        """A message's content as the template takes it, with control tokens in its text marked."""
        if isinstance(message.content, str):
            parts: list[TextPart | ImagePart] = [TextPart(message.content)]
        else:
            parts = _joined_texts(message.content)
        texts = [
            self._tokenizer.mark_control_tokens(part.text, marks, free)
            if isinstance(part, TextPart)
            else None
            for part in parts
        ]
        if texts.count(None) != len(texts) - 1 and len(texts) > 1:
            texts = self._with_seams(texts, marks, free)
        has_images = None in texts
        if self._takes_parts and (has_images or not self._takes_text):
            return [
                {"type": "image"} if text is None else {"type": "text", "text": text}
                for text in texts
            ]
        place = f"{self._image_token}\n"
        return "".join(place if text is None else text for text in texts)

    def _with_seams(
        self, texts: list[str | None], marks: dict[str, str], free: Iterator[str]
    ) -> list[str | None]:
        """End each text with a mark for nothing: a template may move pictures to the front, and two
        texts that come together must not become a control token."""
        seam = next((mark for mark, token in marks.items() if token == ""), None) or next(free)
        marks[seam] = ""
        return [text if text is None else text + seam for text in texts]

    def _render_turns(self, turns: list[dict[str, Any]], tail: str | None) -> str:
        """Run the checkpoint's template; tail marks where an answer to be continued breaks off."""
        if tail is not None:
            content = turns[-1]["content"]
            if isinstance(content, str):
                turns[-1]["content"] = content + tail
            else:
                content.append({"type": "text", "text": tail})
        values = {
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": tail is None,
            **self._tokenizer.special_tokens,
        }
        text = self._format.render(values)
        if tail is None:
            return text
        if tail not in text:
            raise RequestError(
                "The chat template of this model does not show the last answer as it is, so it cannot "
                "be continued. Ask for a new answer."
            )
        return text[: text.rindex(tail)]

    def _probe(self) -> None:
        """Learn from two small conversations what the template does with content and system text."""
        text_part = {"type": "text", "text": _PROBE_TEXT}
        as_text = self._try([{"role": "user", "content": _PROBE_TEXT}])
        image = [{"type": "image"}] if self._has_vision else []
        as_parts = self._try([{"role": "user", "content": [*image, text_part]}])
        self._takes_parts = (
            as_parts is not None
            and _PROBE_TEXT in as_parts
            and "'type'" not in as_parts
            and '"type"' not in as_parts
            and (not self._has_vision or as_parts.count(self._image_token) == 1)
        )
        self._takes_text = not self._takes_parts or (as_text is not None and _PROBE_TEXT in as_text)
        content = _PROBE_TEXT if self._takes_text else [text_part]
        system = _PROBE_SYSTEM if self._takes_text else [{"type": "text", "text": _PROBE_SYSTEM}]
        both = self._try(
            [{"role": "system", "content": system}, {"role": "user", "content": content}]
        )
        self._drops_system = both is not None and _PROBE_SYSTEM not in both

    def _try(self, turns: list[dict[str, Any]]) -> str | None:
        try:
            return self._render_turns(turns, None)
        except RequestError:
            return None


def choose_builtin(folder: Path, tokenizer: Tokenizer, spec: ModelSpec) -> str:
    """A built-in's name for a checkpoint without a template."""

    def has(*tokens: str) -> bool:
        return all(tokenizer.token_id(token) is not None for token in tokens)

    if has("<|start_header_id|>", "<|eot_id|>"):
        return "llama3"
    if has("<|im_start|>", "<|im_end|>"):
        if spec.family.startswith("internlm"):
            return "internlm2"
        return "qwen" if spec.family.startswith("qwen") else "chatml"
    if has("<eoa>"):
        return "internlm"
    if spec.vision is not None:
        return "llava-v1"
    path = folder.resolve().name.lower()
    for words, name in _NAMES_BY_FOLDER:
        if all(word in path for word in words):
            return name
    return "base"


# their vocabularies equal the base models', so only the name tells them apart
_NAMES_BY_FOLDER = (
    (("vicuna",), "vicuna"),
    (("codellama", "instruct"), "codellama"),
    (("llama-2", "chat"), "llama2"),
    (("llama2", "chat"), "llama2"),
    (("mistral", "instruct"), "mistral"),
    (("mixtral", "instruct"), "mistral"),
)


def _texts(message: ChatMessage) -> Iterator[str]:
    if isinstance(message.content, str):
        yield message.content
    else:
        yield from (part.text for part in message.content if isinstance(part, TextPart))


def _joined_texts(parts: Sequence[TextPart | ImagePart]) -> list[TextPart | ImagePart]:
    """Neighbouring texts become one, so that a control token cannot be split over two."""
    joined: list[TextPart | ImagePart] = []
    for part in parts:
        if isinstance(part, TextPart) and joined and isinstance(joined[-1], TextPart):
            joined[-1] = TextPart(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def _unused_characters(messages: Sequence[ChatMessage]) -> Iterator[str]:
    """Private-use characters that no message contains."""
    used = {
        char for message in messages for text in _texts(message) for char in text if char > "\udfff"
    }
    return (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)


def _find_template(folder: Path) -> str | None:
    """The checkpoint's template: its default one where it has several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _checked(_read_text(file))
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(_read_text(file))
        except (ValueError, RecursionError) as error:
            raise ModelError(
                f"{name} is not valid JSON. Copy it from the model's page again."
            ) from error
        template = found.get("chat_template") if isinstance(found, dict) else None
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
            if template is None and named:
                raise ModelError(
                    f"{name} has chat templates named {', '.join(map(str, named))} and no 'default'. "
                    "Set chat_template to a built-in format's name."
                )
        if isinstance(template, str) and template.strip():
            return _checked(template)
    return None


def _checked(template: str) -> str:
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ModelError(
            f"The chat template has {size:,} bytes; at most {MAX_TEMPLATE_BYTES:,} are accepted. Set "
            "chat_template to a built-in format's name."
        )
    return template


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file.name} cannot be read as UTF-8 text. Copy it from the model's page again."
        ) from error


class _TemplateProcess:
    """A child that renders one template (see template_worker.py); started again after a kill."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._stop: Callable[[], Any] = lambda: None
        with self._lock:
            reply = self._start()
        if "error" in reply:
            raise ModelError(
                f"The checkpoint's chat template is not valid: {_sentence(reply['error'])} Set "
                "chat_template to a built-in format's name."
            )

    def render(self, values: Mapping[str, Any]) -> str:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            reply = self._ask(json.dumps(values), RENDER_TIMEOUT_S)
        if "error" in reply:
            raise RequestError(
                f"The chat template of this model refuses the conversation: {_sentence(reply['error'])}"
            )
        return reply["text"]

    def _start(self) -> dict[str, str]:
        self._stop()
        keep = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG")
        self._child = subprocess.Popen(  # noqa: S603 - our own file, by our own interpreter
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={name: os.environ[name] for name in keep if name in os.environ},
        )
        self._stop = weakref.finalize(self, _kill, self._child)
        return self._ask(json.dumps(self.source), START_TIMEOUT_S)

    def _ask(self, line: str, timeout_s: float) -> dict[str, str]:
        """One line to the child, one back; a child that is late or dies is replaced next time."""
        child = self._child
        timer = threading.Timer(timeout_s, child.kill)
        timer.start()
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except OSError:  # the pipe of a child that has just been killed
            reply = ""
        finally:
            timer.cancel()
        if reply.endswith("\n"):
            return json.loads(reply)
        self._stop()
        return {"error": f"it needs over {timeout_s:g} s or too much memory"}


def _kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    child.stdout.close()
    try:
        child.stdin.close()
    except OSError:  # unsent bytes for a child that is gone
        return


def _sentence(words: str) -> str:
    words = " ".join(words.split())[:500]
    return words if words.endswith((".", "!", "?")) else f"{words}."
