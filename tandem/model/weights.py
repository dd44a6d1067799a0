"""safetensors or GGUF on disk -> the decoder's parameters: fused, converted and packed one tensor at a time, so that
loading needs hardly more memory than the model.

Here: finding the files in a model's directory, checking names and shapes, building `Weights`. Not here: where that
directory is (`tandem/hub.py`), what the numbers do (`decoder.py`), LoRA files (`adapter.py`).

Shape letters: V vocabulary, D hidden size, O output features, I input features, H head_dim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.errors import ModelError
from tandem.hub import is_gguf
from tandem.model.gguf_weights import GgufWeights
from tandem.model.spec import ModelSpec
from tandem.ops import Kernels
from tandem.ops.linear import LinearWeight
from tandem.ops.quant import HEAD, Format, packed_shape

LOADABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. qkv is q, k and v stacked; gate_up is gate and up stacked. What a family lacks is None.

    input_norm and pre_mlp_norm come before attention and MLP, the post norms (sandwich norms) after them.
    """

    input_norm: Tensor
    qkv: LinearWeight
    o: LinearWeight
    pre_mlp_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters, on one device, in one dtype. `nbytes` counts a shared (tied) tensor once."""

    embedding: LinearWeight
    layers: tuple[LayerWeights, ...]
    final_norm_D: Tensor
    lm_head: LinearWeight
    nbytes: int


def load_weights(
    path: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    kernels: Kernels,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Read the checkpoint in `path` as `dtype` onto `device`; `progress(done, total)` is called after every layer.

    Raises ModelError naming file or tensor: unreadable file, missing or unexpected tensor, wrong shape, a number
    format other than float32, bfloat16 and float16.
    """
    with ExitStack() as stack:
        reader = _Reader(Path(path), spec, dtype, torch.device(device), kernels, stack)
        reader.check()
        total = len(spec.layers) + 1
        layers = []
        for index in range(len(spec.layers)):
            layers.append(reader.layer(index))
            if progress:
                progress(index + 1, total)
        # A tied head is the embedding: one weight, of which rows can be looked up.
        embedding = reader.packed(kernels.pack_tied if spec.tie_embeddings else kernels.keep_plain, EMBEDDING)
        head = embedding if spec.tie_embeddings else reader.packed(kernels.pack_head, TIED_HEAD)
        weights = Weights(embedding, tuple(layers), reader.tensor("model.norm.weight"), head, reader.nbytes)
        if progress:
            progress(total, total)
    return weights


def resident_bytes(spec: ModelSpec, dtype: torch.dtype, quantization: str) -> int:
    """What loaded weights take, but for rounding, and the largest tensor, which is there twice while it is packed."""
    sizes = []
    for name, shape in expected_shapes(spec).items():
        head = name == TIED_HEAD or (name == EMBEDDING and spec.tie_embeddings)
        if quantization == "none" or len(shape) < 2 or (name == EMBEDDING and not head):
            sizes.append(math.prod(shape) * dtype.itemsize)
        else:
            sizes.append(math.prod(packed_shape(shape[0], shape[1], HEAD if head else cast(Format, quantization))))
    largest = max(math.prod(shape) for shape in expected_shapes(spec).values()) * dtype.itemsize
    return sum(sizes) + (0 if quantization == "none" else largest)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    hidden, q, kv, inner = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    linears = {"self_attn.o_proj": (hidden, q, spec.o_bias), "mlp.down_proj": (hidden, inner, spec.mlp_bias)}
    if spec.fused_checkpoint:
        linears |= {
            "self_attn.qkv_proj": (q + 2 * kv, hidden, spec.qkv_bias),
            "mlp.gate_up_proj": (2 * inner, hidden, spec.mlp_bias),
        }
    else:
        linears |= {f"self_attn.{n}_proj": (size, hidden, spec.qkv_bias) for n, size in zip("qkv", (q, kv, kv))}
        linears |= {f"mlp.{n}_proj": (inner, hidden, spec.mlp_bias) for n in ("gate", "up")}
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.sandwich_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    for index in range(len(spec.layers)):
        prefix = f"model.layers.{index}."
        for name, (out_features, in_features, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out_features, in_features)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (out_features,)
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        shapes[TIED_HEAD] = (spec.vocab_size, hidden)
    return shapes


