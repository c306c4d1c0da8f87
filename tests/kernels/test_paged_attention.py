"""The attention kernel against the reference: in Triton's interpreter, and on a GPU with -m gpu."""

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.attention import Launch, count_splits, paged_attention, supports
from tests.kernels.paged_pool import FORMS, make_pool, relative_error

# (context lengths, query lengths, number of decodes)
BATCHES = {
    "one decode": ((23,), (1,), 1),
    "decodes": ((1, 5, 63, 20, 6), (1, 1, 1, 1, 1), 5),
    "padded decodes": ((7, 0, 33, 0), (1, 1, 1, 1), 4),
    "prefill": ((33,), (33,), 0),
    "chunk": ((37,), (7,), 0),
    "mixed": ((17, 2, 41, 8, 30), (1, 1, 9, 8, 1), 2),
    "one decode beside a prefill": ((17, 41), (1, 20), 1),
}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
SMALL = {"decode": Launch(16, 16, 4, 1), "prefill": Launch(16, 16, 4, 1)}


def check(pool, window=None, tolerance=2e-3, capacity=None, **options):
    """Runs into memory that was NaN: a row that nobody writes shows.

    capacity: the longest context that the launch must fit, if not that of the pool.
    """
    scale = pool.q.shape[-1] ** -0.5
    torch.empty_like(pool.q).fill_(float("nan"))  # the allocator hands these bytes to the output
    out = paged_attention(
        pool.q,
        pool.k_cache,
        pool.v_cache,
        pool.tables,
        pool.context_lens,
        pool.cu_seqlens,
        pool.query_lens,
        capacity or int(pool.context_lens.max()),
        pool.num_decodes,
        scale,
        window,
        pool.quant,
        **options,
    )
    expected = pool.expected(scale, window)
    error = relative_error(out, expected)
    assert error < tolerance, f"relative error {error:.2e}"
    empty = [b for b, n in enumerate(pool.context_lens.tolist()) if n == 0]
    for b in empty:
        assert not out[pool.cu_seqlens[b] : pool.cu_seqlens[b + 1]].any()
    return out


@on_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_in_every_form(batch, form):
    check(make_pool(*BATCHES[batch], form=form), **SMALL)


@on_cpu
@pytest.mark.parametrize("window", [1, 6, 1000])
@pytest.mark.parametrize("batch", ["decodes", "mixed", "prefill"])
def test_sliding_windows(batch, window):
    check(make_pool(*BATCHES[batch]), window, num_splits=2, **SMALL)


@on_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_splits", [2, 3, 20])
def test_splits_add_up(num_splits, form):
    contexts = (1, 0, 90, 17)
    pool = make_pool(contexts, (1,) * 4, 4, form=form)
    counters = torch.zeros(64, dtype=torch.int32)
    check(pool, num_splits=num_splits, counters=counters, **SMALL)
    assert not counters.any()


@on_cpu
@pytest.mark.parametrize("form", ["plain", "online int8"])
def test_a_launch_for_long_contexts_serves_short_ones(form):
    """As a captured graph does: splits for 4096 tokens, and sequences that are too short for most."""
    pool = make_pool((1, 0, 300, 150), (1,) * 4, 4, num_heads=1, num_kv_heads=1, form=form)
    counters = torch.zeros(64, dtype=torch.int32)
    check(pool, capacity=4096, counters=counters, **SMALL)
    assert count_splits(4, 4096, 4) > 1
    assert not counters.any()


@on_cpu
@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (7, 1), (10, 2)])
@pytest.mark.parametrize("form", ["plain", "online int4"])
def test_head_groups(heads, form):
    pool = make_pool(*BATCHES["mixed"], num_heads=heads[0], num_kv_heads=heads[1], form=form)
    check(pool, num_splits=2, **SMALL)


@on_cpu
@pytest.mark.parametrize("head_size", [16, 80, 96])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes_that_fill_no_power_of_two(head_size, form):
    check(make_pool((9, 20), (1, 3), 1, head_size=head_size, form=form), **SMALL)


@on_cpu
@pytest.mark.parametrize("block_size", [1, 16, 32, 48])
@pytest.mark.parametrize("form", ["plain", "online int8"])
def test_block_sizes_and_strides(block_size, form):
    """16 divides both block sizes 32 and 48, so that a tile lies in one block."""
    pool = make_pool(*BATCHES["mixed"], block_size=block_size, form=form, head_major=True)
    check(pool, 11, num_splits=2, **SMALL)


@on_cpu
def test_half_types_round_once():
    check(make_pool(*BATCHES["mixed"], dtype=torch.float16), **SMALL)
    check(make_pool(*BATCHES["mixed"], dtype=torch.float16, form="online int8"), **SMALL)
    check(make_pool(*BATCHES["mixed"], dtype=torch.float16, form="calibrated int4"), **SMALL)


