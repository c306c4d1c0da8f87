"""Muon (Jordan et al. 2024) for the weight matrices: momentum made orthogonal by Newton-Schulz steps.

Matrices of one shape are stacked and handled together; updates are scaled to AdamW's size
(0.2 * sqrt(max dim), Liu et al. 2025), so both optimizers share one learning rate.
"""

import torch
from torch import Tensor, nn


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices of x [N, rows, columns], roughly, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Optimizer over 2-d parameters; call `step` with the learning rate of the moment."""

    def __init__(
        self, params: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = sorted({tuple(p.shape) for p in params})
        self.groups = [[p for p in params if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [
            torch.zeros_like(torch.stack([p.data for p in group])) for group in self.groups
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp(buffer, self.momentum))
            scale = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.to(group[0].dtype).unbind()), alpha=-lr * scale)
