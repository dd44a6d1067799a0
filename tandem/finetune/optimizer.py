"""AdamW on the flat float32 factors of one adapter, in pieces small enough to go between two steps of serving.

The formula is torch's, by torch's own fused kernel. Not here: learning rates over time (the jobs' runner), when an
update is due (`progress.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.errors import Diverged
from tandem.work import AdamParams

# A parameter moves by at most rate / sqrt(1 - beta2) in a step; beyond this rate it could leave float32.
LARGEST_RATE = 1e36


class AdamW:
    """The state of one run's optimiser: `step` counts updates, the moments are as long as the parameters."""

    def __init__(self, num_parameters: int, device: torch.device) -> None:
        self.step = 0
        self.exp_avg = torch.zeros(num_parameters, device=device)
        self.exp_avg_sq = torch.zeros(num_parameters, device=device)

    def norm(self, gradients: Tensor, params: AdamParams) -> float:
        """Raises Diverged where the gradients' norm is not finite, or the update might not be; nothing has been changed
        then."""
        norm = float(torch.linalg.vector_norm(gradients))
        if not norm < float("inf") or not params.learning_rate < LARGEST_RATE:
            raise Diverged(
                f"optimiser step {self.step + 1} was not made, its gradient has norm {norm:g} and its learning rate is "
                f"{params.learning_rate:g}: lower the learning rate; the weights are those before this step"
            )
        return norm

    def update(
        self, weights: Tensor, gradients: Tensor, start: int, stop: int, params: AdamParams, norm: float
    ) -> None:
        """Step number `step + 1` of parameters start:stop, gradients of this `norm` clipped as torch's
        clip_grad_norm_ does; they are zero afterwards. The caller counts `step` up after the last piece."""
        part = slice(start, stop)
        if params.max_grad_norm and norm > params.max_grad_norm:
            gradients[part] *= params.max_grad_norm / (norm + 1e-6)
        torch._fused_adamw_(
            [weights[part]],
            [gradients[part]],
            [self.exp_avg[part]],
            [self.exp_avg_sq[part]],
            [],
            [torch.tensor(float(self.step + 1))],
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
        )
        gradients[part].zero_()
