"""Text to token ids and back, one token at a time for streaming.

Vocabulary files are read by transformers; encoding is the Rust backend's. Decoding is ours: every
token stands for bytes, and text is those bytes joined, so a stream, a whole answer and the bytes of
logprobs agree by construction (llama.cpp does the same). Left out on purpose: remote code, and
clean_up_tokenization_spaces, which changes what the model wrote.

A tokenizer.json is taken as its authors wrote it. AutoTokenizer would rebuild it for Llama classes
from the vocabulary alone and lose, for instance, that Yi adds no space before the first word.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from engine.errors import ModelError, RequestError
from engine.models.spec import ModelSpec
from engine.sentencepiece_model import SentencePieceModel

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTROL_SHAPE = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The vocabulary of one checkpoint. All methods may be called from any thread.

    Control tokens are those that the checkpoint marks as special, any added token of the form
    <|...|>, and the image placeholder. Other added tokens (<think>, runs of spaces) are ordinary text with an id of its own.
    """

    def __init__(
        self,
        fast: PreTrainedTokenizerFast,
        *,
        eos_token_ids: Sequence[int] = (),
        control_ids: Sequence[int] = (),
    ) -> None:
        self._backend: tokenizers.Tokenizer = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._plain: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None
        self._plain_lock = threading.Lock()
        self._rules = _decode_rules(self._backend)
        self._added = self._backend.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.special_tokens: dict[str, str] = {
            name: str(getattr(fast, name)) for name in _NAMED_TOKENS if getattr(fast, name)
        }
        named = set(self.special_tokens.values())
        self.special_ids = frozenset(
            i for i, token in self._added.items() if token.special or token.content in named
        )
        self._control = {
            token.content: i
            for i, token in self._added.items()
            if i in self.special_ids or i in control_ids or _CONTROL_SHAPE.fullmatch(token.content)
        }
        self._control_pattern = _any_of(self._added[i] for i in self._control.values())
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = self.token_id(self.special_tokens.get("bos_token", ""))
        own_eos = self.token_id(self.special_tokens.get("eos_token", ""))
        known = (*eos_token_ids, *(() if own_eos is None else (own_eos,)))
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(known))

    @classmethod
    def load(cls, folder: str | Path, spec: ModelSpec | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder; runs no code from it and nothing is downloaded."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        eos = generation.get("eos_token_id")
        listed = eos if isinstance(eos, list) else [eos]
        eos_ids = [i for i in listed if isinstance(i, int) and not isinstance(i, bool)]
        return cls(
            _load_fast(folder, config),
            eos_token_ids=(*(spec.eos_token_ids if spec else ()), *eos_ids),
            control_ids=(spec.vision.image_token_id,) if spec and spec.vision else (),
        )

    # ---- text to ids

    def encode(
        self, text: str, add_special_tokens: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        add_special_tokens puts first what the tokenizer was made to put there (BOS, or nothing);
        what some append, such as EOS, would end the text that a prompt begins, so it is left out.
        parse_special False reads control tokens in the text as plain characters.
        """
        check_text(text)
        if parse_special or self._control_pattern.search(text) is None:
            return self._encode_parsed(text, add_special_tokens)
        return self.encode_marked(text, {}, add_special_tokens, parse_special=False)

    def encode_marked(
        self,
        text: str,
        marks: Mapping[str, str],
        add_special_tokens: bool = False,
        *,
        parse_special: bool = True,
    ) -> list[int]:
        """Token ids of a text where single characters (the keys of marks) stand for plain strings.

        Control tokens written out in the text are control tokens; inside a mark's string they are
        text. The text is cut at the former only, as the backend does, so a mark leaves no seam.
        """
        check_text(text)
        if parse_special and not any(mark in text for mark in marks):
            return self._encode_parsed(text, add_special_tokens)
        first, inner = self._plain_backends()
        restore = str.maketrans(dict(marks))
        ids: list[int] = []
        start = 0
        for match in self._control_pattern.finditer(text) if parse_special else ():
            ids += self._encode_plain(
                first if start == 0 else inner, text[start : match.start()], restore
            )
            ids.append(self._control[self._control_text(match)])
            start = match.end()
        ids += self._encode_plain(first if start == 0 else inner, text[start:], restore)
        return [*self.bos_prefix, *ids] if add_special_tokens else ids

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token) if token else None

    def control_id(self, token: str) -> int | None:
        """The id of a control token's exact text; None for anything else."""
        return self._control.get(token)

    @functools.cached_property
    def bos_prefix(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:start]

    def add_eos_token_ids(self, ids: Iterable[int]) -> None:
        """Let a chat template's own end-of-turn tokens end an answer too; called while loading."""
        self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, *ids)))

    def mark_control_tokens(self, text: str, marks: dict[str, str], free: Iterator[str]) -> str:
        """Replace control tokens written out in a text by marks (see encode_marked).

        marks grows by one character, taken from free, for each token not in it yet.
        """
        by_token = {token: mark for mark, token in marks.items()}

        def mark(match: re.Match[str]) -> str:
            token = self._control_text(match)
            if token not in by_token:
                by_token[token] = next(free)
                marks[by_token[token]] = token
            return match.group().replace(token, by_token[token])

        return self._control_pattern.sub(mark, text)

    def _control_text(self, match: re.Match[str]) -> str:
        found = match.group()
        return found if found in self._control else found.strip()

    def _encode_parsed(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self.bos_prefix, *ids] if add_special_tokens else ids

    def _encode_plain(
        self, backend: tokenizers.Tokenizer, text: str, restore: dict[int, Any]
    ) -> list[int]:
        if not text:
            return []
        ids = backend.encode(text.translate(restore), add_special_tokens=False).ids
        control = self._control_ids
        if control.isdisjoint(ids):
            return ids
        # a unigram model, or a merge, may reach a control token's own entry from plain characters
        return [part for i in ids for part in (self._spell(i) if i in control else (i,))]

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        unknown = self.token_id(self.special_tokens.get("unk_token", ""))
        return frozenset(self._control.values()) - {unknown}

    def _spell(self, token_id: int) -> list[int]:
        """A token's text as one token a character, or a byte where the vocabulary lacks it."""
        spelled: list[int] = []
        for char in self.token_bytes(token_id).decode("utf-8", "replace"):
            whole = self._backend.token_to_id(char)
            if whole is not None:
                spelled.append(whole)
                continue
            for byte in char.encode():
                name = _BYTE_TO_CHAR[byte] if self._rules.byte_level else f"<0x{byte:02X}>"
                part = self._backend.token_to_id(name)
                if part is None:
                    raise RequestError(
                        f"The text contains {self.token_text(token_id)!r}, a control token of this "
                        "model that its tokenizer cannot write as text. Remove it."
                    )
                spelled.append(part)
        return spelled

    def _plain_backends(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Copies of the backend that match no control token: for the first section of a text, and
        for later ones, which get no leading space where the tokenizer adds it once a text."""
        with self._plain_lock:
            if self._plain is None:
                whole = json.loads(self._backend.to_str())
                for token in whole["added_tokens"]:
                    token["special"] = token["content"] in self._control
                first = tokenizers.Tokenizer.from_str(json.dumps(whole))
                first.encode_special_tokens = True
                inner = first
                pre = whole.get("pre_tokenizer") or {}
                metaspaces = [
                    part
                    for part in (pre, *pre.get("pretokenizers", ()))
                    if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
                ]
                if metaspaces:
                    for part in metaspaces:
                        part["prepend_scheme"] = "never"
                    inner = tokenizers.Tokenizer.from_str(json.dumps(whole))
                    inner.encode_special_tokens = True
                self._plain = (first, inner)
            return self._plain

    # ---- ids to text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character read as U+FFFD."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skip).decode(
            "utf-8", "replace"
        )
        return self.strip_start(text)

    def strip_start(self, text: str) -> str:
        """Drop the space that sentencepiece vocabularies put before the first word of a text."""
        for _ in range(self._rules.strip_left):
            text = text.removeprefix(" ")
        return text

    @property
    def strips_start(self) -> int:
        return self._rules.strip_left

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; empty for ids beyond the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token alone, for display; a part of a character reads as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        rules = self._rules
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if rules.byte_level and token_id not in self._added:
            try:
                return bytes(_CHAR_TO_BYTE[char] for char in token)
            except KeyError:  # not from the byte alphabet: kept as it is, as the backend does
                return token.encode()
        if rules.byte_fallback and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        if rules.metaspace:
            token = token.replace("▁", " ")
        return (" " + token if rules.words else token).encode()


class StreamDecoder:
    """Turns one sequence's tokens into text that may be shown at once.

    Joined over all pushes and the flush, the text is tokenizer.decode(all) cut before the stop string
    that is complete first (of several ending together, the longest). An unfinished character, and text that
    may be the start of a stop string, are held back. A stop string that is exactly a control
    token's text matches that token even though the text does not show it.

    continues: the text goes on from a prompt (raw prompts, continue_last), so a sentencepiece
    token's leading space is kept at the start.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = 0 if continues else tokenizer.strips_start
        self._stop_ids = {tokenizer.control_id(s): s for s in stop} if self._skip else {}
        self._stops = [(s, _prefix_function(s)) for s in dict.fromkeys(stop)]
        self._matched = [0] * len(self._stops)
        self._first_chars = {s[0] for s, _ in self._stops}
        self._held = ""
        self._stopped: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is safe to show now, and the stop string once one is complete.

        may_stop False (below min_new_tokens) lets a stop string that is complete with this token
        pass as text; one that this token only begins can still match later. After a match there is
        nothing more to show: push and flush return no text.
        """
        if self._stopped is not None:
            return "", self._stopped
        if token_id in self._skip:
            name = self._stop_ids.get(token_id)
            if name is None or not may_stop:
                return "", None
            self._stopped = name
            shown, self._held = self._held, ""
            return shown, name
        text = self._utf8(self._token_bytes(token_id))
        return self._accept(text, may_stop) if text else ("", None)

    def flush(self) -> str:
        """The text still held back; call once, when the sequence has ended without a stop string."""
        if self._stopped is not None:
            return ""
        text, _ = self._accept(self._utf8(b"", True), True)
        shown, self._held = text + self._held, ""
        return shown if self._stopped is None else text

    def _accept(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        while self._strip and text:
            if text[0] == " ":
                text, self._strip = text[1:], self._strip - 1
            else:
                self._strip = 0
        if not self._stops:
            return text, None
        if not self._held and self._first_chars.isdisjoint(text):
            return text, None
        return self._match(text, may_stop)

    def _match(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """Run every stop string's matcher (Knuth, Morris, Pratt) over the new characters."""
        matched = self._matched
        for position, char in enumerate(text):
            complete = ""
            for k, (stop, back) in enumerate(self._stops):
                length = matched[k]
                while length and stop[length] != char:
                    length = back[length - 1]
                if stop[length] == char:
                    length += 1
                if length == len(stop):
                    if len(stop) > len(complete):
                        complete = stop
                    length = back[-1]
                matched[k] = length
            if complete and may_stop:
                seen = self._held + text[: position + 1]
                self._held, self._stopped = "", complete
                return seen[: len(seen) - len(complete)], complete
        seen = self._held + text
        keep = len(seen) - max(matched)
        self._held = seen[keep:]
        return seen[:keep], None


def check_text(text: str) -> None:
    """Refuse text that is not valid Unicode: half of a surrogate pair has no UTF-8 form."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which is not valid Unicode. Remove it or send the whole character."
        ) from None


@functools.lru_cache(maxsize=256)
def _prefix_function(stop: str) -> tuple[int, ...]:
    """For each prefix of stop, the length of its longest proper prefix that is also its suffix."""
    back = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = back[length - 1]
        if stop[i] == stop[length]:
            length += 1
        back[i] = length
    return tuple(back)


def _any_of(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first, with the spaces that a token takes with it."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    patterns = (
        r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
        for token in longest_first
    )
    return re.compile("|".join(patterns) or r"(?!)")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}


# ---- reading files


@dataclass(frozen=True)
class _DecodeRules:
    byte_level: bool = False
    metaspace: bool = False
    byte_fallback: bool = False
    strip_left: int = 0
    words: bool = False  # no decoder: tokens are words, joined by spaces


def _decode_rules(backend: tokenizers.Tokenizer) -> _DecodeRules:
    if backend.decoder is None:
        return _DecodeRules(words=True, strip_left=1)
    decoder = json.loads(backend.decoder.__getstate__())
    rules: dict[str, Any] = {}
    for part in decoder.get("decoders", [decoder]):
        kind = part.get("type")
        if kind == "ByteLevel":
            rules["byte_level"] = True
        elif kind == "ByteFallback":
            rules["byte_fallback"] = True
        elif kind == "Replace" and part["pattern"] == {"String": "▁"} and part["content"] == " ":
            rules["metaspace"] = True
        elif kind == "Metaspace" and part.get("replacement") == "▁":
            rules["metaspace"] = True
            adds = part.get("prepend_scheme", "always") != "never"
            rules["strip_left"] = int(adds and part.get("add_prefix_space", True))
        elif kind == "Strip" and part["content"] == " " and not part["stop"]:
            rules["strip_left"] = part["start"]
        elif kind != "Fuse":
            raise ModelError(
                f"The tokenizer's decoder step '{kind}' is not supported (supported: byte-level BPE "
                "and sentencepiece vocabularies)."
            )
    return _DecodeRules(**rules)


def _load_fast(folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if (folder / "tokenizer.model").is_file():
            return _load_sentencepiece(folder / "tokenizer.model", config)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except ModelError:
        raise
    except Exception as error:  # the Rust side raises no narrower class
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"The tokenizer of this checkpoint cannot be read: {reason}. Copy its tokenizer files again."
        ) from error
    raise ModelError(
        "The checkpoint has no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json with "
        "merges.txt. Copy these files from the model's page into its folder."
    )


def _load_sentencepiece(file: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer.model through the Llama class, whatever class the checkpoint names.

    Classes that exist as remote code only (InternLM2Tokenizer) differ from Llama's in two facts, and
    both are in the files: whether a space goes before the text, and names that tokenizer_config.json
    gives to reserved entries ([UNUSED_TOKEN_145] is <|im_end|>).
    """
    model = SentencePieceModel.read(file)
    older = _read_json(file.with_name("added_tokens.json"))  # {token: id}
    added = {
        i: tokenizers.AddedToken(token, normalized=False, special=True)
        for token, i in older.items()
    }
    added |= {
        int(i): _added_token(token)
        for i, token in (config.get("added_tokens_decoder") or {}).items()
    }
    vocab = model.vocab({i: token.content for i, token in added.items()})
    for i, token in enumerate(vocab):
        if model.is_control(i) or model.is_user_defined(i):
            special = model.is_control(i)
            added.setdefault(i, tokenizers.AddedToken(token, normalized=False, special=special))
    ids = {token: i for i, token in enumerate(vocab)}
    named = {
        name: _token_text(config.get(name)) or default
        for name, default in (
            ("unk_token", model.unk_piece or "<unk>"),
            ("bos_token", model.bos_piece or "<s>"),
            ("eos_token", model.eos_piece or "</s>"),
            ("pad_token", None),
        )
    }
    tokenizer = LlamaTokenizer(
        vocab=ids,
        merges=model.merges(ids),
        add_prefix_space=model.add_dummy_prefix,
        legacy=bool(config.get("legacy", False)),
        add_bos_token=config.get("add_bos_token", True) is not False,
        add_eos_token=config.get("add_eos_token", False) is True,
        added_tokens_decoder=dict(sorted(added.items())),
        **{name: token for name, token in named.items() if token},
    )
    for i, token in added.items():
        if tokenizer.backend_tokenizer.token_to_id(token.content) != i:
            raise ModelError(
                f"The tokenizer files give token {token.content!r} the id {i}, which does not follow "
                "tokenizer.model. Save the tokenizer with transformers to get a tokenizer.json."
            )
    return tokenizer


def _added_token(token: Any) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, normalized=False, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(
        token["content"], **{flag: bool(token[flag]) for flag in flags if flag in token}
    )


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object's content; empty when the file is not there."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(
            f"{file.name} is not valid JSON. Copy it from the model's page again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file.name} is not a JSON object. Copy it from the model's page again.")
    return found
