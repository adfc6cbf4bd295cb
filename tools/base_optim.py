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
    """The nearest matrix with singular values about 1, by Newton-Schulz iteration; (.., m, n), each matrix of a stack alone."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay. For matrices that are not embeddings, and stacks (E, m, n) of them.

    A group with `parts` = p holds weights that are p matrices of equal size laid one under the other (a fused projection).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                buffer = state.setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(buffer, group["momentum"])  # Nesterov
                matrices = ahead.unflatten(-2, (group["parts"], -1)) if group["parts"] > 1 else ahead
                scale = 0.2 * max(matrices.shape[-2:]) ** 0.5  # root mean square 0.2, as AdamW's usual update
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalise(matrices).reshape(weight.shape), alpha=-group["lr"] * scale)
