"""Steps without gradients: MeZO (Malladi et al. 2023, arXiv 2305.17333), forward passes on both sides of the weights.

The losses at w + radius * z and w - radius * z give the slope along z, and the step goes along z too, which is drawn
again from its seed whenever it is needed. Here: moving the factors. The passes between are the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.errors import Diverged
from tandem.finetune.optimizer import LARGEST_MOVE, Matrix, ending_in
from tandem.work import OptimParams


def direction(matrix: Matrix, index_seed: int) -> Tensor:
    """Standard normal numbers for one matrix, flat."""
    generator = torch.Generator().manual_seed(index_seed)
    return torch.randn(matrix.stop - matrix.start, generator=generator)


def nudge(
    weights: Tensor, anchor: Tensor, matrices: Sequence[Matrix], start: int, stop: int, seed: int, distance: float
) -> None:
    """weights = anchor + distance * z, for the matrices that end in start:stop."""
    for matrix in ending_in(matrices, start, stop):
        part = slice(matrix.start, matrix.stop)
        z = direction(matrix, _seed_of(seed, matrix)).to(weights.device)
        torch.add(anchor[part], z, alpha=distance, out=weights[part])


def step(
    weights: Tensor, anchor: Tensor, matrices: Sequence[Matrix], start: int, stop: int, seed: int, slope: float,
    params: OptimParams,
) -> None:  # fmt: skip
    """weights = anchor - rate * (slope * z + decay * anchor), for the matrices that end in start:stop."""
    rate = params.learning_rate
    for matrix in ending_in(matrices, start, stop):
        part = slice(matrix.start, matrix.stop)
        z = direction(matrix, _seed_of(seed, matrix)).to(weights.device)
        torch.add(anchor[part] * (1 - rate * params.weight_decay), z, alpha=-rate * slope, out=weights[part])


def slope_of(higher: float, lower: float, radius: float, params: OptimParams) -> float:
    """The loss's slope along z, clipped to `max_grad_norm`. Raises Diverged where the step would not be finite."""
    slope = (higher - lower) / (2 * radius)
    if not abs(slope) * max(params.learning_rate, 1.0) < LARGEST_MOVE:
        raise Diverged(
            f"the losses beside the weights are {higher:g} and {lower:g}, no step can be made of these: lower the "
            "learning rate or the radius; the weights are those before this step"
        )
    if params.max_grad_norm:
        slope = max(-params.max_grad_norm, min(slope, params.max_grad_norm))
    return slope


def _seed_of(seed: int, matrix: Matrix) -> int:
    # A matrix's place keeps its numbers apart from its neighbours', in whichever piece it comes.
    return (seed * 0x9E3779B97F4A7C15 + matrix.start * 0xBF58476D1CE4E5B9 + 1) % 2**63
