"""Tensors of a GGUF file under the names, in the layout and with the meaning that a Hugging Face checkpoint has,
dequantised one at a time: what `weights.py` reads in the place of a safetensors file.

Here: names, llama.cpp's order of q and k rows, its norms with the one added. Not here: the blocks (`gguf_blocks.py`),
hyperparameters (`gguf_config.py`).

Shape letters: O rows, I numbers in a row, N blocks, C bytes of a block.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.errors import ModelError
from tandem.gguf.container import BLOCKS, Gguf, TensorInfo, read_gguf
from tandem.model.gguf_blocks import dequantize

# Numbers converted at a time: what lies between stays in the processor's cache.
CHUNK = 1 << 15
_BLOCKS = {name: (numbers, nbytes) for name, numbers, nbytes in BLOCKS.values()}
# Architectures whose converter reorders the rows of q and k, because ggml's kernel for them turns neighbours.
_PERMUTED = ("llama", "smollm3")
# Read as hyperparameters (`gguf_config.py`), or what every file's reader computes by itself.
_NO_PARAMETERS = re.compile(r"rope_(freqs|factors_(long|short))\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DIFFERENT = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    **dict.fromkeys(
        ("gemma2", "gemma3"),
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
}


class Described(NamedTuple):
    """What a safetensors slice says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class GgufWeights:
    """The tensors of the GGUF file at `path`, as safetensors' `safe_open` would give them, in `dtype`.

    Raises ModelError as `read_gguf` does, and where the file changes while it is read.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._gguf = read_gguf(path)
        self._dtype = dtype
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        arch = self._gguf.architecture
        in_layer = _IN_LAYER | _DIFFERENT.get(arch, {})
        self._infos = {
            _name(info.name, in_layer): info
            for info in self._gguf.tensors.values()
            if not _NO_PARAMETERS.fullmatch(info.name)
        }
        heads, kv_heads = (self._gguf.metadata.get(f"{arch}.attention.head_count{suffix}") for suffix in ("", "_kv"))
        self._heads = {"q_proj": heads, "k_proj": kv_heads or heads} if arch in _PERMUTED else {}
        self._norm_shift = 1.0 if arch.startswith("gemma") else 0.0

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """Names as a Hugging Face checkpoint spells them; those it has no name for as the file does."""
        return list(self._infos)

    def metadata(self) -> dict[str, str]:
        """None of what a safetensors file would have there."""
        return {}

    def get_slice(self, name: str) -> Described:
        """Shape, and the number format that `get_tensor` gives."""
        return Described(self._infos[name].shape, {torch.float32: "F32", torch.float16: "F16"}.get(self._dtype, "BF16"))

    def get_tensor(self, name: str) -> Tensor:
        """A new tensor of `dtype` on the CPU."""
        info = self._infos[name]
        if self._norm_shift and name.endswith("norm.weight"):
            # Exact in float32: the sum that the converter stored was rounded to it already.
            return (self._read(info, torch.float32) - self._norm_shift).to(self._dtype)
        tensor = self._read(info, self._dtype)
        heads = self._heads.get(name.split(".")[-2])
        return tensor if heads is None else _unpermuted(tensor, heads, info.name)

    def _read(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        return _read(self._file, self._gguf.path, info, dtype)


def read_vector(gguf: Gguf, name: str) -> list[float]:
    """The numbers of a short tensor. Raises ModelError."""
    with open(gguf.path, "rb") as file:
        return _read(file, gguf.path, gguf.tensors[name], torch.float32).flatten().tolist()


def _read(file, path: Path, info: TensorInfo, dtype: torch.dtype) -> Tensor:  # noqa: ANN001
    """The tensor at `info`, converted a chunk at a time, so that no second copy of it exists."""
    numbers, nbytes = _BLOCKS[info.type]
    out_NB = torch.empty(prod(info.shape) // numbers, numbers, dtype=dtype)
    blocks_a_chunk = CHUNK // numbers
    buffer = bytearray(min(blocks_a_chunk * nbytes, info.nbytes))
    file.seek(info.offset)
    for begin in range(0, len(out_NB), blocks_a_chunk):
        part_NB = out_NB[begin : begin + blocks_a_chunk]
        view = memoryview(buffer)[: len(part_NB) * nbytes]
        if file.readinto(view) != len(view):
            raise ModelError(f"{path}: tensor {info.name} cannot be read: the file was cut while it was open")
        part_NB.copy_(dequantize(torch.frombuffer(view, dtype=torch.uint8).view(-1, nbytes), info.type))
    return out_NB.view(info.shape)


def _name(name: str, in_layer: dict[str, str]) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in in_layer:
        return f"model.layers.{layer[1]}.{in_layer[layer[2]]}.{layer[3]}"
    top = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    return f"{_TOP[top[1]]}.{top[2]}" if top and top[1] in _TOP else name


def _unpermuted(tensor: Tensor, heads: int, name: str) -> Tensor:
    """Rows of each head from ggml's order (0, half, 1, half + 1, ...) back to (0, 1, ..., half, half + 1, ...)."""
    if not isinstance(heads, int) or heads < 1 or len(tensor) % (2 * heads):
        raise ModelError(f"tensor {name} of {len(tensor)} rows does not divide into {heads!r} heads")
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
