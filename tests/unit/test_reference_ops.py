"""The reference ops against sums written out position by position."""

import pytest
import torch

from engine.kernels import (
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
from engine.layers.awq_format import pack_awq, quantize_to_awq


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance=1e-5):
    error = (actual.float() - expected.float()).abs()
    assert error.max() < tolerance, f"max error {error.max():.2e}, mean {error.mean():.2e}"


def naive_attention(q, k, v, scale, window):
    """q are the last rows of k and v; one query and one head at a time, in fp64."""
    num_queries, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(num_queries):
        i = k.shape[0] - num_queries + row
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(num_heads):
            keys = k[first : i + 1, head // group].double()
            weight = (keys @ q[row, head].double() * scale).softmax(0)
            out[row, head] = weight @ v[first : i + 1, head // group].double()
    return out


@pytest.mark.parametrize("width", [1, 7, 63, 129])
def test_norms(width):
    x, residual, weight = random(5, width), random(5, width, seed=1), random(width, seed=2)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_close(rms_norm(x, weight, 1e-5), expected)
    normed, stream = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(stream, x + residual)
    assert_close(normed, rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_norm_accumulates_in_fp32(dtype):
    x = torch.full((2, 4096), 100.0, dtype=dtype)  # the sum of squares overflows fp16
    assert_close(rms_norm(x, torch.ones(4096, dtype=dtype), 1e-5), torch.ones(2, 4096), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_turns_each_pair_by_its_angle(dtype):
    x = random(3, 2, 6).to(dtype)
    angles = random(3, 3, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = apply_rotary(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    pairs = torch.complex(x[..., :3].float(), x[..., 3:].float())
    turned = pairs * torch.complex(cos, sin)[:, None]
    assert out.dtype == dtype
    assert_close(
        out, torch.cat((turned.real, turned.imag), -1), 1e-5 if dtype.itemsize == 4 else 0.02
    )


def test_silu_and_mul_takes_the_gate_first():
    x = random(4, 14)
    assert_close(silu_and_mul(x), x[:, :7] * x[:, :7].sigmoid() * x[:, 7:])


def test_store_kv_skips_padding():
    k, v = random(3, 2, 4), random(3, 2, 4, seed=1)
    k_cache, v_cache = torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 4)
    store_kv(k, v, k_cache, v_cache, torch.tensor([7, -1, 0]))
    assert torch.equal(k_cache[1, 2], k[0])
    assert torch.equal(v_cache[0, 0], v[2])
    assert k_cache.count_nonzero() == 2 * k[0].numel()


@pytest.mark.parametrize("window", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("lens", [(1,), (7, 1, 33)])
def test_attention_without_a_cache(lens, window):
    total = sum(lens)
    q, k, v = random(total, 6, 8), random(total, 2, 8, seed=1), random(total, 2, 8, seed=2)
    out = varlen_attention(q, k, v, lens, 0.3, window)
    expected = [
        naive_attention(*rows, 0.3, window)
        for rows in zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
    ]
    assert_close(out, torch.cat(expected))


# (context lengths, query lengths, number of decodes)
BATCHES = {
    "one decode": ((23,), (1,), 1),
    "decodes": ((1, 5, 63, 20, 6), (1, 1, 1, 1, 1), 5),
    "prefill": ((33,), (33,), 0),
    "chunk": ((33,), (7,), 0),
    "one-row chunk": ((33, 9), (1, 4), 0),
    "mixed": ((17, 2, 41, 8, 30), (1, 1, 9, 8, 1), 2),
    "one decode beside a prefill": ((17, 41), (1, 9), 1),
}


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention(batch, heads, window):
    """Every slot that no sequence owns holds NaN, as a freed block may."""
    contexts, query_lens, num_decodes = BATCHES[batch]
    num_heads, num_kv_heads = heads
    block_size, head_size = 5, 8
    k_cache = torch.full((60, block_size, num_kv_heads, head_size), float("nan"))
    v_cache = k_cache.clone()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    width = -(-max(contexts) // block_size) + 1
    tables = torch.full((len(contexts), width), -1, dtype=torch.int32)
    q = random(sum(query_lens), num_heads, head_size)
    expected, row = [], 0
    for b, context in enumerate(contexts):
        blocks = [order.pop() for _ in range(-(-context // block_size))]
        tables[b, : len(blocks)] = torch.tensor(blocks)
        k, v = (
            random(context, num_kv_heads, 8, seed=b),
            random(context, num_kv_heads, 8, seed=b + 9),
        )
        slots = torch.tensor([blocks[p // 5] * 5 + p % 5 for p in range(context)])
        store_kv(k, v, k_cache, v_cache, slots)
        rows = q[row : row + query_lens[b]]
        expected.append(naive_attention(rows, k, v, 0.4, window))
        row += query_lens[b]
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        tables,
        torch.tensor(contexts, dtype=torch.int32),
        query_lens,
        max(contexts),
        num_decodes,
        0.4,
        window,
    )
    assert_close(out, torch.cat(expected))


def test_padding_rows_never_produce_nan():
    """As a captured graph pads: sequences of length 0 with an empty block table, and spare rows."""
    cache = random(4, 5, 2, 8)
    tables = torch.tensor([[2, 1], [-1, -1], [-1, -1]], dtype=torch.int32)
    lens = torch.tensor([7, 0, 0], dtype=torch.int32)
    q = random(4, 6, 8)
    out = paged_attention(q, cache, cache, tables, lens, (1, 1, 1), 7, 3, 0.4, None)
    assert out.shape == q.shape
    assert out.isfinite().all()
    alone = paged_attention(q[:1], cache, cache, tables[:1], lens[:1], (1,), 7, 1, 0.4, None)
    assert_close(out[:1], alone)


def test_a_lone_padding_row_never_produces_nan():
    cache, table = random(4, 5, 2, 8), torch.tensor([[-1]], dtype=torch.int32)
    lens = torch.tensor([0], dtype=torch.int32)
    out = paged_attention(random(1, 6, 8), cache, cache, table, lens, (1,), 0, 1, 0.4, None)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_attention_is_near_fp32(dtype):
    q, k, v = random(63, 6, 16), random(63, 2, 16, seed=1), random(63, 2, 16, seed=2)
    halves = [t.to(dtype) for t in (q, k, v)]
    expected = naive_attention(*(t.float() for t in halves), 0.25, 9)
    assert_close(varlen_attention(*halves, (63,), 0.25, 9), expected, 0.03)


def test_awq_nibbles_follow_autoawqs_order():
    columns = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]])
    packed = pack_awq(columns)
    nibbles = [(int(packed[0, 0]) >> (4 * i)) & 15 for i in range(8)]
    assert nibbles == [0, 2, 4, 6, 1, 3, 5, 15]
    assert torch.equal(unpack_awq(packed), columns.int())


@pytest.mark.parametrize("group_size", [4, 28])
@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_awq_matmul_is_zero_point_then_scale(group_size, scales_dtype):
    groups = 28 // group_size
    scales = (random(groups, 24).abs() + 0.1).to(scales_dtype)
    zeros = torch.randint(0, 16, (groups, 24), generator=torch.Generator().manual_seed(1))
    weight = random(28, 24, seed=2)
    qweight, qzeros = quantize_to_awq(weight, scales, zeros, group_size)
    q = unpack_awq(qweight)
    rows = torch.arange(28) // group_size
    expected = (q - zeros[rows]).float() * scales.float()[rows]
    actual = dequantize_awq(qweight, qzeros, scales, group_size, torch.float32)
    assert torch.equal(actual, expected)
    x, bias = random(3, 28, seed=4), random(24, seed=5)
    out = w4a16_matmul(x, qweight, qzeros, scales, group_size, bias)
    assert_close(out, x @ expected + bias, 1e-4)
