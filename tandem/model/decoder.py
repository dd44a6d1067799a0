"""What the numbers mean: one forward for all rows of a batch, for every family that `spec.py` can describe.

Here: the order of operations. Not here: how an operation is done (`ops/`), where weights come from (`weights.py`),
who is in the batch (`engine/`).

Shape letters: T rows of the flat batch, D hidden size, M rows whose logits are wanted, V vocabulary, R rank rows,
O output features, I input features, C features of a head, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from tandem.model.rope import RopeSpec, rope_frequencies
from tandem.model.spec import LayerSpec, ModelSpec, targets
from tandem.model.weights import LayerWeights, Weights
from tandem.ops import Kernels
from tandem.ops.attention import Layout, Reads
from tandem.ops.linear import LinearWeight

MIN_ROWS = 4  # from here on a row's result does not depend on how many others there are


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The adapters of one batch. foreign_TR (bool) is true where rank row r is not of row t's adapter.

    layers: per layer, by target name, (a_RI, b_RO), the scaling already in b.
    """

    foreign_TR: Tensor
    layers: Sequence[Mapping[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, slots=True)
class _Step:
    """What is the same in all layers of one forward."""

    layout: Layout
    reads: dict[int | None, Reads]
    angles: dict[RopeSpec, tuple[Tensor, Tensor]]


class Decoder:
    """A model's weights with the way through them. Holds no state of any sequence."""

    def __init__(self, spec: ModelSpec, weights: Weights, kernels: Kernels) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.targets = targets(spec)
        self.dtype = weights.embedding_VD.dtype
        self.gated = {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_tanh_mul}[spec.activation]
        device = weights.embedding_VD.device
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        self.frequencies = {rope: rope_frequencies(rope).to(device) for rope in ropes}
        self.windows = {layer.window for layer in spec.layers}
        # The scale in the model's own precision, as the checkpoints were trained.
        scale = spec.embedding_scale
        self.embedding_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype, device=device)

    def forward(
        self, tokens_T: Tensor, layout: Layout, caches: Sequence[Tensor], lora: LoraBatch | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [T, D]. Keys and values of all rows are written to `caches`, one per
        layer, [2, num_blocks, K, block_size, head_dim]. T is at least 4, padding included."""
        step = self._begin(layout, caches[0])
        x_TD = embedding(tokens_T, self.weights.embedding_VD)
        if self.embedding_scale is not None:
            x_TD = x_TD * self.embedding_scale
        for index, (layer, weights) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            x_TD = self._layer(x_TD, layer, weights, caches[index], step, _of_layer(lora, index))
        return self._norm(x_TD, self.weights.final_norm_D)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """float32 logits [M, V] of final hidden states."""
        num_rows = len(hidden_MD)
        padded = pad(hidden_MD, (0, 0, 0, MIN_ROWS - num_rows)) if num_rows < MIN_ROWS else hidden_MD
        logits_MV = self.kernels.linear(padded, self.weights.lm_head)[:num_rows].float()
        if self.spec.final_softcap is not None:
            logits_MV = self.kernels.softcap(logits_MV, self.spec.final_softcap)
        return logits_MV

    def _begin(self, layout: Layout, cache: Tensor) -> _Step:
        reads = {w: self.kernels.prepare_attention(layout, cache, w) for w in self.windows}
        angles = {
            rope: self.kernels.rope_angles(layout.positions_T, frequencies_F, rope.scale, self.dtype)
            for rope, frequencies_F in self.frequencies.items()
        }
        return _Step(layout, reads, angles)

    def _layer(
        self, x_TD: Tensor, layer: LayerSpec, weights: LayerWeights, cache: Tensor, step: _Step, lora: _LayerLora
    ) -> Tensor:
        attended_TD = self._attention(self._norm(x_TD, weights.input_norm), layer, weights, cache, step, lora)
        if weights.post_attention_norm is not None:
            attended_TD = self._norm(attended_TD, weights.post_attention_norm)
        x_TD = x_TD + attended_TD
        gate_up_T2I = self._linear("gate_up", self._norm(x_TD, weights.pre_mlp_norm), weights.gate_up, lora)
        down_TD = self._linear("down", self.gated(gate_up_T2I), weights.down, lora)
        if weights.post_mlp_norm is not None:
            down_TD = self._norm(down_TD, weights.post_mlp_norm)
        return x_TD + down_TD

    def _attention(
        self, x_TD: Tensor, layer: LayerSpec, weights: LayerWeights, cache: Tensor, step: _Step, lora: _LayerLora
    ) -> Tensor:
        spec = self.spec
        num_rotated = spec.num_heads + spec.num_kv_heads
        heads_THC = self._linear("qkv", x_TD, weights.qkv, lora).view(len(x_TD), -1, spec.head_dim)
        qk_THC, v_TKC = heads_THC.split((num_rotated, spec.num_kv_heads), 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q_THC, k_TKC = qk_THC.split((spec.num_heads, spec.num_kv_heads), 1)
            qk_THC = torch.cat((self._norm(q_THC, weights.q_norm), self._norm(k_TKC, weights.k_norm)), 1)
        if layer.rope is not None:
            qk_THC = self.kernels.rope(qk_THC, *step.angles[layer.rope])
        q_THC, k_TKC = qk_THC.split((spec.num_heads, spec.num_kv_heads), 1)
        attended_THC = self.kernels.attention(
            q_THC, k_TKC, v_TKC, cache, step.layout,
            scale=spec.query_scale, window=layer.window, softcap=spec.attn_softcap, reads=step.reads[layer.window],
        )  # fmt: skip
        return self._linear("o", attended_THC.flatten(1), weights.o, lora)

    def _linear(self, name: str, x_TI: Tensor, weight: LinearWeight, lora: _LayerLora) -> Tensor:
        y_TO = self.kernels.linear(x_TI, weight)
        if lora is not None:
            foreign_TR, factors = lora
            for module, (a_RI, b_RO) in factors.items():
                target = self.targets[module]
                if target.linear == name:
                    part = y_TO[:, target.offset : target.offset + target.out_features]
                    self.kernels.lora(part, x_TI, a_RI, b_RO, foreign_TR)
        return y_TO

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, weight, self.spec.norm_eps, self.spec.norm_plus_one)


_LayerLora = tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]] | None


def _of_layer(lora: LoraBatch | None, index: int) -> _LayerLora:
    return None if lora is None or not lora.layers[index] else (lora.foreign_TR, lora.layers[index])
