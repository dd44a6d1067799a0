"""Training in slices: one layer over one window of a microbatch, forward or backward, autograd inside a slice only.

A microbatch keeps the inputs of its layers; a backward slice computes its layer again from them, with gradients on,
and hands on three gradients: of the window's input, of earlier keys and values, of the adapters' factors. Frozen
weights get none. Which slice is next is the scheduler's business, whose adapter it is the caller's.

Shape letters: N tokens of the microbatch, T tokens of a window, D hidden size, I input and O output features of a
linear, R rank, H query heads, K key/value heads, C features of a head, B sequences, L positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tandem.model.decoder import Angles, Decoder, stack_layers
from tandem.model.spec import Target
from tandem.ops import Kernels
from tandem.ops.attention import Span
from tandem.ops.linear import LinearWeight
from tandem.ops.lora import Part, Stack

# What a layer's recomputation can take from the forward pass, beside its input.
KEPT = ("qkv", "o", "gate_up")


@dataclass(frozen=True, slots=True)
class Factors:
    """What one adapter adds to one linear: for each target in `names` a part of `stack`, and the float32 gradients of
    a and b without the scaling, as PEFT has them."""

    names: tuple[str, ...]
    stack: Stack
    gradients: tuple[tuple[Tensor, Tensor], ...]
    scaling: float


# By layer, by the decoder's linear.
LayerFactors = Sequence[Mapping[str, Factors]]


def layer_factors(
    layers: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    gradients: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    targets: Mapping[str, Target],
    scaling: float,
) -> LayerFactors:
    """By linear what is given by target: (a_RI, b_RO), the scaling in b, and their gradients."""
    found = []
    for layer, gradient, stacks in zip(layers, gradients, stack_layers(layers, targets), strict=True):
        by_linear = {}
        for linear, stack in stacks.items():
            names = tuple(name for name in layer if targets[name].linear == linear)
            by_linear[linear] = Factors(names, stack, tuple(gradient[name] for name in names), scaling)
        found.append(by_linear)
    return found


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """Rows start:stop of a microbatch: one example, its adapter, and how its dropout masks are drawn. Where it begins
    as earlier ones do, its first tokens are rows of theirs, those of `past`."""

    start: int
    stop: int
    factors: LayerFactors
    dropout: float = 0.0
    dropout_key: int = 0
    past: tuple[tuple[int, int], ...] = ()

    @property
    def num_past(self) -> int:
        return sum(stop - start for start, stop in self.past)

    @property
    def first(self) -> int:
        """Its first token's row."""
        return self.past[0][0] if self.past else self.start

    def rows(self, stop: int) -> list[int]:
        """Where its tokens are, those before row `stop`."""
        return [row for low, high in (*self.past, (self.start, min(self.stop, stop))) for row in range(low, high)]


class DenseLayer:
    """The weights of one layer as plain matrices, for the gradients of inputs: packed ones are unpacked on first use
    and stay until another layer is asked for. The only second copy of weights there is, one layer large."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._index = -1
        self._dense: dict[str, Tensor] = {}

    def holds(self, index: int) -> bool:
        """Whether nothing of this layer has to be unpacked first: it is at hand, or its kernels need no dense form."""
        return self._index == index or self._decoder.weights.layers[index].down.format != "onednn"

    def weight(self, index: int, name: str) -> Tensor:
        """[O, I] of a layer's linear; the head counts as a layer after the last."""
        if index != self._index:
            self.drop()
            self._index = index
        if name not in self._dense:
            weights = self._decoder.weights
            self._dense[name] = self._decoder.kernels.unpack(
                weights.lm_head if index == len(weights.layers) else getattr(weights.layers[index], name)
            )
        return self._dense[name]

    def drop(self) -> None:
        self._dense.clear()
        self._index = -1


