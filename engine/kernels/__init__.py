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
)
from engine.kernels.w4a16_layout import PackedW4A16, pack_w4a16
from engine.kernels.w4a16_ops import (
    has_w4a16_kernel,
    w4a16_matmul,
    w4a16_packed_matmul,
    w4a16_partials,
)

__all__ = [
    "AWQ_ORDER",
    "PackedW4A16",
    "add_rms_norm",
    "add_rms_norm_partials",
    "apply_rotary",
    "dequantize_awq",
    "has_w4a16_kernel",
    "pack_w4a16",
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
    "w4a16_packed_matmul",
    "w4a16_partials",
]
