"""ModelSpec: a model's structure, declared once.

The decoder, the weight loader, AWQ's scale groups, the KV layout and the exporter all read this
declaration; a new family is one function in families.py from config.json to a spec, plus a row in
names.py. Nothing here reads a file or holds a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `kind` names the scaling as transformers does; its numbers are beside it.

    linear, dynamic: factor. llama3: factor, low_freq_factor, high_freq_factor,
    original_max_position. yarn: factor, original_max_position, beta_fast, beta_slow,
    attention_factor (None derives it), mscale and mscale_all_dim (0 means absent).
    """

    base: float
    dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True)
class QuantSpec:
    """AWQ as on disk (4-bit GEMM layout); group_size -1 is one group a row."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()


@dataclass(frozen=True)
class VisionSpec:
    """A CLIP tower and a two-layer projector, as in LLaVA 1.5. config is vision_config as read."""

    config: dict = field(hash=False)
    image_token_id: int
    num_image_tokens: int
    feature_layer: int | tuple[int, ...]
    keep_class_token: bool
    projector_act: str
    projector_bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """Everything that distinguishes one decoder from another. `names` picks the table in names.py.

    qkv_layout: separate q, k, v tensors; or one fused tensor, grouped per KV head (its q heads, k, v).
    windows: sliding window of each layer in tokens, None for full attention.
    """

    family: str
    names: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    rope: RopeSpec
    max_position: int
    dtype: str
    qkv_layout: Literal["separate", "grouped"] = "separate"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    windows: tuple[int | None, ...] = ()
    quant: QuantSpec | None = None
    vision: VisionSpec | None = None
    eos_token_ids: tuple[int, ...] = ()