class _Reader:
    """The open files of one checkpoint. Counts the bytes of what it hands out."""

    def __init__(
        self, path: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, kernels: Kernels, stack: ExitStack
    ) -> None:
        self.path = path
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.nbytes = 0
        self.files: dict[str, Any] = {}
        for file in weight_files(path):
            opened = stack.enter_context(open_weights(file, dtype))
            for name in opened.keys():  # noqa: SIM118 - not a dict
                self.files[name] = opened

    def check(self) -> None:
        """Names, shapes and formats of all tensors, from the headers alone."""
        shapes = expected_shapes(self.spec)
        for name, expected in shapes.items():
            if name not in self.files:
                raise ModelError(f"{self.path}: tensor {name} {list(expected)} is missing")
            found = self.files[name].get_slice(name)
            if tuple(found.get_shape()) != expected:
                raise ModelError(f"{self.path}: tensor {name} has shape {found.get_shape()}, expected {list(expected)}")
            if found.get_dtype() not in LOADABLE:
                raise ModelError(
                    f"{self.path}: tensor {name} is {found.get_dtype()}; supported are {', '.join(LOADABLE)}"
                )
        for name in self.files:
            tied = name == TIED_HEAD and self.spec.tie_embeddings
            if name not in shapes and not tied and not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(f"{self.path}: tensor {name} is unexpected in a {self.spec.architecture}")

    def tensor(self, name: str) -> Tensor:
        tensor = self._owned(name)
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, *names: str) -> LinearWeight:
        """Stack the named layers' weights (and biases) along the output features."""
        weight = self._stacked([f"{name}.weight" for name in names])
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self.files]
        bias = self._stacked(biases) if biases else None
        return self._counted(lambda: self.kernels.pack(weight, bias), names[0])

    def packed(self, pack: Callable[[Tensor], LinearWeight], name: str) -> LinearWeight:
        return self._counted(lambda: pack(self._owned(name)), name)

    def _counted(self, pack: Callable[[], LinearWeight], name: str) -> LinearWeight:
        try:
            packed = pack()
        except ValueError as error:
            raise ModelError(f"{self.path}: {name}: {error}") from None
        self.nbytes += packed.nbytes
        return packed

    def layer(self, index: int) -> LayerWeights:
        spec, prefix = self.spec, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        fused = spec.fused_checkpoint
        before_mlp = "pre_feedforward_layernorm" if spec.sandwich_norms else "post_attention_layernorm"
        optional: dict[str, Tensor] = {}
        if spec.sandwich_norms:
            optional["post_attention_norm"] = self.tensor(f"{prefix}post_attention_layernorm.weight")
            optional["post_mlp_norm"] = self.tensor(f"{prefix}post_feedforward_layernorm.weight")
        if spec.qk_norm:
            optional["q_norm"] = self.tensor(f"{attention}q_norm.weight")
            optional["k_norm"] = self.tensor(f"{attention}k_norm.weight")
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(
                *[attention + name for name in (["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"])]
            ),
            o=self.linear(f"{attention}o_proj"),
            pre_mlp_norm=self.tensor(f"{prefix}{before_mlp}.weight"),
            gate_up=self.linear(*[mlp + name for name in (["gate_up_proj"] if fused else ["gate_proj", "up_proj"])]),
            down=self.linear(f"{mlp}down_proj"),
            **optional,
        )

    def _mapped(self, name: str) -> Tensor:
        """The tensor as it lies in the file, converted where it must be."""
        return self.files[name].get_tensor(name).to(self.device, self.dtype)

    def _owned(self, name: str) -> Tensor:
        # A copy even where nothing changes: a mapped file that is rewritten under us would take the process down.
        return self.files[name].get_tensor(name).to(self.device, self.dtype, copy=True)

    def _stacked(self, names: list[str]) -> Tensor:
        return self._owned(names[0]) if len(names) == 1 else torch.cat([self._mapped(name) for name in names])


def open_weights(file: Path, dtype: torch.dtype) -> Any:
    """The open file, for safetensors' `keys`, `get_slice` and `get_tensor`; GGUF's blocks are given as `dtype`.

    Raises ModelError where it cannot be read.
    """
    if is_gguf(file):
        return GgufWeights(file, dtype)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, or the GGUF file that `path` is. Raises ModelError."""
    if is_gguf(path):
        return [path]
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise ModelError(
            f"{path} has neither model.safetensors nor {index.name}; other weight formats are not supported"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from None
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise ModelError(f"{index} names {name}, which is not in {path}: download it again")
    return [path / name for name in names]
