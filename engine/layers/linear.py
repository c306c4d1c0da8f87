"""Linear layers: floating point, or AWQ W4A16. Projections that share an input are one layer.

A fused layer (q, k, v or gate, up) stores its parts side by side on the output axis, in the order of
`parts`; the weight loader writes each part into its slice. One layer is quantized as a whole or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import kernels

AWQ_PACK = 8  # 4-bit values in one int32


class Linear(nn.Module):
    """x W^T + b with weight [out, in], as nn.Linear stores it."""

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.parts = in_features, sum(parts), parts
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return nn.functional.linear(x, self.weight, self.bias)


class AwqLinear(nn.Module):
    """x W + b with W 4-bit: as it lies on disk (layers/awq_format.py), or packed for the device's kernel.

    The weight loader fills qweight, qzeros and scales, then calls finish_loading once.
    """

    def __init__(
        self, in_features: int, parts: tuple[int, ...], bias: bool, group_size: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.parts = in_features, sum(parts), parts
        self.group_size = group_size
        groups, packed = in_features // group_size, self.out_features // AWQ_PACK

        def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.qweight = parameter(in_features, packed, dtype=torch.int32)
        self.qzeros = parameter(groups, packed, dtype=torch.int32)
        self.scales = parameter(groups, self.out_features)
        self.bias = parameter(self.out_features) if bias else None
        self.packed: kernels.PackedW4A16 | None = None

    def finish_loading(self) -> None:
        """Choose the layout for this device: packed where a kernel reads it, as on disk elsewhere."""
        if kernels.has_w4a16_kernel(
            self.qweight.device, self.group_size, self.in_features, self.scales.dtype
        ):
            self.pack()

    def pack(self) -> None:
        """Replace the tensors as on disk by the kernel's layout; only this layer exists twice meanwhile."""
        self.packed = kernels.pack_w4a16(self.qweight, self.qzeros, self.scales, self.group_size)
        self.tiles = nn.Parameter(self.packed.tiles, requires_grad=False)  # counted as weights
        self.scale_zeros = nn.Parameter(self.packed.scale_zeros, requires_grad=False)
        self.qweight = self.qzeros = self.scales = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self.packed is not None:
            return kernels.w4a16_packed_matmul(x, self.packed, self.bias)
        return kernels.w4a16_matmul(
            x, self.qweight, self.qzeros, self.scales, self.group_size, self.bias
        )


def make_linear(
    in_features: int, parts: tuple[int, ...], *, bias: bool, group_size: int | None
) -> Linear | AwqLinear:
    """group_size None is floating point; otherwise AWQ with that many input rows a group."""
    if group_size is None:
        return Linear(in_features, parts, bias)
    return AwqLinear(in_features, parts, bias, group_size)
