"""Conversations as the server keeps them: the chat on a page is a view of one of these, never the store.

An id is unguessable and is all that a page holds, so a reload finds its conversation again and two
people never meet. The store is bounded: the least recently used conversation goes first, an idle one
goes after some hours. Nothing is written to disk.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MAX_CONVERSATIONS = 500
IDLE_EXPIRY_S = 6 * 3600


class Phase(Enum):
    """Where an answer stands. The first two are unfinished; the rest are final."""

    WAITING = "waiting"
    WRITING = "writing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self not in (Phase.WAITING, Phase.WRITING)


@dataclass
class Answer:
    """One answer and what is known about how it came about; seconds as this process saw them."""

    settings: dict[str, Any]
    text: str = ""
    phase: Phase = Phase.WAITING
    waits_for_model: bool = False
    error: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    completion_tokens: int = 0
    first_token_s: float | None = None
    decode_tps: float | None = None


@dataclass
class Turn:
    """What a person said (text and paths of pictures), and the answer to it."""

    text: str
    files: tuple[str, ...] = ()
    answer: Answer | None = None


@dataclass
class Conversation:
    """Turns under one lock; `version` grows with every change, so a page knows when to look again."""

    id: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    turns: list[Turn] = field(default_factory=list)
    notice: str = ""  # a sentence for the end of the chat; the next action removes it
    version: int = 0
    seen_at: float = field(default_factory=time.monotonic)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def answering(self) -> Answer | None:
        """The unfinished answer, if there is one; only a last turn can have it."""
        answer = self.turns[-1].answer if self.turns else None
        return answer if answer is not None and not answer.phase.is_final else None

    def changed(self) -> None:
        self.version += 1

    def seen(self) -> None:
        """A page looked at this conversation just now."""
        self.seen_at = time.monotonic()


class ConversationStore:
    """Conversations by id, most recently used last. `on_drop` hears of each one that is let go."""

    def __init__(
        self,
        on_drop: Callable[[Conversation], None],
        max_conversations: int = MAX_CONVERSATIONS,
        idle_expiry_s: float = IDLE_EXPIRY_S,
    ) -> None:
        self._on_drop = on_drop
        self._max = max_conversations
        self._idle_expiry_s = idle_expiry_s
        self._items: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def create(self) -> Conversation:
        conversation = Conversation()
        with self._lock:
            self._items[conversation.id] = conversation
            surplus = len(self._items) - self._max
            dropped = [self._items.popitem(last=False)[1] for _ in range(surplus)]
        for old in dropped:
            self._on_drop(old)
        return conversation

    def find(self, conversation_id: str | None) -> Conversation | None:
        """The conversation with this id, now the most recently used; None if it is unknown."""
        with self._lock:
            conversation = self._items.get(conversation_id or "")
            if conversation is not None:
                self._items.move_to_end(conversation.id)
                conversation.seen()
            return conversation

    def all(self) -> list[Conversation]:
        with self._lock:
            return list(self._items.values())

    def drop_idle(self) -> None:
        oldest = time.monotonic() - self._idle_expiry_s
        with self._lock:
            idle = [c for c in self._items.values() if c.seen_at < oldest]
            for conversation in idle:
                del self._items[conversation.id]
        for conversation in idle:
            self._on_drop(conversation)
