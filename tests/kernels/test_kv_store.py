"""RoPE, QK norm, quantization and the cache write in one launch, against the reference's separate steps."""

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import reference
from engine.kernels.kv_quant import OnlineKV, dequantize, quantize_rows
from engine.kernels.kv_store import rotate_and_store
from tests.kernels.paged_pool import FORMS, empty_caches, random, relative_error

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def as_floats(cache, params, quant, name):
    """What the cache holds, in fp32; a slot that nobody wrote is NaN or all ones, as before."""
    if quant is None:
        return cache.float()
    if isinstance(quant, OnlineKV):
        scale, zero = params.float().unsqueeze(-2).unbind(-1)
    else:
        scale, zero = (getattr(quant, f"{name}_{part}") for part in ("scale", "zero"))
    return dequantize(cache, scale, zero, quant.bits)


def check(
    num_rows,
    *,
    heads=(6, 2),
    head_size=16,
    form="plain",
    dtype=torch.float32,
    normed=False,
    num_splits=0,
    head_major=False,
    device="cpu",
):
    num_heads, num_kv_heads = heads
    width = (num_heads + 2 * num_kv_heads) * head_size
    angles = random(num_rows, head_size // 2, seed=5, device=device)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    q_norm = random(head_size, seed=6, device=device).to(dtype) if normed else None
    k_norm = random(head_size, seed=7, device=device).to(dtype) if normed else None
    slots = torch.randperm(5 * 9, generator=torch.Generator().manual_seed(1))[:num_rows]
    slots[1::4] = -1
    slots = slots.to(device)
    options = {}
    if num_splits:
        given = random(num_splits, num_rows, width, device=device)
        bias = random(width, seed=8, device=device).to(dtype)
        qkv = reference.add_partials(given, bias, dtype)
        options = {"bias": bias, "dtype": dtype}
    else:
        given = qkv = random(num_rows, width, device=device).to(dtype)
    results = []
    for run, x, extra in (
        (reference.rotate_and_store, qkv, {}),
        (rotate_and_store, given, options),
    ):
        caches = empty_caches(
            9, 5, num_kv_heads, head_size, dtype, form, head_major=head_major, device=device
        )
        q = run(x, cos, sin, q_norm, k_norm, 1e-6, *caches[:2], slots, caches[2], **extra)
        results.append((q, *caches))
    (q, k, v, quant), (q_own, k_own, v_own, quant_own) = results
    error = relative_error(q_own, q)
    assert error < TOLERANCE[dtype], f"q: relative error {error:.2e}"
    written = torch.zeros(45, dtype=torch.bool, device=device)
    written[slots[slots >= 0]] = True
    for name, own, expected in (("k", k_own, k), ("v", v_own, v)):
        params = own_params = None
        if isinstance(quant, OnlineKV):
            params, own_params = (getattr(x, f"{name}_params") for x in (quant, quant_own))
        want = as_floats(expected, params, quant, name).reshape(45, -1)
        have = as_floats(own, own_params, quant_own, name).reshape(45, -1)
        torch.testing.assert_close(have[~written], want[~written], equal_nan=True, rtol=0, atol=0)
        # A value halfway between two steps may round to either: allow that in one of a thousand.
        bound = TOLERANCE[dtype] if quant is None else (0.02 if quant.bits == 4 else 3e-3)
        error = relative_error(have[written], want[written])
        assert error < max(bound, TOLERANCE[dtype]), f"{name}: relative error {error:.2e}"


@on_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1, 7, 13])
def test_every_form(num_rows, form):
    check(num_rows, form=form)


@on_cpu
@pytest.mark.parametrize("form", ["plain", "online int8", "calibrated int4"])
def test_qk_norm_partial_sums_and_strides(form):
    check(3, form=form, normed=True, head_size=20, heads=(3, 1))
    check(3, form=form, num_splits=3, head_major=True)
    check(3, form=form, normed=True, num_splits=2, dtype=torch.float16)


@on_cpu
def test_many_rows_share_a_program():
    check(44, form="online int4", heads=(2, 1))
    rows = random(70, 4 * 16)
    cos, sin = torch.ones(70, 16), torch.zeros(70, 16)
    k_cache, v_cache, _ = empty_caches(20, 5, 1, 16, torch.float32, "plain")
    slots = torch.arange(70) + 3
    q = rotate_and_store(rows, cos, sin, None, None, 0.0, k_cache, v_cache, slots)
    assert torch.equal(q.flatten(1), rows[:, :32])
    assert torch.equal(k_cache.flatten(0, 1)[3:73, 0], rows[:, 32:48])
    assert torch.equal(v_cache.flatten(0, 1)[3:73, 0], rows[:, 48:])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_is_kept_within_half_a_step(bits):
    x = random(50, 3, 20) * 4 + 1
    packed, params = quantize_rows(x, bits)
    assert packed.shape == (50, 3, 20 * bits // 8)
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    error = (dequantize(packed, scale, zero, bits) - x).abs()
    assert (error <= 0.52 * scale + 2e-3).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_constant_row_is_kept(bits):
    packed, params = quantize_rows(torch.full((2, 1, 8), 1.5), bits)
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    assert torch.equal(dequantize(packed, scale, zero, bits), torch.full((2, 1, 8), 1.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_size", [80, 128])
@pytest.mark.parametrize("num_rows", [1, 44])
def test_gpu(num_rows, head_size, form, dtype):
    options = dict(form=form, dtype=dtype, head_size=head_size, head_major=True, device="cuda")
    check(num_rows, **options)
    check(num_rows, normed=True, num_splits=4, **options)
