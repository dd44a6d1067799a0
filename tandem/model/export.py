"""Base model + LoRA adapter -> a Hugging Face directory that any program loads without knowing of adapters.

The checkpoint is rewritten one file at a time, so memory stays near its largest file; a GGUF file becomes several of a
few gigabytes, dequantised. Not here: reading PEFT's format
(`adapter.py`), and exporting an adapter by itself, which is a copy of its directory.

Shape letters: R rank, I in features, O out features.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tandem.errors import ConfigError, ModelError, TandemError
from tandem.gguf.container import read_gguf
from tandem.gguf.vocabulary import load_tokenizer
from tandem.hub import TOKENIZER_FILES, is_gguf
from tandem.model.adapter import KEY, MLP_MODULES, PREFIX, WEIGHTS_FILE, AdapterWeights, read_adapter
from tandem.model.gguf_config import config_of
from tandem.model.spec import ModelSpec, Target, load_spec, targets
from tandem.model.weights import LOADABLE, expected_shapes, open_weights, weight_files

# Beside the weights: what transformers needs, and the terms under which the model came.
COPIED_FILES = (*TOKENIZER_FILES, "LICENSE*", "NOTICE*")
# Lists of weight files in formats that are not written; the one of safetensors stays true.
FOREIGN_INDEX = ".bin.index.json"
ANY_RANK = 2**31
# Of the files that a GGUF file becomes.
FILE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Patch:
    """Rows `start` to `stop` of a checkpoint's tensor get (b_RO[:, columns]).T @ a_RI added."""

    start: int
    stop: int
    a_RI: Tensor
    b_RO: Tensor


@dataclass(frozen=True)
class Shard:
    """A file to write: the named tensors (None: all) of the file `source`, in `dtype` where they are quantised."""

    source: Path
    names: list[str] | None
    target: str
    dtype: torch.dtype


