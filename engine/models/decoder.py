"""The decoder that every family shares; the ModelSpec decides its sizes, biases, norms and windows.

Rows are flat: T tokens of all sequences of a step, with no padding between them. There is no
`if family` here; a difference between families is a field of the spec.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import kernels
from engine.layers.attention import Attention
from engine.layers.kv_cache import KVCache
from engine.layers.linear import AwqLinear, Linear, make_linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary
from engine.models.names import group_size_of
from engine.models.spec import ModelSpec
from engine.types import BatchInputs


class Decoder(nn.Module):
    """Embedding, layers, final norm and head. Weights are uninitialized until load_model fills them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_weight = nn.Parameter(
            torch.empty(spec.vocab_size, spec.hidden_size), requires_grad=False
        )
        self.layers = nn.ModuleList(DecoderLayer(spec, i) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        # A tied head is the embedding itself: load_model puts one parameter in both places.
        self.head = Linear(spec.hidden_size, (spec.vocab_size,), bias=False)
        self.rotary = Rotary(spec.rope)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] -> [T, hidden]."""
        return nn.functional.embedding(input_ids, self.embed_weight)

    def forward(self, hidden: Tensor, inputs: BatchInputs, kv: list[KVCache] | None) -> Tensor:
        """hidden [T, hidden] -> [T, hidden] after the final norm.

        kv None: no cache; then every sequence is whole (query_lens are the sequence lengths).
        """
        rotary = self.rotary(inputs)
        x, residual = hidden, None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, rotary, inputs, None if kv is None else kv[i])
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden], already normed -> [N, V] float32."""
        return self.head(hidden).float()


class DecoderLayer(nn.Module):
    """One block. It hands on what it adds and the stream so far; their sum is the hidden state."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        queries, keys = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = Attention(
            qkv=make_linear(
                spec.hidden_size,
                (queries, keys, keys),
                bias=spec.qkv_bias,
                group_size=group_size_of(spec, index, "qkv"),
            ),
            o=make_linear(
                queries,
                (spec.hidden_size,),
                bias=spec.o_bias,
                group_size=group_size_of(spec, index, "o"),
            ),
            head_size=spec.head_size,
            window=spec.windows[index] if spec.windows else None,
            qk_norm_eps=spec.norm_eps if spec.qk_norm else None,
        )
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(
            gate_up=make_linear(
                spec.hidden_size,
                (spec.intermediate_size, spec.intermediate_size),
                bias=spec.mlp_bias,
                group_size=group_size_of(spec, index, "gate_up"),
            ),
            down=make_linear(
                spec.intermediate_size,
                (spec.hidden_size,),
                bias=spec.mlp_bias,
                group_size=group_size_of(spec, index, "down"),
            ),
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        inputs: BatchInputs,
        kv: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (x, residual); residual None: x is the whole stream."""
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, rotary, inputs, kv)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x); gate_up has the parts (I, I)."""

    def __init__(self, gate_up: Linear | AwqLinear, down: Linear | AwqLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down(kernels.silu_and_mul(self.gate_up(x)))
