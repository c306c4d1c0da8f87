"""The ops that layers call. Each is the torch reference on every device.

TODO: choose a Triton kernel per op and device once the first one lands in this folder.
"""

from engine.kernels.reference import (
    AWQ_ORDER,
    add_rms_norm,
    apply_rotary,
    dequantize_awq,
    paged_attention,
    rms_norm,
    silu_and_mul,
    store_kv,
    unpack_awq,
    varlen_attention,
    w4a16_matmul,
)

__all__ = [
    "AWQ_ORDER",
    "add_rms_norm",
    "apply_rotary",
    "dequantize_awq",
    "paged_attention",
    "rms_norm",
    "silu_and_mul",
    "store_kv",
    "unpack_awq",
    "varlen_attention",
    "w4a16_matmul",
]