class Buffers:
    """Activation buffers, used again and again: touching memory for the first time costs more than filling it.

    Each has room for `num_rows` tokens; a microbatch of a longer example gets its own.
    """

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_rows = num_rows
        self._dtype = dtype
        self._device = device
        self._free: dict[int, list[Tensor]] = {}

    def take(self, num_rows: int, width: int) -> Tensor:
        """[num_rows, width], with anything in it."""
        free = self._free.get(width)
        if num_rows <= self.num_rows and free:
            return free.pop()[:num_rows]
        # What inference mode allocates can never be part of a graph.
        with torch.inference_mode(False):
            capacity = max(num_rows, self.num_rows)
            return torch.empty(capacity, width, dtype=self._dtype, device=self._device)[:num_rows]

    def give_back(self, buffer: Tensor) -> None:
        """The reverse of `take`; nobody reads it any more."""
        whole = buffer._base if buffer._base is not None else buffer
        if len(whole) == self.num_rows:
            self._free.setdefault(whole.shape[1], []).append(whole)

    def drop(self) -> None:
        """Free what is not in use."""
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held and not in use."""
        return sum(buffer.nbytes for free in self._free.values() for buffer in free)


@dataclass(slots=True)
class _Keys:
    """Keys and values of one layer, as attention reads them, and the gradients that later windows sent back."""

    layer: int
    k_NKC: Tensor
    v_NKC: Tensor
    grad_k_NKC: Tensor | None = None
    grad_v_NKC: Tensor | None = None
    known: set[tuple[int, int]] = field(default_factory=set)  # (start, stop) of rows filled in


class Microbatch:
    """Some training sequences on their way through the layers, N tokens in all, one after the other.

    `inputs[l]` is the input of layer l, [N, D]; the one after the last is what the final norm gets. The uppermost
    `kept_layers` layers also keep what `KEPT` names, so that their backward slices skip those matmuls.
    """

    def __init__(
        self,
        decoder: Decoder,
        dense: DenseLayer,
        sequences: Sequence[TrainSequence],
        tokens_N: Tensor,
        kept_layers: int,
        learns: bool,
        buffers: Buffers,
    ) -> None:
        self.decoder = decoder
        self._buffers = buffers
        self.sequences = list(sequences)
        self.learns = learns
        self.num_tokens = len(tokens_N)
        self.num_layers = len(decoder.spec.layers)
        self.positions_N = torch.cat(
            [torch.arange(s.num_past, s.num_past + s.stop - s.start) for s in self.sequences]
        ).to(tokens_N.device)
        self.grad_ND: Tensor | None = None
        self._dense = dense
        self._first_kept = self.num_layers - kept_layers if learns else self.num_layers
        self._angles = decoder.angles(self.positions_N)
        self._inputs: dict[int, Tensor] = {}
        self.input(0).copy_(decoder.embed(tokens_N))
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._keys: _Keys | None = None

    # ------------------------------------------------------------ what is kept

    def input(self, layer: int) -> Tensor:
        """[N, D], made on first use."""
        if layer not in self._inputs:
            self._inputs[layer] = self._buffers.take(self.num_tokens, self.decoder.spec.hidden_size)
        return self._inputs[layer]

    def take(self, layer: int, name: str, start: int, rows: Tensor) -> None:
        """Keep what a forward pass computed for tokens from `start` on, if it is wanted."""
        if name == "input":
            if layer:
                self.input(layer)[start : start + len(rows)] = rows
        elif layer >= self._first_kept and name in KEPT:
            self._output(layer, name, rows.shape[1])[start : start + len(rows)] = rows

    def _output(self, layer: int, name: str, width: int) -> Tensor:
        """[N, width], made on first use."""
        if (layer, name) not in self._kept:
            self._kept[layer, name] = self._buffers.take(self.num_tokens, width)
        return self._kept[layer, name]

    def fill(self, num_tokens: int, read: Callable[[int, str, Tensor], None]) -> None:
        """The first tokens have been through all layers in other forward passes: `read(layer, name, rows)` writes what
        these computed into rows."""
        last = self.num_layers
        for layer in range(1, last + 1) if self.learns else [last]:
            read(layer, "input", self.input(layer)[:num_tokens])
        for layer in range(self._first_kept, last):
            for name in KEPT:
                width = getattr(self.decoder.weights.layers[layer], name).out_features
                read(layer, name, self._output(layer, name, width)[:num_tokens])

    # ------------------------------------------------------------ slices

    @torch.no_grad()
    def forward(self, layer: int, start: int, stop: int) -> None:
        """Layer `layer` over tokens start:stop; the earlier ones have been through it."""
        x_TD = self.input(layer)[start:stop]
        y_TD = self.decoder.layer(
            layer, x_TD, self._angles_of(start, stop), partial(self._project, layer, start, stop),
            partial(self._attend, layer, start, stop, []),
        )  # fmt: skip
        self.take(layer + 1, "input", start, y_TD)
        if not self.learns and stop == self.num_tokens:
            self._give_back(self._inputs.pop(layer))

    def backward(self, layer: int, start: int, stop: int) -> None:
        """Turn the gradient of the layer's output into that of its input, in `grad_ND[start:stop]`, and add to the
        adapters' gradients. Tokens from `stop` on have been through this already."""
        assert self.grad_ND is not None
        traces: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            x_TD = self.input(layer)[start:stop].detach().requires_grad_()
            y_TD = self.decoder.layer(
                layer, x_TD, self._angles_of(start, stop), partial(self._project_again, layer, start, stop),
                partial(self._attend, layer, start, stop, traces),
            )  # fmt: skip
        outputs, gradients, leaves = [y_TD], [self.grad_ND[start:stop]], [x_TD]
        keys = self._keys
        (own_k, own_v), *earlier = traces
        if keys is not None and keys.grad_k_NKC is not None and keys.grad_v_NKC is not None and self._cuts(stop):
            outputs += [own_k, own_v]
            gradients += [keys.grad_k_NKC[start:stop].to(own_k.dtype), keys.grad_v_NKC[start:stop].to(own_v.dtype)]
        for pair in earlier:
            leaves += pair
        found = torch.autograd.grad(outputs, leaves, gradients)
        self.grad_ND[start:stop] = found[0]
        if earlier:
            self._send_back(start, found[1], found[2])
        if start == 0:
            self._forget(layer)

    def _project(self, layer: int, start: int, stop: int, name: str, x_TI: Tensor) -> Tensor:
        weight = getattr(self.decoder.weights.layers[layer], name)
        y_TO, _ = _multiply(self.decoder.kernels, x_TI, weight, self._adapters(layer, start, stop, name, x_TI))
        self.take(layer, name, start, y_TO)
        return y_TO

    def _project_again(self, layer: int, start: int, stop: int, name: str, x_TI: Tensor) -> Tensor:
        """`_project` in a graph; the matmul is skipped where its output was kept, or where nobody reads it."""
        weights = self.decoder.weights.layers[layer]
        weight: LinearWeight = getattr(weights, name)
        saved_TO = None
        if (layer, name) in self._kept:
            saved_TO = self._kept[layer, name][start:stop]
        elif name == "down" and weights.post_mlp_norm is None:
            saved_TO = x_TI.new_empty(len(x_TI), weight.out_features)  # only its gradient is of use
        adapters = self._adapters(layer, start, stop, name, x_TI)
        return _AdaptedLinear.apply(
            x_TI, saved_TO, adapters, weight, self.decoder.kernels, partial(self._dense.weight, layer, name)
        )

    def _adapters(self, layer: int, start: int, stop: int, name: str, x_TI: Tensor) -> _Adapters | None:
        """The adapters of a window's rows; neighbours with the same one go together."""
        owners: list[_Owner] = []
        masked: list[tuple[TrainSequence, int, int]] = []
        first_rows: dict[int, int] = {}  # factors -> their first rank row
        rank = 0
        for s in self._overlapping(start, stop):
            factors = s.factors[layer].get(name)
            if factors is None:
                continue
            low, high = max(s.start, start) - start, min(s.stop, stop) - start
            if id(factors) not in first_rows:
                first_rows[id(factors)] = rank
                rank += factors.stack.rank
            if owners and owners[-1].factors is factors and owners[-1].high == low:
                owners[-1] = replace(owners[-1], high=high)
            else:
                owners.append(_Owner(low, high, first_rows[id(factors)], factors))
            if s.dropout:
                masked.append((s, low, high))
        if not owners:
            return None
        names = tuple(dict.fromkeys(target for o in owners for target in o.factors.names))
        masks = self._masks(layer, start, names, masked, x_TI) if masked else None
        if len(owners) == 1 and owners[0].high - owners[0].low == len(x_TI):
            return _Adapters(names, owners[0].factors.stack, None, masks, owners)
        foreign_TR = torch.ones(len(x_TI), rank, dtype=torch.bool, device=x_TI.device)
        for o in owners:
            foreign_TR[o.low : o.high, o.first : o.first + o.factors.stack.rank] = False
        distinct = {id(o.factors): o.factors for o in owners}
        return _Adapters(names, _together(list(distinct.values()), names), foreign_TR, masks, owners)

    def _masks(
        self, layer: int, start: int, names: Sequence[str], masked: list[tuple[TrainSequence, int, int]], x_TI: Tensor
    ) -> list[Tensor]:
        masks = []
        for target in names:
            mask_TI = torch.ones_like(x_TI)
            for s, low, high in masked:
                at = max(s.start, start) - s.start
                key = (s.dropout_key, layer, target)
                mask_TI[low:high] = dropout_mask(s.dropout, key, at, high - low, x_TI)
            masks.append(mask_TI)
        return masks

    # ------------------------------------------------------------ attention

    def _attend(
        self,
        layer: int,
        start: int,
        stop: int,
        traces: list[tuple[Tensor, Tensor]],
        q_THC: Tensor,
        k_TKC: Tensor,
        v_TKC: Tensor,
    ) -> Tensor:
        """Attention of a window's sequences; `traces` gets the window's keys and values, then the earlier ones."""
        traces.append((k_TKC, v_TKC))
        attend = partial(
            self.decoder.kernels.causal_attention,
            scale=self.decoder.spec.query_scale,
            window=self.decoder.spec.layers[layer].window,
            softcap=self.decoder.spec.attn_softcap,
        )
        sequences = self._overlapping(start, stop)
        ranges = [(max(s.start, start) - start, min(s.stop, stop) - start) for s in sequences]
        if any(s.past for s in sequences):
            return self._attend_shared(layer, start, stop, traces, sequences, partial(attend, q_THC), k_TKC, v_TKC)
        first = sequences[0]
        if first.start == start:
            if not torch.is_grad_enabled() and self._cuts(stop):
                self._remember(layer, start, k_TKC, v_TKC)
            return attend(q_THC, k_TKC, v_TKC, [Span(low, high, low, high) for low, high in ranges])
        k, v = self._with_earlier(layer, first.start, start, traces, k_TKC, v_TKC)
        past = start - first.start
        spans = [Span(low, high, low + past if low else 0, high + past) for low, high in ranges]
        return attend(q_THC, k, v, spans)

    def _attend_shared(
        self,
        layer: int,
        start: int,
        stop: int,
        traces: list[tuple[Tensor, Tensor]],
        sequences: Sequence[TrainSequence],
        attend: Callable[[Tensor, Tensor, list[Span]], Tensor],
        k_TKC: Tensor,
        v_TKC: Tensor,
    ) -> Tensor:
        """Each sequence with its keys gathered: its own rows, and before them those that are others' as well."""
        first = min(start, *(s.first for s in sequences))
        if first < start:
            k, v = self._with_earlier(layer, first, start, traces, k_TKC, v_TKC)
        else:
            k, v = k_TKC, v_TKC
            if not torch.is_grad_enabled() and self._cuts(stop):
                self._remember(layer, start, k_TKC, v_TKC)
        places: list[int] = []
        spans = []
        for s in sequences:
            first_key = len(places)
            places += s.rows(stop)
            spans.append(Span(max(s.start, start) - start, min(s.stop, stop) - start, first_key, len(places)))
        places_L = torch.tensor(places, device=k.device) - first
        return attend(k.index_select(0, places_L), v.index_select(0, places_L), spans)

    def _with_earlier(
        self,
        layer: int,
        first: int,
        start: int,
        traces: list[tuple[Tensor, Tensor]],
        k_TKC: Tensor,
        v_TKC: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A window's keys and values after those of rows first:start."""
        earlier_k, earlier_v = self._earlier(layer, first, start)
        if torch.is_grad_enabled():
            earlier_k, earlier_v = earlier_k.detach().requires_grad_(), earlier_v.detach().requires_grad_()
            traces.append((earlier_k, earlier_v))
        else:
            self._remember(layer, start, k_TKC, v_TKC)
        return torch.cat((earlier_k, k_TKC)), torch.cat((earlier_v, v_TKC))

    def _earlier(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows start:stop, computed again unless they are at hand."""
        keys = self._keys_of(layer)
        at = start
        while at < stop:
            known = next((high for low, high in keys.known if low <= at < high), None)
            if known is None:
                later = [low for low, _ in keys.known if low > at]
                end = min([stop, *later])
                with torch.no_grad():
                    self._remember(layer, at, *self._keys_again(layer, at, end))
                known = end
            at = known
        return keys.k_NKC[start:stop], keys.v_NKC[start:stop]

    def _keys_again(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if (layer, "qkv") in self._kept:
            qkv_TO = self._kept[layer, "qkv"][start:stop]
        else:
            normed_TD = self.decoder.norm(
                self.input(layer)[start:stop], self.decoder.weights.layers[layer].input_norm
            )
            qkv_TO = self._project(layer, start, stop, "qkv", normed_TD)
        _, k_TKC, v_TKC = self.decoder.heads(layer, qkv_TO, self._angles_of(start, stop))
        return k_TKC, v_TKC

    def _keys_of(self, layer: int) -> _Keys:
        if self._keys is None or self._keys.layer != layer:
            spec = self.decoder.spec
            shape = (self.num_tokens, spec.num_kv_heads, spec.head_dim)
            k_NKC, v_NKC = (torch.empty(shape, dtype=self.decoder.dtype, device=self.positions_N.device) for _ in "kv")
            self._keys = _Keys(layer, k_NKC, v_NKC)
        return self._keys

    def _remember(self, layer: int, start: int, k_TKC: Tensor, v_TKC: Tensor) -> None:
        keys, stop = self._keys_of(layer), start + len(k_TKC)
        keys.k_NKC[start:stop], keys.v_NKC[start:stop] = k_TKC, v_TKC
        keys.known.add((start, stop))

    def _send_back(self, start: int, grad_k: Tensor, grad_v: Tensor) -> None:
        keys = self._keys
        assert keys is not None
        if keys.grad_k_NKC is None or keys.grad_v_NKC is None:
            keys.grad_k_NKC, keys.grad_v_NKC = (torch.zeros(t.shape, device=t.device) for t in (keys.k_NKC, keys.v_NKC))
        keys.grad_k_NKC[start - len(grad_k) : start] += grad_k
        keys.grad_v_NKC[start - len(grad_v) : start] += grad_v

    def _forget(self, layer: int) -> None:
        """A layer's backward is done: nothing reads what it kept any more."""
        self._give_back(self._inputs.pop(layer + 1, None))
        for name in KEPT:
            self._give_back(self._kept.pop((layer, name), None))
        self._keys = None

    def release(self) -> None:
        """Give back every buffer: the microbatch is done, or given up."""
        for buffer in (*self._inputs.values(), *self._kept.values()):
            self._give_back(buffer)
        self._inputs.clear()
        self._kept.clear()

    def _give_back(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._buffers.give_back(buffer)

    # ------------------------------------------------------------ geometry

    def _angles_of(self, start: int, stop: int) -> Angles:
        return {rope: (cos[start:stop], sin[start:stop]) for rope, (cos, sin) in self._angles.items()}

    def _overlapping(self, start: int, stop: int) -> list[TrainSequence]:
        return [s for s in self.sequences if s.start < stop and s.stop > start]

    def _cuts(self, stop: int) -> bool:
        """Whether a sequence goes on after `stop`."""
        return any(s.first < stop < s.stop for s in self.sequences)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Rows low:high of a window and rank rows from `first` on belong to these factors."""

    low: int
    high: int
    first: int
    factors: Factors


@dataclass(frozen=True, slots=True)
class _Adapters:
    """All adapters of one linear over one window, their targets `names` as parts of one stack."""

    names: tuple[str, ...]
    stack: Stack
    foreign_TR: Tensor | None
    masks: list[Tensor] | None
    owners: list[_Owner]

    def learn(self, kernels: Kernels, x_TI: Tensor, grad_TO: Tensor, h_PTR: Tensor, grad_PTR: Tensor) -> None:
        """Add to the gradients of the factors, given those of y and of h."""
        for place, (name, part) in enumerate(zip(self.names, self.stack.parts, strict=True)):
            columns = slice(part.offset, part.offset + part.b_RW.shape[1])
            inputs_TI = x_TI if self.masks is None else x_TI * self.masks[place]
            for o in self.owners:
                if name not in o.factors.names:
                    continue
                grad_a_RI, grad_b_RW = o.factors.gradients[o.factors.names.index(name)]
                rows, ranks = slice(o.low, o.high), slice(o.first, o.first + o.factors.stack.rank)
                scaling = o.factors.scaling
                kernels.factor_gradient(h_PTR[place, rows, ranks], grad_TO[rows, columns], scaling, grad_b_RW)
                kernels.factor_gradient(grad_PTR[place, rows, ranks], inputs_TI[rows], 1.0, grad_a_RI)


def _together(several: Sequence[Factors], names: Sequence[str]) -> Stack:
    """One stack of several adapters' factors, one after the other; zero where one has no such target."""
    parts = []
    for name in names:
        found = [
            f.stack.parts[f.names.index(name)] if name in f.names else None for f in several
        ]  # fmt: skip
        like = next(part for part in found if part is not None)
        ranks = [f.stack.rank for f in several]
        a = [like.a_RI.new_zeros(r, like.a_RI.shape[1]) if p is None else p.a_RI for p, r in zip(found, ranks)]
        b = [like.b_RW.new_zeros(r, like.b_RW.shape[1]) if p is None else p.b_RW for p, r in zip(found, ranks)]
        parts.append(Part(like.offset, torch.cat(a), torch.cat(b)))
    return Stack(parts)


def _multiply(
    kernels: Kernels, x_TI: Tensor, weight: LinearWeight, adapters: _Adapters | None
) -> tuple[Tensor, Tensor | None]:
    if adapters is None:
        return kernels.linear(x_TI, weight), None
    return kernels.adapted(x_TI, weight, adapters.stack, adapters.foreign_TR, adapters.masks)


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear with adapters: gradients of the input by autograd, of the factors straight into their buffers."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        saved_TO: Tensor | None,
        adapters: _Adapters | None,
        weight: LinearWeight,
        kernels: Kernels,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x_TI)
        ctx.adapters, ctx.weight, ctx.kernels, ctx.dense, ctx.h_PTR = adapters, weight, kernels, dense, None
        if saved_TO is not None:
            return saved_TO.view_as(saved_TO)
        y_TO, ctx.h_PTR = _multiply(kernels, x_TI, weight, adapters)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = gradients
        (x_TI,) = ctx.saved_tensors
        a: _Adapters | None = ctx.adapters
        kernels: Kernels = ctx.kernels
        if a is None:
            grad_TI, _ = kernels.adapted_gradient(grad_TO, ctx.weight, None, None, ctx.dense)
            return grad_TI, None, None, None, None, None
        grad_TI, grad_PTR = kernels.adapted_gradient(grad_TO, ctx.weight, a.stack, a.foreign_TR, ctx.dense, a.masks)
        assert grad_PTR is not None
        h_PTR = kernels.hidden(x_TI, a.stack, a.foreign_TR, a.masks) if ctx.h_PTR is None else ctx.h_PTR
        a.learn(kernels, x_TI, grad_TO, h_PTR, grad_PTR)
        return grad_TI, None, None, None, None, None


def raw_logits(decoder: Decoder, dense: DenseLayer, x_MD: Tensor) -> Tensor:
    """What the head makes of the last layer's output: [M, V] in the model's dtype, before a soft cap; differentiable,
    and its backward does not look at the logits, which may be overwritten."""
    return _AdaptedLinear.apply(
        decoder.norm(x_MD, decoder.weights.final_norm_D), None, None, decoder.weights.lm_head, decoder.kernels,
        partial(dense.weight, len(decoder.weights.layers), "lm_head"),
    )  # fmt: skip


def dropout_mask(rate: float, key: tuple[int, int, str], position: int, length: int, like_TI: Tensor) -> Tensor:
    """[length, I] of 0 and 1 / (1 - rate): a hash of the key (sequence, layer, target), position and feature, so that
    every window and every recomputation of a token sees the same mask."""
    seed, layer, target = key
    mixed = hash_64(seed, layer, *target.encode())
    rows_T1 = torch.arange(position, position + length, device=like_TI.device)[:, None] * 0x9E3779B1
    columns_I = torch.arange(like_TI.shape[1], device=like_TI.device) * 0x85EBCA77
    x = (rows_T1 ^ columns_I) + (mixed & 0xFFFFFFFF)
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    x = (x >> 16) ^ x
    return (x >= int(rate * 2**32)).to(like_TI.dtype) / (1.0 - rate)


def hash_64(*values: int) -> int:
    """Mix integers into 62 bits (FNV-1a, then a multiplicative finish)."""
    mixed = 0xCBF29CE484222325
    for value in values:
        mixed = ((mixed ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed & 0x3FFFFFFFFFFFFFFF
