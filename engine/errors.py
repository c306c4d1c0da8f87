"""Errors that a user may read. Each message says what was found, what was expected and what to do."""


class EngineError(Exception):
    """Base of every error that is meant for a user."""


class ConfigError(EngineError):
    """A setting that the engine cannot honour (EngineConfig, SamplingParams, command line)."""


class ModelError(EngineError):
    """A checkpoint that is broken, incomplete or of a kind that is not supported."""


class CapacityError(EngineError):
    """Not enough memory for a model or a request; names the bytes."""


class QueueFullError(CapacityError):
    """As many requests wait as the engine takes; the same request may pass a little later."""


class RequestError(EngineError):
    """One request that cannot be served; its neighbours go on."""
