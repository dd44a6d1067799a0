"""Optimizers on the flat float32 factors of one adapter, in pieces small enough to go between two steps of serving.

Each kind is a function of a piece; what has to see a whole matrix (adafactor, muon) does so when the piece with the
matrix's end comes. Not here: learning rates over time (the jobs' runner), when an update is due (`progress.py`), steps
without gradients (`zeroth.py`).

Shape letters: P parameters of the adapter, R rank (the rows of every factor as it is kept), C its columns, K blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.errors import Diverged, InvalidRequest
from tandem.work import OptimParams

# A parameter moves by a few times the rate in a step; beyond this it could leave float32.
LARGEST_MOVE = 1e36
BLOCK = 256
MUON_MOMENTUM = 0.95
# The quintic iteration's coefficients, chosen for a steep slope at zero (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Adafactor's constants as torch has them: the decay of the second moment, the least step, the update's largest rms.
ADAFACTOR_DECAY, ADAFACTOR_LEAST, ADAFACTOR_RMS = -0.8, 1e-3, 1.0


class Matrix(NamedTuple):
    """Parameters start:stop are a matrix of `rows` rows; `row_at` and `column_at` are the places of its first row and
    column among those of all matrices."""

    start: int
    stop: int
    rows: int
    row_at: int
    column_at: int

    @property
    def columns(self) -> int:
        return (self.stop - self.start) // self.rows


def matrices_of(shapes: Sequence[tuple[int, int]]) -> list[Matrix]:
    """The matrices of a flat vector, by (rows, columns)."""
    found, at, row_at, column_at = [], 0, 0, 0
    for rows, columns in shapes:
        found.append(Matrix(at, at + rows * columns, rows, row_at, column_at))
        at, row_at, column_at = at + rows * columns, row_at + rows, column_at + columns
    return found


def ending_in(matrices: Sequence[Matrix], start: int, stop: int) -> Iterator[Matrix]:
    """Those whose last parameter is in the piece start:stop: every matrix is in exactly one of an update's pieces."""
    return (m for m in matrices if start < m.stop <= stop)


