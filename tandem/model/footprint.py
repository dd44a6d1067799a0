"""How many bytes training holds for backward: what autograd keeps of one layer of a model's real shape, counted while
it keeps it. Random weights; nothing is trained here. Used by `tandem bench memory`.

Shape letters: N tokens, D hidden size, V vocabulary, R rank, I input and O output features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem import ops
from tandem.errors import ConfigError
from tandem.model.decoder import Decoder
from tandem.model.gradients import (
    Buffers,
    DenseLayer,
    LayerFactors,
    Microbatch,
    TrainSequence,
    layer_factors,
    raw_logits,
)
from tandem.model.spec import load_spec, targets
from tandem.model.weights import load_weights

# The last of so many layers is measured: the first one's input wants no gradient in plain autograd.
LAYERS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Held:
    """What one way of training holds for a sequence, in bytes. `layers`: of all layers, until their backward is done.
    `in_flight`: while a layer (or a window of it) is worked on. `head`: of the last norm, the head and the loss."""

    name: str
    layers: int
    in_flight: int
    head: int

    @property
    def total(self) -> int:
        """The most at any time: the head is done when the layers' backward begins, what they keep is not."""
        return self.layers + max(self.in_flight, self.head)


def measure(path: Path, dtype: str, length: int, window: int, chunk: int, rank: int) -> list[Held]:
    """Plain, pruned, recomputed and windowed training of one sequence of `length` tokens on the model in `path`.

    plain: transformers and PEFT under autograd. pruned: our layer's graph, which keeps what gradients of inputs and
    adapters need. recomputed: layers' inputs, and that graph for one layer at a time. windowed: the same for `window`
    tokens at a time, with the keys' and values' gradients that windows send back, and a loss over `chunk` tokens at a
    time. Raises ConfigError where PEFT is missing.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, num_layers = _small(path, DTYPES[dtype])
        model.save_pretrained(folder)
        spec = load_spec(Path(folder))
        kernels = ops.load("cpu", DTYPES[dtype])
        weights = load_weights(Path(folder), spec, dtype=DTYPES[dtype], device="cpu", kernels=kernels)
    ids_N = torch.randint(0, spec.vocab_size, (length,))
    plain_layer, plain_head = _plain(model, ids_N, rank)
    del model
    decoder = Decoder(spec, weights, kernels)
    inputs, whole = _ours(decoder, ids_N, rank, length)
    _, part = _ours(decoder, ids_N, rank, min(window, length))
    # What windows of a layer share: keys and values in the model's dtype, their gradients in float32.
    keys = 2 * length * spec.kv_size * (DTYPES[dtype].itemsize + 4) if window < length else 0
    hidden_bytes = length * spec.hidden_size * DTYPES[dtype].itemsize
    return [
        Held("plain", num_layers * plain_layer, 0, plain_head),
        Held("pruned", num_layers * (inputs + whole), 0, _head(decoder, length)),
        Held("recomputed", num_layers * inputs, whole, _head(decoder, length)),
        Held("windowed", num_layers * inputs, part + keys, hidden_bytes + _head(decoder, min(chunk, length))),
    ]


def _small(path: Path, dtype: torch.dtype) -> tuple[Any, int]:
    """A model of LAYERS layers with this one's shape and random weights; how many layers it really has."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    num_layers = config.num_hidden_layers
    # The last ones: where kinds of layers alternate, those attend the farthest.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-LAYERS:]
    config.num_hidden_layers = LAYERS
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"), num_layers


class _Ledger:
    """The storages that autograd keeps, each counted once; those in `known` are held anyway."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in known if t.layout == torch.strided}
        self._bytes: dict[int, int] = {}

    def take(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._bytes.values())

    @contextmanager
    def open(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.take, lambda tensor: tensor):
            yield


def _plain(model: Any, ids_N: Tensor, rank: int) -> tuple[int, int]:
    """Bytes that a PEFT model's last layer keeps, and what comes after it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("the plain way is measured with PEFT: pip install peft") from None
    names = [t for t in _PEFT_TARGETS if any(name.endswith(t) for name, _ in model.named_modules())]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    # As in a deeper model, where the layer's input comes out of a layer that has adapters too.
    adapted.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    adapted.train()
    layer = next(m for name, m in adapted.named_modules() if name.endswith(f"layers.{LAYERS - 1}"))
    fixed = [*adapted.parameters(), *adapted.buffers()]
    before, inside, after = _Ledger(fixed), _Ledger(fixed), _Ledger(fixed)
    current = [before]

    def enter(module: Any, args: Any) -> None:
        current[0] = inside

    def leave(module: Any, args: Any, output: Any) -> None:
        current[0] = after

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: current[0].take(t), lambda t: t):
        loss = adapted(input_ids=ids_N[None], labels=ids_N[None]).loss
    assert loss.requires_grad
    return inside.total, after.total


_PEFT_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)


def _ours(decoder: Decoder, ids_N: Tensor, rank: int, window: int) -> tuple[int, int]:
    """Of our last layer, in windows: bytes of its input, and the most that autograd keeps beside that during a backward
    slice."""
    length, top = len(ids_N), LAYERS - 1
    sequence = TrainSequence(0, length, _factors(decoder, rank))
    buffers = Buffers(length, decoder.dtype, ids_N.device)
    micro = Microbatch(decoder, DenseLayer(decoder), [sequence], ids_N, 0, True, buffers)
    starts = range(0, length, window)
    for layer in range(LAYERS):
        for start in starts:
            micro.forward(layer, start, min(start + window, length))
    inputs = [micro.input(layer) for layer in range(LAYERS + 1)]
    micro.grad_ND = torch.zeros_like(inputs[-1])
    most = 0
    for start in reversed(starts):
        ledger = _Ledger([*inputs, *_plain_weights(decoder)])
        with ledger.open():
            micro.backward(top, start, min(start + window, length))
        most = max(most, ledger.total)
    return inputs[top].nbytes, most


def _factors(decoder: Decoder, rank: int) -> LayerFactors:
    found = targets(decoder.spec)

    def zeros(dtype: torch.dtype) -> list[dict[str, tuple[Tensor, Tensor]]]:
        return [
            {
                name: (
                    torch.zeros(rank, target.in_features, dtype=dtype),
                    torch.zeros(rank, target.out_features, dtype=dtype),
                )
                for name, target in found.items()
            }
            for _ in range(LAYERS)
        ]

    return layer_factors(zeros(decoder.dtype), zeros(torch.float32), found, 2.0)


def _plain_weights(decoder: Decoder) -> Iterator[Tensor]:
    """Tensors that are there whether one trains or not."""
    yield decoder.weights.embedding.weight
    yield decoder.weights.final_norm_D
    for layer in decoder.weights.layers:
        for norm in (layer.input_norm, layer.pre_mlp_norm, layer.post_attention_norm, layer.post_mlp_norm,
                     layer.q_norm, layer.k_norm):  # fmt: skip
            if norm is not None:
                yield norm


def _head(decoder: Decoder, rows: int) -> int:
    """Bytes that autograd keeps of our last norm and head over `rows` tokens, and their logits, which become their own
    gradient."""
    x_MD = torch.zeros(rows, decoder.spec.hidden_size, dtype=decoder.dtype, requires_grad=True)
    ledger = _Ledger([x_MD, *_plain_weights(decoder)])
    with ledger.open():
        logits_MV = raw_logits(decoder, DenseLayer(decoder), x_MD)
    assert logits_MV.requires_grad
    return ledger.total + logits_MV.nbytes
