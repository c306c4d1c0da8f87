"""InternLM2 in a page of torch, written from its published layout, to compare the engine with.

One fused wqkv per layer: its rows go KV group by KV group, each with the group's query heads, then its
key head, then its value head. w1 is the gate, w3 the up and w2 the down projection. Dynamic NTK takes
its base from the whole sequence. No cache: every call reads the sequence from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def internlm2_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random fp32 weights under the published names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    fused = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head
    tensors = {
        "model.tok_embeddings.weight": random(config["vocab_size"], hidden, scale=1.0),
        "model.norm.weight": 1 + random(hidden),
        "output.weight": random(config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.attention.wqkv.weight": random(fused, hidden),
            f"{layer}.attention.wo.weight": random(hidden, hidden),
            f"{layer}.feed_forward.w1.weight": random(inner, hidden),
            f"{layer}.feed_forward.w3.weight": random(inner, hidden),
            f"{layer}.feed_forward.w2.weight": random(hidden, inner),
            f"{layer}.attention_norm.weight": 1 + random(hidden),
            f"{layer}.ffn_norm.weight": 1 + random(hidden),
        }
        if config["bias"]:
            tensors[f"{layer}.attention.wqkv.bias"] = random(fused)
            tensors[f"{layer}.attention.wo.bias"] = random(hidden)
    return tensors


def internlm2_logits(config: dict, weights: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """input_ids [T] -> logits [T, V]."""
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv, head = config["num_key_value_heads"], hidden // num_heads
    per_group = num_heads // num_kv
    length = len(input_ids)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    cos, sin = _rotary(config, length, head)
    x = weights["model.tok_embeddings.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        normed = _norm(x, w["attention_norm.weight"], config)
        qkv = F.linear(normed, w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
        qkv = qkv.view(length, num_kv, per_group + 2, head)
        q = qkv[:, :, :per_group].reshape(length, num_heads, head)
        k = qkv[:, :, per_group].repeat_interleave(per_group, 1)
        v = qkv[:, :, per_group + 1].repeat_interleave(per_group, 1)
        q, k = q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin
        scores = torch.einsum("ihd,jhd->hij", q, k) / head**0.5
        weight = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weight, v).reshape(length, hidden)
        x = x + F.linear(mixed, w["attention.wo.weight"], w.get("attention.wo.bias"))
        normed = _norm(x, w["ffn_norm.weight"], config)
        gate = F.silu(normed @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (normed @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return _norm(x, weights["model.norm.weight"], config) @ weights["output.weight"].T


def _rotary(config: dict, length: int, head: int) -> tuple[Tensor, Tensor]:
    base, scaling, steps = config["rope_theta"], config.get("rope_scaling"), torch.arange(length)
    positions = steps.float()
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    elif scaling and length > config["max_position_embeddings"]:
        factor, limit = scaling["factor"], config["max_position_embeddings"]
        base = base * (factor * length / limit - (factor - 1)) ** (head / (head - 2))
    frequencies = 1.0 / base ** (torch.arange(0, head, 2).float() / head)
    angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _norm(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight
