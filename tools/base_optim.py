"""Muon, for the matrices of a small model trained on CPU in float32.

Paper: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scaling that gives an update
the size of AdamW's is from Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2. torch.optim.Muon runs
its iteration in bfloat16, which CPUs without bfloat16 units do several times slower than float32; this one stays in
float32.
"""

from __future__ import annotations

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the paper: fast, and singular values end in about [0.7, 1.2]


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with singular values about 1, by Newton-Schulz iteration; same shape as the (m, n) input."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay. Only for 2-D weights that are not embeddings."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                buffer = state.setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(buffer, group["momentum"]))  # Nesterov
                scale = 0.2 * max(weight.shape) ** 0.5  # root mean square 0.2, as AdamW's usual update
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)
