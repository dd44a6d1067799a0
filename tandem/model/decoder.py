"""What the numbers mean: one forward for all rows of a batch, for every family that `spec.py` can describe.

Here: the order of operations. Not here: how an operation is done (`ops/`), where weights come from (`weights.py`),
who is in the batch (`engine/`).

Shape letters: T rows of the flat batch, D hidden size, M rows whose logits are wanted, V vocabulary, R rank rows,
O output features, I input features, C features of a head, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tandem.model.rope import RopeSpec, rope_frequencies
from tandem.model.spec import ModelSpec, Target, targets
from tandem.model.weights import Weights
from tandem.ops import Kernels
from tandem.ops.attention import Layout
from tandem.ops.kv_cache import QuantizedCache
from tandem.ops.lora import Part, Stack

# Per layer, by the decoder's linear: what adapters add to it.
LayerStacks = Sequence[Mapping[str, Stack]]


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The adapters of one batch. foreign_TR (bool) is true where rank row r is not of row t's adapter."""

    foreign_TR: Tensor
    layers: LayerStacks


def stack_layers(layers: Sequence[Mapping[str, tuple[Tensor, Tensor]]], targets: Mapping[str, Target]) -> LayerStacks:
    """By linear what is given by target: (a_RI, b_RO), the scaling already in b, all of the same rank."""
    return [
        {
            linear: Stack([Part(targets[name].offset, *layer[name]) for name in names])
            for linear in dict.fromkeys(targets[name].linear for name in layer)
            if (names := [name for name in layer if targets[name].linear == linear])
        }
        for layer in layers
    ]


# cos and sin of every row's position, for each kind of rotary embedding that the model has.
Angles = Mapping[RopeSpec, tuple[Tensor, Tensor]]
# project(name of a linear, its input) -> its output, what the adapters add included.
Project = Callable[[str, Tensor], Tensor]
# attend(q_THC, k_TKC, v_TKC) -> [T, H, C].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# record(layer, name, tensor): the input of a layer ("input"; of layer L: what the final norm gets), a linear's output.
Record = Callable[[int, str, Tensor], None]


