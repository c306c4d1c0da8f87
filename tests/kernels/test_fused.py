"""Norms and SiLU x up in Triton against the reference, alone and over split-K partial sums."""

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import fused, reference
from tests.kernels.paged_pool import random, relative_error

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def near(actual, expected, dtype):
    error = relative_error(actual, expected)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    assert actual.dtype == dtype


def check_norms(rows, width, dtype, device):
    x = random(rows, width, device=device).to(dtype)
    residual = random(rows, width, seed=1, device=device).to(dtype)
    weight, bias = (random(width, seed=s, device=device).to(dtype) for s in (2, 3))
    partials = random(3, rows, width, seed=4, device=device)
    near(
        fused.rms_norm(x, weight, 1e-5), reference.rms_norm(x.float(), weight.float(), 1e-5), dtype
    )
    for run, inputs in (
        ("add_rms_norm", (x, residual, weight, 1e-5)),
        ("add_rms_norm_partials", (partials, bias, residual, weight, 1e-5)),
        ("add_rms_norm_partials", (partials, None, residual, weight, 1e-5)),
    ):
        normed, stream = getattr(fused, run)(*inputs)
        expected, expected_stream = getattr(reference, run)(*inputs)
        near(stream, expected_stream, dtype)
        near(normed, expected, dtype)


def check_silu(rows, width, dtype, device):
    x = random(rows, 2 * width, device=device).to(dtype)
    bias = random(2 * width, seed=1, device=device).to(dtype)
    partials = random(2, rows, 2 * width, seed=2, device=device)
    near(fused.silu_and_mul(x), reference.silu_and_mul(x.float()), dtype)
    for given in (bias, None):
        expected = reference.silu_and_mul_partials(partials, given, dtype)
        near(fused.silu_and_mul_partials(partials, given, dtype), expected, dtype)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (2, 63), (5, 129), (1, 1030)])
def test_small_odd_shapes(rows, width, dtype):
    check_norms(rows, width, dtype, "cpu")
    check_silu(rows, width, dtype, "cpu")


@on_cpu
def test_heads_are_normed_one_by_one_and_slices_are_read_in_place():
    heads = random(3, 5, 16)
    weight = random(16, seed=1)
    near(
        fused.rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5), torch.float32
    )
    wide = random(4, 40)[:, 8:24]
    near(fused.rms_norm(wide, weight, 1e-5), reference.rms_norm(wide, weight, 1e-5), torch.float32)
    near(fused.silu_and_mul(wide), reference.silu_and_mul(wide), torch.float32)


@on_cpu
def test_half_sums_do_not_overflow():
    x = torch.full((2, 4096), 100.0, dtype=torch.float16)
    near(
        fused.rms_norm(x, torch.ones(4096, dtype=x.dtype), 1e-5), torch.ones(2, 4096), torch.float16
    )


@on_cpu
def test_no_rows_give_no_rows():
    assert fused.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert fused.silu_and_mul(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 129, 4096, 5120, 11008])
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_gpu(rows, width, dtype):
    check_norms(rows, width, dtype, "cuda")
    check_silu(rows, width, dtype, "cuda")