class Optimizer:
    """The state of one run's optimizer. `step` counts updates; `kind` is that of the first one, and `state` its tensors
    by name (`checkpoint.py` keeps them)."""

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.step = 0
        self.kind = ""
        self.state: dict[str, Tensor] = {}
        self.matrices = matrices_of(shapes)
        self.num_parameters = self.matrices[-1].stop
        self._device = device

    def begin(self, kind: str) -> None:
        """Become an optimizer of this kind, with nothing learnt yet."""
        sizes = {
            "adamw": {"exp_avg": self.num_parameters, "exp_avg_sq": self.num_parameters},
            "sgd": {"momentum": self.num_parameters},
            "lion": {"exp_avg": self.num_parameters},
            "muon": {"momentum": self.num_parameters},
            "adafactor": {
                "row_var": sum(m.rows for m in self.matrices), "column_var": sum(m.columns for m in self.matrices),
            },
            "adamw8bit": {},
        }[kind]  # fmt: skip
        self.state = {name: torch.zeros(size, device=self._device) for name, size in sizes.items()}
        if kind == "adamw8bit":
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                zero = int((code(signed) == 0).nonzero()[0])
                self.state[name] = torch.full((self.num_parameters,), zero, dtype=torch.uint8, device=self._device)
                self.state[f"{name}_scale"] = torch.zeros(-(-self.num_parameters // BLOCK), device=self._device)
        self.kind = kind

    def norm(self, gradients: Tensor, params: OptimParams) -> float:
        """The gradients' norm, before an update's first piece. Raises Diverged where it is not finite, or the update
        might not be, InvalidRequest where the run has another kind of optimizer; nothing has been changed then."""
        if self.kind not in ("", params.kind):
            raise InvalidRequest(
                f"this run's optimizer is {self.kind}, which keeps a state of its own: go on with it, or open another "
                f"run for {params.kind}",
                "kind",
            )
        norm = float(torch.linalg.vector_norm(gradients))
        move = params.learning_rate * (max(norm, 1.0) if params.kind == "sgd" else 1.0)
        if not norm < float("inf") or not move < LARGEST_MOVE:
            raise Diverged(
                f"optimiser step {self.step + 1} was not made, its gradient has norm {norm:g} and its learning rate is "
                f"{params.learning_rate:g}: lower the learning rate; the weights are those before this step"
            )
        if not self.kind:
            self.begin(params.kind)
        return norm

    def update(
        self, weights: Tensor, gradients: Tensor, start: int, stop: int, params: OptimParams, norm: float
    ) -> None:
        """Step number `step + 1` of parameters start:stop (of the matrices that end there), gradients of this `norm`
        clipped as torch's clip_grad_norm_ does; they are zero afterwards. Pieces begin at multiples of BLOCK. The
        caller counts `step` up after the last one."""
        clip = 1.0
        if params.max_grad_norm and norm > params.max_grad_norm:
            clip = params.max_grad_norm / (norm + 1e-6)
        if whole := BY_MATRIX.get(self.kind):
            for matrix in ending_in(self.matrices, start, stop):
                part = slice(matrix.start, matrix.stop)
                gradient = gradients[part].mul_(clip)
                whole(self, weights[part].view(matrix.rows, -1), gradient.view(matrix.rows, -1), matrix, params)
                gradient.zero_()
        else:
            gradient = gradients[start:stop].mul_(clip)
            BY_PIECE[self.kind](self, weights[start:stop], gradient, slice(start, stop), params)
            gradient.zero_()


# ---------------------------------------------------------------- piece by piece


def _adamw(optimizer: Optimizer, w: Tensor, g: Tensor, part: slice, params: OptimParams) -> None:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, by torch's own kernel."""
    _fused_adamw(optimizer, w, g, optimizer.state["exp_avg"][part], optimizer.state["exp_avg_sq"][part], params)


def _fused_adamw(optimizer: Optimizer, w: Tensor, g: Tensor, mean: Tensor, square: Tensor, params: OptimParams) -> None:
    torch._fused_adamw_(
        [w], [g], [mean], [square], [], [torch.tensor(float(optimizer.step + 1))],
        lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, weight_decay=params.weight_decay,
        eps=params.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _adamw8bit(optimizer: Optimizer, w: Tensor, g: Tensor, part: slice, params: OptimParams) -> None:
    """AdamW whose moments are kept in 8 bits, block by block (Dettmers et al. 2022, arXiv 2110.02861)."""
    state, blocks = optimizer.state, slice(part.start // BLOCK, -(-part.stop // BLOCK))
    mean = dequantized(state["exp_avg"][part], state["exp_avg_scale"][blocks], signed=True)
    square = dequantized(state["exp_avg_sq"][part], state["exp_avg_sq_scale"][blocks], signed=False)
    _fused_adamw(optimizer, w, g, mean, square, params)
    state["exp_avg"][part], state["exp_avg_scale"][blocks] = quantized(mean, signed=True)
    state["exp_avg_sq"][part], state["exp_avg_sq_scale"][blocks] = quantized(square, signed=False)


def _sgd(optimizer: Optimizer, w: Tensor, g: Tensor, part: slice, params: OptimParams) -> None:
    """As torch: weight decay is part of the gradient, no dampening."""
    if params.weight_decay:
        g.add_(w, alpha=params.weight_decay)
    if params.momentum:
        g = optimizer.state["momentum"][part].mul_(params.momentum).add_(g)
    w.add_(g, alpha=-params.learning_rate)


def _lion(optimizer: Optimizer, w: Tensor, g: Tensor, part: slice, params: OptimParams) -> None:
    """Chen et al. 2023, arXiv 2302.06675."""
    mean = optimizer.state["exp_avg"][part]
    direction = torch.lerp(g, mean, params.beta1).sign_()
    w.mul_(1 - params.learning_rate * params.weight_decay).add_(direction, alpha=-params.learning_rate)
    mean.lerp_(g, 1 - params.beta2)


# ---------------------------------------------------------------- matrix by matrix


def _adafactor(optimizer: Optimizer, w_RC: Tensor, g_RC: Tensor, matrix: Matrix, params: OptimParams) -> None:
    """Shazeer and Stern 2018, arXiv 1804.04235, with torch's constants: the learning rate is relative to the matrix's
    root mean square."""
    step, tiny = optimizer.step + 1, torch.finfo(torch.float32).eps
    row_R = optimizer.state["row_var"][matrix.row_at : matrix.row_at + matrix.rows]
    column_C = optimizer.state["column_var"][matrix.column_at : matrix.column_at + matrix.columns]
    fresh = step**ADAFACTOR_DECAY
    alpha = max(ADAFACTOR_LEAST, _rms(w_RC)) * min(params.learning_rate, 1 / math.sqrt(step))
    w_RC.mul_(1 - params.learning_rate * params.weight_decay)
    squared_RC = g_RC.square()
    row_R.lerp_(squared_RC.mean(1), fresh)
    column_C.lerp_(squared_RC.mean(0), fresh)
    variance_RC = torch.outer(row_R, column_C).div_(row_R.mean().clamp(min=tiny))
    update_RC = variance_RC.clamp_(min=tiny * tiny).rsqrt_().mul_(g_RC)
    w_RC.add_(update_RC, alpha=-alpha / max(1.0, _rms(update_RC) / ADAFACTOR_RMS))


def _muon(optimizer: Optimizer, w_RC: Tensor, g_RC: Tensor, matrix: Matrix, params: OptimParams) -> None:
    """Momentum, orthogonalised (Jordan et al. 2024), at a rate that moves the weights about as far as AdamW's would
    (Liu et al. 2025, arXiv 2502.16982; torch's "match_rms_adamw")."""
    momentum = MUON_MOMENTUM if params.momentum is None else params.momentum
    mean_RC = optimizer.state["momentum"][matrix.start : matrix.stop].view(matrix.rows, -1).lerp_(g_RC, 1 - momentum)
    update_RC = orthogonalised(torch.lerp(g_RC, mean_RC, momentum))
    rate = 0.2 * math.sqrt(max(w_RC.shape)) * params.learning_rate
    w_RC.mul_(1 - params.learning_rate * params.weight_decay).add_(update_RC, alpha=-rate)


def orthogonalised(x_RC: Tensor) -> Tensor:
    """U V^T of x = U S V^T, nearly: singular values come out between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = x_RC if x_RC.shape[0] <= x_RC.shape[1] else x_RC.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if x_RC.shape[0] <= x_RC.shape[1] else x.T


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())


Piece = Callable[[Optimizer, Tensor, Tensor, slice, OptimParams], None]
Whole = Callable[[Optimizer, Tensor, Tensor, Matrix, OptimParams], None]
BY_PIECE: dict[str, Piece] = {"adamw": _adamw, "adamw8bit": _adamw8bit, "sgd": _sgd, "lion": _lion}
BY_MATRIX: dict[str, Whole] = {"adafactor": _adafactor, "muon": _muon}


# ---------------------------------------------------------------- 8 bits


@cache
def code(signed: bool) -> Tensor:
    """The 256 numbers in [-1, 1] (or [0, 1]) that a byte stands for, ascending: seven decades, each with twice as many
    numbers as the one below it (dynamic tree quantisation, section 1.2 of the paper)."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        numbers += middles + ([-x for x in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@cache
def _edges(signed: bool) -> Tensor:
    """Between neighbours of the code. What is not zero never becomes zero where there is no sign: a second moment that
    vanishes makes a step without bound."""
    numbers = code(signed)
    edges = (numbers[1:] + numbers[:-1]) / 2
    if not signed:
        edges[0] = 0.0
    return edges


def quantized(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Bytes of the nearest numbers, and each block's largest magnitude, which they are multiples of."""
    padded_KB = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale_K = padded_KB.abs().amax(1)
    relative = (padded_KB / scale_K.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(x)]
    return torch.bucketize(relative, _edges(signed).to(x.device)).to(torch.uint8), scale_K


def dequantized(bytes_P: Tensor, scale_K: Tensor, signed: bool) -> Tensor:
    """The reverse of `quantized`."""
    numbers = code(signed).to(bytes_P.device)[bytes_P.int()]
    return numbers * scale_K.repeat_interleave(BLOCK)[: len(numbers)]
