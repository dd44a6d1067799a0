"""One adapter being trained: its factors and gradients as flat float32 vectors, its optimiser.

Not here: how gradients come about (`model/gradients.py`), when an update is due (`scheduler/progress.py`).

Shape letters: P parameters of the adapter, R rank, I in features, O out features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tandem.finetune.optimizer import Optimizer
from tandem.work import LoraConfig

Pair = tuple[Tensor, Tensor]  # (a_RI, b_RO)
# Per layer, by target.
LayerPairs = Sequence[Mapping[str, Pair]]


class Run:
    """`shapes` maps each target that is trained to (in_features, out_features); every layer has all of them.

    `weights_P` and `gradients_P` hold, layer by layer and target by target, a_RI and then b_RO (PEFT's lora_B
    transposed), without the scaling. A run may be somewhere else for a while (`spill.py`): then these are empty.
    """

    def __init__(
        self,
        lora: LoraConfig,
        num_layers: int,
        shapes: Mapping[str, tuple[int, int]],
        device: torch.device,
        is_here: bool = True,
    ) -> None:
        self.lora = lora
        self.num_layers = num_layers
        self.shapes = dict(shapes)
        self.num_parameters = num_layers * lora.rank * sum(i + o for i, o in shapes.values())
        self.device = device
        self.weights_P = self.gradients_P = torch.empty(0, device=device)
        self.optimizer = self.new_optimizer()
        self.num_passes = 0  # examples so far: dropout masks differ from one to the next
        if is_here:
            self.take(self.fresh())

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
        return self.lora.alpha / (math.sqrt(self.lora.rank) if self.lora.use_rslora else self.lora.rank)

    @property
    def weights(self) -> LayerPairs:
        """Views of the factors."""
        return self._views(self.weights_P)

    @property
    def gradients(self) -> LayerPairs:
        """Views of the gradients."""
        return self._views(self.gradients_P)

    def set_weights(self, layers: LayerPairs) -> None:
        """Copy factors in; `layers` holds exactly this run's targets, in its rank."""
        for mine, theirs in zip(self.weights, layers, strict=True):
            assert mine.keys() == theirs.keys()
            for name, pair in mine.items():
                for tensor, value in zip(pair, theirs[name], strict=True):
                    tensor.copy_(value)

    def renew_optimizer(self) -> None:
        """Forget what the optimiser has learnt of the gradients so far."""
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> Optimizer:
        """One that has learnt nothing yet, for these factors."""
        sides = [(self.lora.rank, features) for pair in self.shapes.values() for features in pair]
        return Optimizer(sides * self.num_layers, self.device)

    @property
    def is_here(self) -> bool:
        """Whether the tensors are."""
        return self.weights_P.numel() > 0

    def tensors(self) -> dict[str, Tensor]:
        """All that `take` needs to go on with; the optimizer's kind and the counters stay in any case."""
        return {"weights": self.weights_P, "gradients": self.gradients_P, **self.optimizer.state}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with these, which are `tensors` of this run, or `fresh`."""
        state = dict(tensors)
        self.weights_P, self.gradients_P = state.pop("weights"), state.pop("gradients")
        self.optimizer.state = state

    def leave(self) -> None:
        """Let go of the tensors."""
        self.weights_P = self.gradients_P = torch.empty(0, device=self.device)
        self.optimizer.state = {}

    def fresh(self) -> dict[str, Tensor]:
        """A run's tensors at its beginning: the factors as PEFT starts them, no gradients."""
        weights_P = torch.zeros(self.num_parameters, device=self.device)
        self._draw(self._views(weights_P))
        return {"weights": weights_P, "gradients": torch.zeros_like(weights_P)}

    def factors_of(self, tensors: Mapping[str, Tensor]) -> LayerPairs:
        """Views of the factors among `tensors`."""
        return self._views(tensors["weights"])

    def _views(self, flat_P: Tensor) -> LayerPairs:
        rank, at = self.lora.rank, 0
        layers: list[dict[str, tuple[Tensor, Tensor]]] = []
        for _ in range(self.num_layers):
            layer = {}
            for name, (in_features, out_features) in self.shapes.items():
                middle, end = at + rank * in_features, at + rank * (in_features + out_features)
                layer[name] = (
                    flat_P[at:middle].view(rank, in_features),
                    flat_P[middle:end].view(rank, out_features),
                )
                at = end
            layers.append(layer)
        return layers

    def _draw(self, layers: LayerPairs) -> None:
        """a as PEFT starts it (kaiming uniform with a = sqrt(5): within 1 / sqrt(I)); b is zero."""
        generator = torch.Generator().manual_seed(self.lora.seed)
        for layer in layers:
            for a_RI, _ in layer.values():
                bound = 1.0 / math.sqrt(a_RI.shape[1])
                a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator))
