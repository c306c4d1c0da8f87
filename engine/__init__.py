"""LMDeck's engine: load a checkpoint, stream answers, serve the OpenAI API.

Names are imported on first use, so that a command line can answer --help, and a page can open, before
torch and transformers are in memory.
"""

from importlib import import_module

_HOMES = {
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine", "EngineStats"),
    "engine.errors": (
        "CapacityError",
        "ConfigError",
        "EngineError",
        "ModelError",
        "QueueFullError",
        "RequestError",
    ),
    "engine.host": ("ModelHost",),
    "engine.images": ("load_image",),
    "engine.types": (
        "ChatMessage",
        "Event",
        "Finished",
        "ImagePart",
        "Logprob",
        "Request",
        "SamplingParams",
        "TextDelta",
        "TextPart",
        "Timing",
        "Usage",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
