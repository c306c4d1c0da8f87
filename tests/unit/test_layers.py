"""Rotary frequencies against transformers' own functions; the KV pool's bytes."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.kernels.kv_quant import CalibratedKV
from engine.layers.kv_cache import allocate_kv, kv_bytes_per_block
from engine.layers.rotary import Rotary, attention_factor, inverse_frequencies
from engine.models.spec import RopeSpec
from engine.types import BatchInputs

ROPES = {
    "linear": RopeSpec(10000.0, 64, "linear", factor=4.0),
    "dynamic": RopeSpec(10000.0, 64, "dynamic", factor=4.0, original_max_position=128),
    "llama3": RopeSpec(500000.0, 64, "llama3", 8.0, 8192, 1.0, 4.0),
    "yarn": RopeSpec(1000000.0, 64, "yarn", 4.0, 32768),
    "yarn with mscale": RopeSpec(10000.0, 64, "yarn", 40.0, 4096, mscale=0.7, mscale_all_dim=0.2),
    "yarn untruncated": RopeSpec(10000.0, 64, "yarn", 2.5, 2048, truncate=False),
    "yarn with betas": RopeSpec(
        10000.0, 64, "yarn", 16.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1
    ),
}


def theirs(rope, seq_len=None):
    parameters = {"rope_type": rope.kind, "rope_theta": rope.base, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope.kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        parameters |= {"truncate": rope.truncate, "attention_factor": rope.attention_factor}
        if rope.mscale:
            parameters |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[rope.kind](config, "cpu", seq_len=seq_len)


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    inv_freq, factor = theirs(ROPES[name])
    torch.testing.assert_close(inverse_frequencies(ROPES[name]), inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(ROPES[name]) == pytest.approx(factor)


def rows(positions, context_lens, query_lens):
    counts = torch.tensor((0, *query_lens))
    return BatchInputs(
        input_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.zeros(len(positions), dtype=torch.int64),
        cu_seqlens=counts.cumsum(0).int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=torch.zeros(len(context_lens), 0, dtype=torch.int32),
        query_lens=query_lens,
        max_context_len=max(context_lens),
    )


def test_dynamic_ntk_gives_each_sequence_its_own_base():
    rope = ROPES["dynamic"]
    inputs = rows([9, 198, 199, 400], (10, 200, 401), (1, 2, 1))
    cos, sin = Rotary(rope)(inputs)
    for row, (position, length) in enumerate([(9, 10), (198, 200), (199, 200), (400, 401)]):
        angles = position * theirs(rope, seq_len=torch.tensor(length))[0]
        torch.testing.assert_close(cos[row, :32], angles.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(-sin[row, :32], angles.sin(), rtol=0, atol=1e-4)


def test_dynamic_ntk_changes_nothing_within_max_position():
    inputs = rows([0, 60, 127], (1, 61, 128), (1, 1, 1))
    dynamic = Rotary(ROPES["dynamic"])(inputs)
    default = Rotary(replace(ROPES["dynamic"], kind="default"))(inputs)
    assert all(torch.equal(a, b) for a, b in zip(dynamic, default, strict=True))


def test_yarns_magnitude_scales_cos_and_sin():
    rope = ROPES["yarn with betas"]
    cos, _ = Rotary(rope)(rows([0], (1,), (1,)))
    torch.testing.assert_close(cos, torch.full((1, 64), 1.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", [0, 8, 4])
def test_kv_bytes_are_what_is_allocated(policy, dtype):
    class Spec:
        num_layers, num_kv_heads, head_size = 3, 2, 20

    caches = allocate_kv(Spec, 7, 16, dtype, "cpu", policy)
    assert len(caches) == 3
    width = 20 if policy == 0 else 20 * policy // 8
    assert caches[0].k.shape == (7, 16, 2, width)
    tensors = [t for cache in caches for t in (cache.k, cache.v)]
    if policy:
        tensors += [t for cache in caches for t in (cache.quant.k_params, cache.quant.v_params)]
    per_block = kv_bytes_per_block(Spec, 16, dtype, policy)
    assert sum(t.nbytes for t in tensors) == 7 * per_block
    assert all(not t.any() for t in tensors)


def test_calibrated_kv_stores_no_ranges_per_token():
    class Spec:
        num_layers, num_kv_heads, head_size = 3, 2, 20

    ranges = [CalibratedKV(4, *(torch.ones(2, 20) for _ in range(4))) for _ in range(3)]
    caches = allocate_kv(Spec, 7, 16, torch.float16, "cpu", 4, ranges)
    assert [cache.quant for cache in caches] == ranges
    total = sum(t.nbytes for cache in caches for t in (cache.k, cache.v))
    assert total == 7 * kv_bytes_per_block(Spec, 16, torch.float16, 4, is_calibrated=True)
