"""`tandem bench memory`: bytes that training holds for backward, way by way, measured on a layer of the model's shape.

The measuring is `tandem/model/footprint.py`, which loads torch; here are the options and the table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tandem.cli import options, serve
from tandem.config import DEMO_MODEL, ModelConfig, option
from tandem.errors import ConfigError
from tandem.hub import is_gguf, resolve_model

if TYPE_CHECKING:
    from tandem.model.footprint import Held

MEANING = {
    "plain": "transformers and PEFT under autograd",
    "pruned": "only what gradients of inputs and adapters need",
    "recomputed": "layers' inputs; one layer at a time is computed again",
    "windowed": "the same, a window of tokens at a time; loss in chunks",
}


@dataclass(frozen=True)
class MemoryOptions:
    """The measurement."""

    length: int = option(1024, "tokens of the training sequence", low=2)
    window: int = option(256, "tokens of a window", low=1)
    rank: int = option(16, "rank of the adapter, on all linears", low=1)
    json: str | None = option(None, "write the figures here", metavar="FILE")


def parser(prog: str) -> options.Parser:
    """The model and the measurement."""
    made = options.Parser(prog=prog, description="Measure what training holds for backward.")
    serve.add_model(made)
    options.add(made, MemoryOptions)
    options.add(made, ModelConfig, skip=[n for n in options.names(ModelConfig) if n not in ("dtype", "revision")])
    return made


def run(namespace: argparse.Namespace) -> int:
    """Measure, print, write."""
    serve.one_model(namespace)
    wanted, model = options.resolve(namespace, MemoryOptions, ModelConfig)
    path = DEMO_MODEL if model.model == "demo" else resolve_model(model.model, model.revision)
    if is_gguf(path):
        raise ConfigError(f"{path}: the plain way needs transformers to load the model: give a Hugging Face directory")
    from tandem.finetune.losses import CHUNK_LOGITS
    from tandem.model import footprint
    from tandem.model.spec import load_spec

    spec = load_spec(path)
    dtype = model.dtype if model.dtype != "auto" else "float32" if spec.dtype == "float32" else "bfloat16"
    chunk = max(1, CHUNK_LOGITS // spec.vocab_size)
    found = footprint.measure(path, dtype, wanted.length, wanted.window, chunk, wanted.rank)
    print("\n".join(table(found, wanted.length)))
    if wanted.json:
        rows = [asdict(held) | {"total": held.total, "per_token": held.total / wanted.length} for held in found]
        with open(wanted.json, "w", encoding="utf-8") as stream:
            json.dump({"model": model.model, "dtype": dtype, **asdict(wanted), "ways": rows}, stream, indent=1)
    return 0


def table(found: list[Held], length: int) -> list[str]:
    """Bytes per token of each way, and of the whole sequence by the first's."""
    lines = [
        f"Held for backward, one sequence of {length} tokens, bytes per token:",
        f"{'':<12}{'all layers':>12}{'in flight':>12}{'head, loss':>12}{'at most':>12}{'in GB':>8}{'of plain':>10}",
    ]
    for held in found:
        cells = "".join(f"{part / length:>12,.0f}" for part in (held.layers, held.in_flight, held.head, held.total))
        share = f"{held.total / found[0].total:.1%}"
        lines.append(f"{held.name:<12}{cells}{held.total / 1e9:>8.3f}{share:>10}  {MEANING[held.name]}")
    return lines
