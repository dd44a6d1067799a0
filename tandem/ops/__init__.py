"""How fast: the operations a model is made of, one field of `Kernels` each, chosen once at start.

Reading `Kernels` is reading the interface; what each op means stands in its own file, beside its reference. Nothing
here knows requests, models or memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from tandem.errors import ConfigError
from tandem.ops import attention, linear, lora, pointwise, sampling
from tandem.ops.cpu import library
from tandem.ops.cpu.attention import CpuAttention
from tandem.ops.cpu.linear import TileLinears
from tandem.ops.cpu.pointwise import Pointwise
from tandem.ops.cpu.quant import QuantLinears
from tandem.ops.cpu.sampling import Sampling
from tandem.ops.quant import Format


@dataclass(frozen=True)
class Kernels:
    """One function per op. `name` says what was chosen, for the start-up line; with at least `min_rows` rows, a row's
    result does not depend on how many others a batch has."""

    name: str
    min_rows: int
    prepare_attention: Callable[..., Any]
    attention: Callable[..., torch.Tensor]
    causal_attention: Callable[..., torch.Tensor]
    pack: Callable[..., linear.LinearWeight]
    keep_plain: Callable[..., linear.LinearWeight]
    pack_head: Callable[..., linear.LinearWeight]
    pack_tied: Callable[..., linear.LinearWeight]
    unpack: Callable[..., torch.Tensor]
    embed: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    adapted: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    adapted_gradient: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    factor_gradient: Callable[..., None]
    hidden: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rope: Callable[..., torch.Tensor]
    norm_rope: Callable[..., torch.Tensor]
    rope_angles: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    silu_mul: Callable[..., torch.Tensor]
    gelu_tanh_mul: Callable[..., torch.Tensor]
    softcap: Callable[..., torch.Tensor]
    cross_entropy_: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    argmax: Callable[..., torch.Tensor]
    draw: Callable[..., torch.Tensor]
    draw_filtered: Callable[..., torch.Tensor]


def load(device: str, dtype: torch.dtype, cpu_isa: str = "auto", quantization: str = "none") -> Kernels:
    """The kernels for weights of `dtype` on `device` ("cpu", "cuda" or "cuda:1").

    `cpu_isa`: auto, amx, avx512, avx2 or torch; a named one that does not run here is a ConfigError. `quantization`:
    none, or int8 or int4, which `pack` makes of weights (CPU only: else a ConfigError).
    """
    kind = torch.device(device).type
    packs = linear.can_pack(kind, dtype)
    if kind != "cpu" and cpu_isa != "auto":
        raise ConfigError(f"--cpu-isa {cpu_isa} is for --device cpu, this is {device}: leave it away")
    if kind != "cpu" and quantization != "none":
        raise ConfigError(f"--quantization {quantization} is for --device cpu, this is {device}: leave it away")
    compiled = library.load(cpu_isa) if kind == "cpu" else None
    tiles = TileLinears(compiled) if compiled and dtype == torch.bfloat16 else None
    packs = packs and tiles is None
    names = [f"compiled for {compiled.isa}" if compiled else "torch", *(["oneDNN-packed linears"] if packs else [])]
    products: Any = tiles or SimpleNamespace(
        pack=linear.pack if packs else linear.keep_plain,
        unpack=linear.unpack,
        linear=linear.linear,
        adapted=lora.adapted,
        adapted_gradient=lora.adapted_gradient,
        factor_gradient=lora.factor_gradient,
        hidden=lora.hidden,
        embed=linear.embed,
    )
    pack_head, pack_tied = products.pack, tiles.pack if tiles else linear.keep_plain
    if quantization != "none":
        products = QuantLinears(cast(Format, quantization), compiled, products, dtype)
        pack_head = pack_tied = products.pack_head
        names.append(f"{quantization} weights")
    small: Any = Pointwise(compiled) if compiled else pointwise
    samples: Any = Sampling(compiled) if compiled else sampling
    attends: Any = CpuAttention(compiled) if compiled else attention
    return Kernels(
        name=", ".join(names),
        min_rows=1 if tiles else linear.MIN_ROWS,
        prepare_attention=attends.prepare_attention,
        attention=attends.attention,
        causal_attention=attends.causal_attention,
        pack=products.pack,
        keep_plain=linear.keep_plain,
        pack_head=pack_head,
        pack_tied=pack_tied,
        unpack=products.unpack,
        embed=products.embed,
        linear=products.linear,
        adapted=products.adapted,
        adapted_gradient=products.adapted_gradient,
        factor_gradient=products.factor_gradient,
        hidden=products.hidden,
        rms_norm=small.rms_norm,
        add_rms_norm=small.add_rms_norm,
        rope=small.rope,
        norm_rope=small.norm_rope,
        rope_angles=small.rope_angles,
        silu_mul=small.silu_mul,
        gelu_tanh_mul=small.gelu_tanh_mul,
        softcap=small.softcap,
        cross_entropy_=small.cross_entropy_,
        argmax=samples.argmax,
        draw=samples.draw,
        draw_filtered=samples.draw_filtered,
    )
