"""How fast: the operations a model is made of, one field of `Kernels` each, chosen once at start.

Reading `Kernels` is reading the interface; what each op means stands in its own file, beside its reference. Nothing
here knows requests, models or memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem.ops import attention, linear, lora, pointwise


@dataclass(frozen=True)
class Kernels:
    """One function per op. `name` says what was chosen, for the start-up line."""

    name: str
    prepare_attention: Callable[..., attention.Reads]
    attention: Callable[..., torch.Tensor]
    pack: Callable[..., linear.LinearWeight]
    keep_plain: Callable[..., linear.LinearWeight]
    linear: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rope: Callable[..., torch.Tensor]
    rope_angles: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    silu_mul: Callable[..., torch.Tensor]
    gelu_tanh_mul: Callable[..., torch.Tensor]
    softcap: Callable[..., torch.Tensor]
    lora: Callable[..., None]


def load(device: str, dtype: torch.dtype) -> Kernels:
    """The kernels for weights of `dtype` on `device` ("cpu", "cuda" or "cuda:1")."""
    packs = linear.can_pack(torch.device(device).type, dtype)
    return Kernels(
        name="torch, oneDNN-packed linears" if packs else "torch",
        prepare_attention=attention.prepare_attention,
        attention=attention.attention,
        pack=linear.pack if packs else linear.keep_plain,
        keep_plain=linear.keep_plain,
        linear=linear.linear,
        rms_norm=pointwise.rms_norm,
        rope=pointwise.rope,
        rope_angles=pointwise.rope_angles,
        silu_mul=pointwise.silu_mul,
        gelu_tanh_mul=pointwise.gelu_tanh_mul,
        softcap=pointwise.softcap,
        lora=lora.lora,
    )
