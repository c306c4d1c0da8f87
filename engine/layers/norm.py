"""RMSNorm over the last dimension, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import kernels


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the hidden stream, the hidden stream x + residual); residual None: x is the stream."""
        if residual is None:
            return self(x), x
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)
