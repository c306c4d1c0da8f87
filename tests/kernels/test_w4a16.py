"""W4A16 kernels against (q - zero) * scale in fp32: in Triton's interpreter, and on a GPU with -m gpu."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels import reference, w4a16, w4a16_ops
from engine.kernels.w4a16 import (
    LaunchConfig,
    launch_config,
    w4a16_packed_matmul,
    w4a16_partials,
)
from engine.kernels.w4a16_layout import dequantize_w4a16, is_packable, pack_w4a16
from engine.layers.linear import AwqLinear
from engine.models.families import read_spec
from engine.models.weights import check_weights, load_model
from tests.paged import plain_logits
from tests.tiny import make_awq, make_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (K, N, group size): -1 is one group for all rows; 24 and 72 columns and rows fill no tile
SHAPES = [
    (256, 136, 128),
    (96, 72, 32),
    (192, 264, 64),
    (72, 24, -1),
    (200, 136, -1),
    (64, 8, -1),
    (512, 128, 256),
]
CUTS = {f"split {s}": LaunchConfig("split", block_m=16, split_k=s) for s in (1, 2, 3)} | {
    f"stream {p}": LaunchConfig("stream", block_m=16, programs=p) for p in (1, 2, 3, 5, 99)
}
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN, so a row or a partial sum that nobody writes shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        fresh = new_empty(self, *size, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh.fill_(-1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make_weight(k, n, group_size, dtype=torch.float16, *, symmetric=False, device=DEVICE):
    """AutoAWQ's tensors drawn over their whole range, packed; and the weight [N, K] in fp32."""
    group_size = k if group_size == -1 else group_size
    generator = torch.Generator().manual_seed(k + n)

    def integers(rows):
        return torch.randint(-(2**31), 2**31, (rows, n // 8), generator=generator).int().to(device)

    qweight, qzeros = integers(k), integers(k // group_size)
    if symmetric:
        qzeros.fill_(0x88888888 - 2**32)
    scales = 0.005 + 0.02 * torch.rand(k // group_size, n, generator=generator)
    disk = qweight, qzeros, scales.to(dtype).to(device), group_size
    return pack_w4a16(*disk), reference.dequantize_awq(*disk, torch.float32).T


def make_x(m, k, dtype=torch.float16, *, device=DEVICE):
    """Rows of a wider and longer tensor of NaN: a read past M or K shows."""
    wide = torch.full((m + 3, k + 8), float("nan"), dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(m)
    wide[:m, :k] = torch.randn(m, k, generator=generator).to(dtype).to(device)
    return wide[:m, :k]


def assert_close(out, x, weight, bias=None):
    expected = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    difference = out.float() - expected
    error = (difference.norm() / expected.norm()).item()
    largest, mean = difference.abs().max().item(), difference.abs().mean().item()
    assert error < TOLERANCE[out.dtype], f"relative {error:.2e}, max {largest:.2e}, mean {mean:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 2056, 128)])
def test_packing_loses_nothing(shape, dtype):
    packed, weight = make_weight(*shape, dtype)
    assert torch.equal(dequantize_w4a16(packed, torch.float32), weight)


@pytest.mark.parametrize("m", [1, 7, 33, 65, 129])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul(shape, m):
    packed, weight = make_weight(*shape)
    x, bias = make_x(m, shape[0]), make_x(1, shape[1])[0]
    assert_close(w4a16_packed_matmul(x, packed, bias), x, weight, bias)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU fp32 goes to plain torch")
@pytest.mark.parametrize("m", [5, 67])
def test_fp32_activations_in_the_interpreter(m):
    packed, weight = make_weight(192, 136, 64)
    x = make_x(m, 192, torch.float32)
    assert_close(w4a16_packed_matmul(x, packed, None), x, weight)


def test_symmetric_weights_have_zero_point_eight():
    packed, weight = make_weight(128, 136, 128, symmetric=True)
    x = make_x(7, 128)
    assert_close(w4a16_packed_matmul(x, packed, None), x, weight)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(384, 136, 128), (288, 72, 32), (320, 24, 64), (328, 136, -1)])
def test_any_cut_of_the_work_gives_the_same_sums(shape, cut):
    config = CUTS[cut]
    packed, weight = make_weight(*shape)
    x, bias = make_x(19, shape[0]), make_x(1, shape[1])[0]
    out = w4a16_packed_matmul(x, packed, bias, config)
    assert_close(out, x, weight, bias)
    assert torch.equal(out, w4a16_packed_matmul(x, packed, bias, config))


@pytest.mark.parametrize("split_k", [1, 3])
def test_partial_sums_in_order_are_the_product(split_k):
    config = LaunchConfig("split", split_k=split_k)
    packed, _ = make_weight(384, 136, 128)
    x, bias = make_x(5, 384), make_x(1, 136)[0]
    partials = w4a16_partials(x, packed, config)
    assert partials.shape == (split_k, 5, 136)
    total = torch.zeros(5, 136, device=x.device)
    for plane in partials:
        total += plane
    expected = w4a16_packed_matmul(x, packed, bias, config)
    assert torch.equal((total + bias.float()).half(), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_large_m_goes_through_a_workspace_piece_by_piece(bias, monkeypatch):
    monkeypatch.setattr(w4a16, "workspace_rows", lambda m, n, k: 128)
    packed, weight = make_weight(200, 264, -1)
    x = make_x(21, 200)
    bias = make_x(1, 264)[0] if bias else None
    out = w4a16_packed_matmul(x, packed, bias, LaunchConfig("workspace"))
    assert_close(out, x, weight, bias)


@pytest.mark.parametrize("m", [513, 1024, 2048, 8192])
def test_workspace_pieces_are_even_and_whole_tiles(m):
    for n, k in ((12288, 4096), (22016, 4096), (4096, 11008), (136, 72), (1000, 65536)):
        rows = w4a16.workspace_rows(m, n, k)
        assert rows % 128 == 0
        pieces = -(-n // rows)
        assert n > (pieces - 1) * rows
        assert pieces * rows - n < pieces * 128


def test_no_rows():
    packed, _ = make_weight(128, 136, 128)
    assert w4a16_packed_matmul(make_x(0, 128), packed, None).shape == (0, 136)


def test_launches_measured_best_on_an_h200():
    layers = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
    best = {1: [4, 8, 3, 11], 16: [4, 8, 3, 11], 32: [4, 8, 2, 11], 64: [2, 8, 3, 8]}
    assert {m: [launch_config(m, n, k).split_k for n, k in layers] for m in best} == best
    widths = {128: [64] * 4, 256: [64, 64, 128, 64], 384: [128, 64, 128, 64]}
    assert {m: [launch_config(m, n, k).block_m for n, k in layers] for m in widths} == widths
    assert [launch_config(m, 4096, 4096).block_m for m in (1, 8, 9, 17, 64)] == [8, 8, 16, 32, 64]
    regimes = [launch_config(m, 4096, 4096).regime for m in (1, 64, 65, 512, 513)]
    assert regimes == ["split", "split", "stream", "stream", "workspace"]


@pytest.mark.parametrize("m", [1, 5, 20, 64])
def test_partial_sums_exist_up_to_64_rows(m):
    packed, weight = make_weight(512, 136, 128)
    x = make_x(m, 512)
    partials = w4a16_partials(x, packed)
    assert partials.dtype == torch.float32
    assert_close(partials.sum(0).half(), x, weight)
    with pytest.raises(ValueError, match="1 to 64"):
        w4a16_partials(make_x(65, 512), packed)


@pytest.mark.parametrize("shape", [(4, 128), (3, 2, 256)])
def test_wrong_shapes_are_refused(shape):
    packed, _ = make_weight(256, 136, 128)
    with pytest.raises(ValueError, match=r"expected \[M, 256\]"):
        w4a16_packed_matmul(torch.zeros(shape, device=DEVICE).half(), packed, None)
    with pytest.raises(ValueError, match=r"expected \[136\]"):
        w4a16_packed_matmul(make_x(4, 256), packed, torch.zeros(8, device=DEVICE).half())


def test_which_weights_have_a_kernel():
    half = torch.float16
    assert all(is_packable(g, 1024, half) for g in (32, 64, 128, 256, 512, 1024))
    assert is_packable(72, 72, half)
    assert not is_packable(8, 1024, half)
    assert not is_packable(48, 96, half)
    assert not is_packable(128, 1024, torch.float32)


def test_a_call_without_a_kernel_says_so_once_and_is_right(caplog, monkeypatch):
    monkeypatch.setattr(w4a16_ops, "why_no_kernel", lambda x, packed: "activations are odd")
    monkeypatch.setattr(w4a16_ops, "_reported", set())
    packed, weight = make_weight(96, 72, 32)
    x = make_x(3, 96, torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close(w4a16_ops.w4a16_packed_matmul(x, packed, None), x, weight)
    assert [r.getMessage() for r in caplog.records] == [
        "W4A16 [96, 72], group size 32, torch.float32 runs in plain torch: activations are odd."
    ]


def awq_layers(model):
    return [m for m in model.decoder.modules() if isinstance(m, AwqLinear)]


def test_the_cpu_keeps_the_layout_on_disk(tmp_path):
    awq, _ = make_awq(make_checkpoint(tmp_path / "fp"), tmp_path / "awq", group_size=-1)
    layers = awq_layers(load_model(check_weights(awq, read_spec(awq)), "cpu", torch.float16))
    assert len(layers) == 12
    assert all(layer.packed is None and layer.qweight is not None for layer in layers)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_packed_layers_give_the_same_logits(path, tmp_path, monkeypatch):
    options = dict(hidden_size=96, intermediate_size=160, num_hidden_layers=2)
    source = make_checkpoint(tmp_path / "fp", "qwen2", **options)
    awq, _ = make_awq(source, tmp_path / "awq", group_size=32)
    model = load_model(check_weights(awq, read_spec(awq)), DEVICE, torch.float16)
    prompt = [11, 7, 200, 45, 3]
    monkeypatch.setattr(AwqLinear, "finish_loading", lambda layer: None)
    on_disk = load_model(check_weights(awq, read_spec(awq)), DEVICE, torch.float16)
    expected = plain_logits(on_disk, prompt)[0]
    for layer in awq_layers(model):
        if layer.packed is None:
            layer.pack()
        assert layer.qweight is None
        assert layer.qzeros is None
        assert layer.scales is None
    reason = None if path == "triton" else w4a16_ops._NO_GPU
    monkeypatch.setattr(w4a16_ops, "why_no_kernel", lambda x, packed: reason)
    actual = plain_logits(model, prompt)[0]
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < 5e-3, f"relative error {error:.2e}"


# On a GPU only


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3, 7, 16, 31, 63, 100, 250, 769])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 1096, -1), (1152, 4104, 128)])
def test_matmul_on_a_gpu(shape, m, dtype):
    packed, weight = make_weight(*shape, dtype)
    x, bias = make_x(m, shape[0], dtype), make_x(1, shape[1], dtype)[0]
    assert_close(w4a16_packed_matmul(x, packed, bias), x, weight, bias)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_assembly_and_shifts_unpack_alike(shape, dtype, monkeypatch):
    packed, _ = make_weight(*shape, dtype)
    outs = []
    for mode in ("asm", "shifts"):
        monkeypatch.setattr(w4a16, "_unpack_mode", lambda x, mode=mode: mode)
        weight = torch.empty(shape[1], shape[0], dtype=dtype, device=DEVICE)
        w4a16.dequantize_rows(packed, 0, weight)
        outs.append((weight, w4a16_packed_matmul(make_x(9, shape[0], dtype), packed, None)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


@gpu
@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize("m", [1, 8, 16, 64, 100, 256])
def test_graph_replays_never_differ(m, dependent, monkeypatch):
    """Two layers that feed each other, many times: a missing wait or a stale sum would show."""
    monkeypatch.undo()  # poisoning would put a kernel between them
    if not dependent:
        monkeypatch.setattr(w4a16, "_has_dependent_launch", lambda: False)
    first, _ = make_weight(2048, 1024, 128)
    second, _ = make_weight(1024, 2048, 128)
    x = make_x(m, 2048)

    def chain():
        hidden = x
        for _ in range(4):
            hidden = w4a16_packed_matmul(hidden, first, None)
            hidden = w4a16_packed_matmul(hidden, second, None)
            hidden = hidden / hidden.abs().amax(-1, keepdim=True)
        return hidden

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@gpu
def test_fp32_on_a_gpu_falls_back_and_says_so(caplog):
    packed, weight = make_weight(96, 72, 32)
    x = make_x(3, 96, torch.float32)
    with caplog.at_level(logging.WARNING):
        out = w4a16_ops.w4a16_packed_matmul(x, packed, None)
    assert_close(out, x, weight)
    assert "plain torch: activations are torch.float32" in caplog.text
