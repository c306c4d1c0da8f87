"""Self-attention with grouped KV heads: fused q, k, v; optional QK norm; rotary; sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from engine import kernels
from engine.layers.kv_cache import KVCache
from engine.layers.norm import RMSNorm

if TYPE_CHECKING:
    from engine.layers.linear import AwqLinear, Linear
    from engine.types import BatchInputs


class Attention(nn.Module):
    """qkv has the parts (H * D, K * D, K * D); o maps H * D back to the hidden size."""

    def __init__(
        self,
        qkv: Linear | AwqLinear,
        o: Linear | AwqLinear,
        head_size: int,
        window: int | None,
        qk_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.qkv, self.o = qkv, o
        self.head_size = head_size
        self.num_heads, self.num_kv_heads = (width // head_size for width in qkv.parts[:2])
        self.scale = head_size**-0.5
        self.window = window
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_size, qk_norm_eps)
            self.k_norm = RMSNorm(head_size, qk_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], inputs: BatchInputs, kv: KVCache | None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; without a cache the batch must hold whole sequences."""
        qkv = self.qkv(x)
        q_norm, k_norm, eps = self._norms()
        if kv is None:
            q, k, v = kernels.project_qkv(
                qkv, *rotary, self.num_heads, self.num_kv_heads, q_norm, k_norm, eps
            )
            out = kernels.varlen_attention(q, k, v, inputs.query_lens, self.scale, self.window)
        else:
            q = kernels.rotate_and_store(
                qkv, *rotary, q_norm, k_norm, eps, kv.k, kv.v, inputs.slots, kv.quant
            )
            out = kernels.paged_attention(
                q,
                kv.k,
                kv.v,
                inputs.block_tables,
                inputs.context_lens,
                inputs.query_lens,
                inputs.max_context_len,
                inputs.num_decodes,
                self.scale,
                self.window,
                kv.quant,
                inputs.cu_seqlens,
                kv.counters,
            )
        return self.o(out.reshape(x.shape[0], -1))

    def _norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        """Weights [D] of the norms of q and k over each head, and their epsilon."""
        if self.q_norm is None:
            return None, None, 0.0
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
