"""Errors that a user may read. Each message says what was found, what was expected and what to do."""


class EngineError(Exception):
    """Base of every error that is meant for a user."""


class ConfigError(EngineError):
    """A setting that the engine cannot honour (EngineConfig, SamplingParams, command line)."""


class ModelError(EngineError):
    """A checkpoint that is broken, incomplete or of a kind that is not supported."""


class CapacityError(EngineError):
    """Not enough memory for a model, or no room left in the queue; names bytes or counts."""


class RequestError(EngineError):
    """One request that cannot be served; its neighbours go on."""
