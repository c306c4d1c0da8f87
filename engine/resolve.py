"""What "auto" means: device, dtype and context length for a model on this machine."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models.spec import ModelSpec


def resolve_device(name: str) -> torch.device:
    """auto takes a GPU when torch sees one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices. "
            "Use device auto or cpu, or install an NVIDIA driver and a CUDA build of torch."
        )
    return device


def resolve_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """auto: fp32 on the CPU, where half types gain nothing; on a GPU what the checkpoint has."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        name = "float16" if spec.dtype == "float32" else spec.dtype
    return getattr(torch, name)


def resolve_session_len(spec: ModelSpec, config: EngineConfig) -> int:
    """session_len as asked, or the model's own length; its RoPE scaling decides how far one may ask."""
    rope = spec.rope
    asked = config.session_len
    if asked is None:
        return int(spec.max_position * max(config.rope_scaling_factor, 1))
    if rope.kind == "dynamic":
        return asked
    # Model cards add a scaling to config.json and leave max_position_embeddings as trained.
    scaled = int(rope.factor * rope.original_max_position) if rope.kind != "default" else 0
    limit = max(spec.max_position, scaled)
    if asked > limit:
        raise ConfigError(
            f"session_len is {asked:,}; this model has {limit:,} positions. Lower session_len to at "
            f"most {limit}."
        )
    return asked


def check_format(spec: ModelSpec, config: EngineConfig) -> None:
    """Raise ConfigError when the checkpoint is not of the format that was asked for."""
    found = "hf" if spec.quant is None else "awq"
    if config.model_format not in ("auto", found):
        raise ConfigError(
            f"model_format is {config.model_format!r}, but the checkpoint is of format {found!r}."
        )


def shareable_tokens(spec: ModelSpec, prompt_len: int) -> int | None:
    """How many of a prompt's first tokens have KV that fits other prompts too; None: all.

    Dynamic NTK turns keys by the length of their own prompt once that exceeds the limit.
    """
    if spec.rope.kind != "dynamic":
        return None
    limit = spec.rope.original_max_position
    return limit if prompt_len <= limit else 0