class Decoder:
    """A model's weights with the way through them. Holds no state of any sequence."""

    def __init__(self, spec: ModelSpec, weights: Weights, kernels: Kernels) -> None:
        self.spec = spec
        self.weights = weights
        self.kernels = kernels
        self.targets = targets(spec)
        self.dtype = weights.final_norm_D.dtype
        self.gated = {"silu": kernels.silu_mul, "gelu_tanh": kernels.gelu_tanh_mul}[spec.activation]
        device = weights.final_norm_D.device
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        self.frequencies = {rope: rope_frequencies(rope).to(device) for rope in ropes}
        self.windows = {layer.window for layer in spec.layers}
        # The scale in the model's own precision, as the checkpoints were trained.
        scale = spec.embedding_scale
        self.embedding_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype, device=device)

    def forward(
        self,
        tokens_T: Tensor,
        layout: Layout,
        caches: Sequence[Tensor | QuantizedCache],
        lora: LoraBatch | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [T, D]. Keys and values of all rows are written to `caches`, one per
        layer, [2, num_blocks, K, block_size, head_dim] or quantised. T is at least `kernels.min_rows`, padding
        included."""
        groups = self.spec.num_heads // self.spec.num_kv_heads
        reads = {w: self.kernels.prepare_attention(layout, caches[0], w, groups) for w in self.windows}
        angles = self.angles(layout.positions_T)
        x_TD = self.embed(tokens_T)
        for index, cache in enumerate(caches):
            if record is not None:
                record(index, "input", x_TD)
            project = partial(self._project, index, lora, record)
            x_TD = self.layer(index, x_TD, angles, project, partial(self._attend, index, cache, layout, reads))
        if record is not None:
            record(len(caches), "input", x_TD)
        return self.norm(x_TD, self.weights.final_norm_D)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Input of the first layer, [T, D]."""
        x_TD = self.kernels.embed(tokens_T, self.weights.embedding)
        return x_TD if self.embedding_scale is None else x_TD * self.embedding_scale

    def angles(self, positions_T: Tensor) -> Angles:
        """What `layer` wants to know of positions."""
        return {
            rope: self.kernels.rope_angles(positions_T, frequencies_F, rope.scale, self.dtype)
            for rope, frequencies_F in self.frequencies.items()
        }

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """float32 logits [M, V] of final hidden states."""
        return self.finished(self.raw_logits(hidden_MD))

    def raw_logits(self, hidden_MD: Tensor) -> Tensor:
        """What the head makes of final hidden states, [M, V] in the model's dtype: ordered as the logits are."""
        num_rows, least = len(hidden_MD), self.kernels.min_rows
        padded = pad(hidden_MD, (0, 0, 0, least - num_rows)) if num_rows < least else hidden_MD
        return self.kernels.linear(padded, self.weights.lm_head)[:num_rows]

    def finished(self, raw_MV: Tensor) -> Tensor:
        """float32 logits of raw ones."""
        logits_MV = raw_MV.float()
        if self.spec.final_softcap is not None:
            logits_MV = self.kernels.softcap(logits_MV, self.spec.final_softcap)
        return logits_MV

    def layer(self, index: int, x_TD: Tensor, angles: Angles, project: Project, attend: Attend) -> Tensor:
        """One layer, [T, D] to [T, D]: the order of operations, for serving and for training alike."""
        weights = self.weights.layers[index]
        qkv_TO = project("qkv", self.norm(x_TD, weights.input_norm))
        attended_TD = project("o", attend(*self.heads(index, qkv_TO, angles)).flatten(1))
        if weights.post_attention_norm is not None:
            attended_TD = self.norm(attended_TD, weights.post_attention_norm)
        x_TD, normed_TD = self.kernels.add_rms_norm(
            attended_TD, x_TD, weights.pre_mlp_norm, self.spec.norm_eps, self.spec.norm_plus_one
        )
        gate_up_T2I = project("gate_up", normed_TD)
        down_TD = project("down", self.gated(gate_up_T2I))
        if weights.post_mlp_norm is not None:
            down_TD = self.norm(down_TD, weights.post_mlp_norm)
        return x_TD + down_TD

    def heads(self, index: int, qkv_TO: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention wants them, normed and rotated: [T, H, C], [T, K, C], [T, K, C]."""
        spec, weights, rope = self.spec, self.weights.layers[index], self.spec.layers[index].rope
        heads_THC = qkv_TO.view(len(qkv_TO), -1, spec.head_dim)
        qk_THC, v_TKC = heads_THC.split((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), 1)
        if rope is not None or weights.q_norm is not None:
            qk_THC = self.kernels.norm_rope(
                qk_THC, spec.num_heads, weights.q_norm, weights.k_norm, None if rope is None else angles[rope],
                spec.norm_eps, spec.norm_plus_one,
            )  # fmt: skip
        q_THC, k_TKC = qk_THC.split((spec.num_heads, spec.num_kv_heads), 1)
        return q_THC, k_TKC, v_TKC

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, weight, self.spec.norm_eps, self.spec.norm_plus_one)

    def _attend(
        self,
        index: int,
        cache: Tensor | QuantizedCache,
        layout: Layout,
        reads: Mapping[int | None, Any],
        q_THC: Tensor,
        k_TKC: Tensor,
        v_TKC: Tensor,
    ) -> Tensor:
        window = self.spec.layers[index].window
        return self.kernels.attention(
            q_THC, k_TKC, v_TKC, cache, layout,
            scale=self.spec.query_scale, window=window, softcap=self.spec.attn_softcap, reads=reads[window],
        )  # fmt: skip

    def _project(self, index: int, lora: LoraBatch | None, record: Record | None, name: str, x_TI: Tensor) -> Tensor:
        weight = getattr(self.weights.layers[index], name)
        stack = None if lora is None else lora.layers[index].get(name)
        if lora is None or stack is None:
            y_TO = self.kernels.linear(x_TI, weight)
        else:
            y_TO, _ = self.kernels.adapted(x_TI, weight, stack, lora.foreign_TR)
        if record is not None:
            record(index, name, y_TO)
        return y_TO