def merge_adapter(model: Path, adapter: Path, output: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model directory or GGUF file `model` with the PEFT directory `adapter` merged into it to the new
    directory `output`.

    Sums are made in float32 and stored in the checkpoint's own format, quantised ones as the spec's dtype. The adapter
    may name modules as the checkpoint does or the other way (q_proj, k_proj, v_proj against qkv_proj).
    `progress(done, total)` counts weight files.
    Raises ModelError for a model or adapter that cannot be read or do not fit each other, ConfigError where `output`
    exists, TandemError where it cannot be written; then nothing is left behind.
    """
    model, output = Path(model), Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already: choose another directory, or remove it first")
    spec = load_spec(model)
    files = weight_files(model)
    patches = _patches(spec, Path(adapter))
    shards = _shards(files, spec)
    _check(shards, spec, patches)
    with _new_directory(output) as partial:
        for done, shard in enumerate(shards, 1):
            _merge_file(shard, partial, patches)
            if progress:
                progress(done, len(shards))
        if is_gguf(model):
            _describe(model, shards, partial)
            return
        for file in sorted({file for pattern in COPIED_FILES for file in model.glob(pattern)}):
            if file.is_file() and not file.name.endswith(FOREIGN_INDEX):
                shutil.copyfile(file, partial / file.name)


def _shards(files: list[Path], spec: ModelSpec) -> list[Shard]:
    """One for every safetensors file, under its name; a GGUF file's tensors in their order, so many to a file."""
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(spec.dtype, torch.bfloat16)
    if not is_gguf(files[0]):
        return [Shard(file, None, file.name, dtype) for file in files]
    groups: list[list[str]] = [[]]
    room = FILE_BYTES
    with open_weights(files[0], dtype) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            nbytes = math.prod(tensors.get_slice(name).get_shape()) * dtype.itemsize
            if nbytes > room and groups[-1]:
                groups.append([])
                room = FILE_BYTES
            room -= nbytes
            groups[-1].append(name)
    if len(groups) == 1:
        return [Shard(files[0], groups[0], "model.safetensors", dtype)]
    return [
        Shard(files[0], names, f"model-{index:05d}-of-{len(groups):05d}.safetensors", dtype)
        for index, names in enumerate(groups, 1)
    ]


def _describe(model: Path, shards: list[Shard], output: Path) -> None:
    """What a Hugging Face directory has beside the tensors, out of a GGUF file."""
    gguf = read_gguf(model)
    config, generation = config_of(gguf)
    described = {"config.json": config, "generation_config.json": generation}
    if len(shards) > 1:
        weight_map = {name: shard.target for shard in shards for name in shard.names or ()}
        described["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, content in described.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    load_tokenizer(gguf).save_pretrained(output)


def _patches(spec: ModelSpec, adapter: Path) -> dict[str, list[Patch]]:
    """What is added to which of the checkpoint's tensors."""
    named = _as_named(spec, adapter)
    weights = read_adapter(adapter, named, torch.float32, torch.device("cpu"), ANY_RANK)
    found: dict[str, list[Patch]] = {}
    for layer, name, factors in _factors(weights):
        of_adapter = targets(named)[name]
        for module, of_checkpoint in targets(spec).items():
            if patch := _overlap(of_checkpoint, of_adapter, *factors):
                block = "mlp" if module in MLP_MODULES else "self_attn"
                found.setdefault(f"model.layers.{layer}.{block}.{module}.weight", []).append(patch)
    return found


def _factors(weights: AdapterWeights) -> Iterator[tuple[int, str, tuple[Tensor, Tensor]]]:
    for layer, factors in enumerate(weights.layers):
        for name, pair in factors.items():
            yield layer, name, pair


def _as_named(spec: ModelSpec, adapter: Path) -> ModelSpec:
    """`spec`, or the same model with fused or split projections, whichever has the modules that the adapter names."""
    file = adapter / WEIGHTS_FILE
    if not file.is_file():
        return spec  # read_adapter says what is missing
    try:
        with safe_open(file, "pt") as tensors:
            matches = [KEY.match(key.removeprefix(PREFIX)) for key in tensors.keys()]  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    names = {match[3] for match in matches if match}
    other = dataclasses.replace(spec, fused_checkpoint=not spec.fused_checkpoint)
    return other if not names <= targets(spec).keys() and names <= targets(other).keys() else spec


def _overlap(of_checkpoint: Target, of_adapter: Target, a_RI: Tensor, b_RO: Tensor) -> Patch | None:
    """Both targets are ranges of output features of one of the decoder's linears; the part that they share."""
    if of_checkpoint.linear != of_adapter.linear:
        return None
    start = max(of_checkpoint.offset, of_adapter.offset)
    stop = min(of_checkpoint.offset + of_checkpoint.out_features, of_adapter.offset + of_adapter.out_features)
    if start >= stop:
        return None
    columns = slice(start - of_adapter.offset, stop - of_adapter.offset)
    return Patch(start - of_checkpoint.offset, stop - of_checkpoint.offset, a_RI, b_RO[:, columns])


def _check(shards: list[Shard], spec: ModelSpec, patches: dict[str, list[Patch]]) -> None:
    """Every tensor that is changed exists with the shape and a format we know: from the headers, before any work."""
    shapes, missing = expected_shapes(spec), set(patches)
    for shard in shards:
        file = shard.source
        with open_weights(file, shard.dtype) as tensors:
            names = set(shard.names or tensors.keys())
            for name in missing & names:
                found = tensors.get_slice(name)
                if tuple(found.get_shape()) != shapes[name]:
                    raise ModelError(f"{file}: tensor {name} has shape {found.get_shape()}, not {list(shapes[name])}")
                if found.get_dtype() not in LOADABLE:
                    raise ModelError(f"{file}: {name} is {found.get_dtype()}; supported are {', '.join(LOADABLE)}")
            missing -= names
    if missing:
        raise ModelError(f"{shards[0].source.parent}: tensor {min(missing)} is missing")


def _merge_file(shard: Shard, output: Path, patches: dict[str, list[Patch]]) -> None:
    with open_weights(shard.source, shard.dtype) as tensors:
        merged = {name: tensors.get_tensor(name) for name in shard.names or tensors.keys()}
        metadata = {"format": "pt"} | (tensors.metadata() or {})
    for name in merged.keys() & patches.keys():
        merged[name] = _patched(merged[name], patches[name])
        if not merged[name].isfinite().all():
            raise ModelError(f"{name} + adapter does not fit into {merged[name].dtype}: convert the model to bfloat16")
    save_file(merged, output / shard.target, metadata)


def _patched(weight_OI: Tensor, patches: list[Patch]) -> Tensor:
    total_OI = weight_OI.to(torch.float32, copy=True)
    for patch in patches:
        total_OI[patch.start : patch.stop].addmm_(patch.b_RO.T, patch.a_RI)
    return total_OI.to(weight_OI.dtype)


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its name once all is written, and vanishes otherwise."""
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        raise TandemError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
