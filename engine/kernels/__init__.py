"""The ops that layers call: Triton on CUDA, the torch reference elsewhere (see the *_ops.py files)."""

from engine.kernels.decoder_ops import (
    add_rms_norm,
    add_rms_norm_partials,
    paged_attention,
    rms_norm,
    rotate_and_store,
    rotate_and_store_partials,
    silu_and_mul,
    silu_and_mul_partials,
)
from engine.kernels.reference import (
    AWQ_ORDER,
    apply_rotary,
    dequantize_awq,
    project_qkv,
    store_kv,
    unpack_awq,
    varlen_attention,
    w4a16_matmul,
)

__all__ = [
    "AWQ_ORDER",
    "add_rms_norm",
    "add_rms_norm_partials",
    "apply_rotary",
    "dequantize_awq",
    "paged_attention",
    "project_qkv",
    "rms_norm",
    "rotate_and_store",
    "rotate_and_store_partials",
    "silu_and_mul",
    "silu_and_mul_partials",
    "store_kv",
    "unpack_awq",
    "varlen_attention",
    "w4a16_matmul",
]
