"""Muon for matrices and AdamW for the rest, as one optimizer. The loop that uses it lives in `training.loop`.

`torch.optim.Muon` takes matrices alone and computes in bfloat16, which many CPUs do slowly; this one takes every parameter, and
bfloat16 where the loop does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


# Newton-Schulz: x <- a x + b (x x^T) x + c (x x^T)^2 x brings every singular value near 1 (Jordan et al. 2024).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
SMALLEST_SIDE = 16  # a matrix with fewer rows or columns is left to AdamW


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix `[m, n]` with its singular values moved close to 1 (between about 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class MuonAdamW(Optimizer):
    """Muon on weights that are matrices or kernels (flattened to `[out, in * k]`), AdamW on all other parameters.

    Updates of matrices are scaled to the size that AdamW's have, so one learning rate serves both (Liu et al. 2025, "Muon is scalable
    for LLM training", section 2.2).

    Args:
        parameters: What to train.
        lr: Learning rate, of AdamW's size.
        weight_decay: Decoupled, of matrices and the rest alike.
        momentum: Of Muon.
        betas: Of AdamW.
        eps: Of AdamW.
        dtype: What Muon's products are computed in; bfloat16 loses nothing that matters, see torch's own.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        super().__init__(
            parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows = parameter.shape[0] if parameter.ndim > 1 else 0
                if rows and min(rows, parameter[0].numel()) >= SMALLEST_SIDE:
                    self._step_matrix(parameter, group)
                else:
                    self._step_other(parameter, group)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
        update = orthogonalize(update.flatten(1).to(self.dtype)).view(parameter.shape)
        parameter.add_(
            update.to(parameter.dtype), alpha=-0.2 * max(parameter.shape[0], parameter[0].numel()) ** 0.5 * group["lr"]
        )

    def _step_other(self, parameter: Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])
