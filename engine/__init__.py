"""LMDeck's engine: load a checkpoint, stream answers, serve the OpenAI API."""

from engine.config import EngineConfig
from engine.engine import Engine, EngineStats
from engine.errors import CapacityError, ConfigError, EngineError, ModelError, RequestError
from engine.host import ModelHost
from engine.images import load_image
from engine.types import (
    ChatMessage,
    Event,
    Finished,
    ImagePart,
    Logprob,
    Request,
    SamplingParams,
    TextDelta,
    TextPart,
    Timing,
    Usage,
)

__all__ = [
    "CapacityError",
    "ChatMessage",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "Event",
    "Finished",
    "ImagePart",
    "Logprob",
    "ModelError",
    "ModelHost",
    "Request",
    "RequestError",
    "SamplingParams",
    "TextDelta",
    "TextPart",
    "Timing",
    "Usage",
    "load_image",
]