@on_cpu
def test_rows_past_the_last_sequence_are_zero():
    pool = make_pool((9,), (1,), 1)
    pool.q = pool.q.repeat(3, 1, 1)
    out = check(pool, **SMALL)
    assert not out[1:].any()


@on_cpu
def test_q_may_be_a_slice_of_qkv():
    pool = make_pool(*BATCHES["mixed"])
    wide = torch.full((pool.q.shape[0], 10, 16), float("nan"))
    wide[:, :6] = pool.q
    pool.q = wide[:, :6]
    check(pool, **SMALL)


def test_splits_follow_from_host_numbers_alone():
    assert count_splits(32, 4096, 132) == 8
    assert count_splits(1, 100, 132) == 1
    assert count_splits(2048, 4096, 132) == 3
    assert count_splits(10**6, 4096, 132) == 1
    assert count_splits(1, 10**6, 132) == 64


def test_what_it_does_not_take_is_named():
    pool = make_pool((9,), (1,), 1)
    assert supports(pool.q, pool.k_cache, pool.v_cache, None) is None
    assert supports(pool.q.half(), pool.k_cache, pool.v_cache, None) is not None
    odd = make_pool((9,), (1,), 1, head_size=20, form="online int4")
    assert "int4" in supports(odd.q, odd.k_cache, odd.v_cache, odd.quant)


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-4}
GPU_BATCHES = {
    "decodes": ((1, 7, 63, 64, 129, 1000, 0, 2311), (1,) * 8, 8),
    "prefill": ((1, 129, 700), (1, 129, 700), 0),
    "chunks": ((1000, 65, 300), (63, 2, 129), 0),
    "mixed": ((1500, 0, 33, 700, 64), (1, 1, 1, 127, 64), 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in FORMS for dtype in (torch.float16, torch.bfloat16)]
    + [("plain", torch.float32), ("online int8", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("batch", GPU_BATCHES)
def test_gpu_batches(batch, form, dtype):
    pool = make_pool(
        *GPU_BATCHES[batch], num_heads=8, num_kv_heads=2, head_size=128, block_size=64,
        dtype=dtype, form=form, head_major=True, device="cuda",
    )  # fmt: skip
    check(pool, None, TOLERANCE[dtype])
    check(pool, None, TOLERANCE[dtype], num_splits=5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("head_size", "heads"), [(64, (4, 4)), (80, (14, 2)), (96, (5, 1)), (256, (4, 2))], ids=str
)
def test_gpu_shapes(head_size, heads, form):
    pool = make_pool(
        *GPU_BATCHES["mixed"], num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size,
        block_size=16, dtype=torch.float16, form=form, device="cuda",
    )  # fmt: skip
    check(pool)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["plain", "online int8"])
@pytest.mark.parametrize("window", [1, 63, 700])
@pytest.mark.parametrize("batch", GPU_BATCHES)
def test_gpu_windows(batch, window, form):
    pool = make_pool(
        *GPU_BATCHES[batch], head_size=128, block_size=48, dtype=torch.float16, form=form,
        device="cuda",
    )  # fmt: skip
    check(pool, window, num_splits=3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_gpu_assembly_unpacks_as_plain_triton_does(form):
    pool = make_pool(
        *GPU_BATCHES["mixed"], head_size=128, block_size=64, dtype=torch.float16, form=form,
        device="cuda",
    )  # fmt: skip
    error = relative_error(check(pool, assembly=True), check(pool, assembly=False))
    assert error < 5e-4, f"relative error {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_runs_agree_bit_for_bit(form):
    """Splits finish in any order; the sum does not depend on it."""
    pool = make_pool(
        (2311,) * 16, (1,) * 16, 16, num_heads=8, head_size=128, block_size=64,
        dtype=torch.float16, form=form, head_major=True, device="cuda",
    )  # fmt: skip
    first = check(pool, num_splits=16)
    assert all(torch.equal(check(pool, num_splits=16), first) for _ in range(3))


@pytest.mark.gpu
def test_gpu_graph_replays_longer_contexts_bit_for_bit():
    """Captured with short contexts; replayed with long ones, it equals an eager launch exactly."""
    pool = make_pool(
        *GPU_BATCHES["decodes"], num_heads=8, num_kv_heads=2, head_size=128, block_size=64,
        dtype=torch.float16, form="online int8", head_major=True, device="cuda",
    )  # fmt: skip
    counters = torch.zeros(64, dtype=torch.int32, device="cuda")
    eager = check(pool, num_splits=4, counters=counters).clone()
    lens, long_lens = pool.context_lens, pool.context_lens.clone()

    def launch():
        return paged_attention(
            pool.q, pool.k_cache, pool.v_cache, pool.tables, lens, pool.cu_seqlens,
            pool.query_lens, 2311, pool.num_decodes, 128**-0.5, None, pool.quant, counters,
            num_splits=4,
        )  # fmt: skip

    lens.clamp_(max=3)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    lens.copy_(long_lens)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager)
    assert not counters.any()
