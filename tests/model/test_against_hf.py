"""Every family against transformers on tiny random models: logits, greedy text, any way through the paged cache, and
one test per feature that fails when the feature is switched off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from paged import Paged, load_decoder
from torch import Tensor

from tandem.model.decoder import LoraBatch, stack_layers
from tandem.model.spec import LayerSpec, ModelSpec, RopeSpec, load_spec, targets

# float32, for logits whose largest are around 10; against float64 both sides are off by up to 1.4e-4 here.
TOLERANCE = 2.5e-4
BF16_TOLERANCE = 0.35  # log-probabilities, where bfloat16 itself moves transformers' by up to this much (see the test)
FAMILIES = sorted(tiny_models.FAMILIES)
TinyModel = Callable[[str], Path]


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def oracle_logits(path: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return tiny_models.oracle(path, dtype)(torch.tensor([tokens])).logits[0].float()


def greedy(paged: Paged, name: str, tokens: list[int], steps: int) -> list[int]:
    text = [int(paged.step({name: tokens})[name][-1].argmax())]
    while len(text) < steps:
        text.append(int(paged.step({name: text[-1:]})[name][-1].argmax()))
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny_model: TinyModel, family: str) -> None:
    tokens = prompt(75)
    expected = oracle_logits(tiny_model(family), tokens)
    found = Paged(load_decoder(tiny_model(family))).step({"a": tokens})["a"]
    assert 4 < expected.abs().max() < 100, "the tolerance is meant for logits of this size"
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(tiny_model: TinyModel, family: str) -> None:
    """64 tokens, each the oracle's choice after the same text; exempt where its top two are within 1e-4."""
    tokens = prompt(40, seed=1)
    text = greedy(Paged(load_decoder(tiny_model(family))), "a", tokens, 64)
    logits = oracle_logits(tiny_model(family), tokens + text)[len(tokens) - 1 : -1]
    best = logits.topk(2).values
    decided = best[:, 0] - best[:, 1] > TOLERANCE
    assert decided.sum() > 60
    assert logits.argmax(-1)[decided].tolist() == torch.tensor(text)[decided].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_any_chunking_gives_the_same(tiny_model: TinyModel, family: str, block_size: int) -> None:
    decoder, tokens = load_decoder(tiny_model(family)), prompt(50, seed=2)
    whole = Paged(decoder, block_size).step({"a": tokens})["a"]
    for sizes in ([1], [7], [20, 1, 2, 13], [49, 1]):
        torch.testing.assert_close(Paged(decoder, block_size).feed("a", tokens, sizes), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_change_nothing(tiny_model: TinyModel, family: str) -> None:
    """Singles of very different lengths, chunks with and without context, all in one forward."""
    decoder = load_decoder(tiny_model(family))
    texts = {"a": prompt(61, 3), "b": prompt(3, 4), "c": prompt(17, 5), "d": prompt(40, 6), "e": prompt(25, 7)}
    together, last = Paged(decoder), {"a": 1, "b": 1, "c": 1, "d": 12, "e": 25}
    together.step({name: text[: -last[name]] for name, text in texts.items() if name != "e"})
    found = together.step({name: text[-last[name] :] for name, text in texts.items()})
    for name, text in texts.items():
        alone = Paged(decoder).step({name: text})[name][-last[name] :]
        torch.testing.assert_close(found[name], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_log_probabilities(tiny_model: TinyModel, family: str) -> None:
    """Ours and transformers' bfloat16 stay equally near the float32 truth: mean distance at most 1.5 times theirs."""
    tokens, path = prompt(60, seed=8), tiny_model(family)
    truth = oracle_logits(path, tokens).log_softmax(-1)
    theirs = (oracle_logits(path, tokens, torch.bfloat16).log_softmax(-1) - truth).abs()
    paged = Paged(load_decoder(path, dtype=torch.bfloat16))
    ours = (paged.feed("a", tokens, [30, 1, 1, 28]).log_softmax(-1) - truth).abs()
    assert ours.mean() < 1.5 * theirs.mean()
    assert ours.mean() < BF16_TOLERANCE


def without_rope_scaling(rope: RopeSpec) -> RopeSpec:
    return RopeSpec("default", rope.theta, rope.dim)


def each_layer(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    return dataclasses.replace(spec, layers=tuple(change(layer) for layer in spec.layers))


def each_rope(spec: ModelSpec, change: Callable[[RopeSpec], RopeSpec | None]) -> ModelSpec:
    return each_layer(spec, lambda layer: LayerSpec(layer.window, layer.rope and change(layer.rope)))


SWITCHED_OFF: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "attention soft cap": ("gemma2", lambda s: dataclasses.replace(s, attn_softcap=None)),
    "final soft cap": ("gemma2", lambda s: dataclasses.replace(s, final_softcap=None)),
    "embedding scale": ("gemma2", lambda s: dataclasses.replace(s, embedding_scale=None)),
    "norm plus one": ("gemma3", lambda s: dataclasses.replace(s, norm_plus_one=False)),
    "query scale": ("gemma2", lambda s: dataclasses.replace(s, query_scale=s.head_dim**-0.5)),
    "activation": ("gemma3", lambda s: dataclasses.replace(s, activation="silu")),
    "window of every layer": ("mistral", lambda s: each_layer(s, lambda x: LayerSpec(None, x.rope))),
    "window of phi3": ("phi3", lambda s: each_layer(s, lambda x: LayerSpec(None, x.rope))),
    "window of upper layers": ("qwen2", lambda s: each_layer(s, lambda x: LayerSpec(None, x.rope))),
    "window of every second layer": ("gemma2", lambda s: each_layer(s, lambda x: LayerSpec(None, x.rope))),
    "windows only above": ("qwen2", lambda s: each_layer(s, lambda x: LayerSpec(9, x.rope))),
    "theta per kind of layer": ("gemma3", lambda s: each_rope(s, lambda r: dataclasses.replace(r, theta=1e4))),
    "rope linear": ("llama-linear", lambda s: each_rope(s, without_rope_scaling)),
    "rope linear of one kind": ("gemma3", lambda s: each_rope(s, without_rope_scaling)),
    "rope llama3": ("llama-llama3", lambda s: each_rope(s, without_rope_scaling)),
    "rope yarn": ("llama-yarn", lambda s: each_rope(s, without_rope_scaling)),
    "yarn's attention factor": ("llama-yarn", lambda s: each_rope(s, lambda r: dataclasses.replace(r, scale=1.0))),
    "rope longrope": ("phi3-longrope", lambda s: each_rope(s, without_rope_scaling)),
    "longrope's scale": ("phi3-longrope", lambda s: each_rope(s, lambda r: dataclasses.replace(r, scale=1.0))),
    "partial rotary": (
        "phi3-longrope",
        lambda s: each_rope(s, lambda r: dataclasses.replace(r, dim=16, factors=(*r.factors, 1.0, 1.0))),
    ),
    "layers without rope": (
        "smollm3",
        lambda s: each_layer(s, lambda layer: LayerSpec(layer.window, s.layers[0].rope)),
    ),
    "rope": ("llama", lambda s: each_rope(s, lambda r: None)),
}
MISSING_WEIGHTS = {
    "query and key norms": ("qwen3", ("q_norm", "k_norm")),
    "norms after": ("gemma3", ("post_attention_norm", "post_mlp_norm")),
    "query, key and value bias": ("qwen2", ("qkv",)),
    "attention output bias": ("llama-bias", ("o",)),
    "MLP bias": ("llama-bias", ("gate_up", "down")),
}


@pytest.mark.parametrize("feature", sorted(SWITCHED_OFF))
def test_a_feature_switched_off_shows(tiny_model: TinyModel, feature: str) -> None:
    family, change = SWITCHED_OFF[feature]
    spec, tokens = load_spec(tiny_model(family)), prompt(60, seed=9)
    changed = change(spec)
    assert changed != spec
    logits = Paged(load_decoder(tiny_model(family), changed)).step({"a": tokens})["a"]
    assert (logits - oracle_logits(tiny_model(family), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("feature", sorted(MISSING_WEIGHTS))
def test_a_weight_left_out_shows(tiny_model: TinyModel, feature: str) -> None:
    family, names = MISSING_WEIGHTS[feature]
    decoder, tokens = load_decoder(tiny_model(family)), prompt(60, seed=9)
    expected = Paged(decoder).step({"a": tokens})["a"]

    def left_out(weight: object) -> object:
        return dataclasses.replace(weight, bias=None) if dataclasses.is_dataclass(weight) else None

    layers = tuple(
        dataclasses.replace(layer, **{name: left_out(getattr(layer, name)) for name in names})
        for layer in decoder.weights.layers
    )
    decoder.weights = dataclasses.replace(decoder.weights, layers=layers)
    assert (Paged(decoder).step({"a": tokens})["a"] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("max_model_len", "length"), [(32, 30), (None, 60)])
def test_longrope_takes_short_factors_for_short_contexts(
    tiny_model: TinyModel, max_model_len: int | None, length: int
) -> None:
    path, tokens = tiny_model("phi3-longrope"), prompt(length)
    found = Paged(load_decoder(path, max_model_len=max_model_len)).step({"a": tokens})["a"]
    torch.testing.assert_close(found, oracle_logits(path, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_lora_of_two_adapters_equals_merged_weights(tiny_model: TinyModel, family: str) -> None:
    """Rows of adapter 0, of adapter 1 and of neither in one forward: as if each ran on weights with B A added."""
    path, tokens, rank = tiny_model(family), prompt(20, seed=10), 3
    spec = load_spec(path)
    generator = torch.Generator().manual_seed(0)
    layers = [
        {
            name: (
                torch.randn(2 * rank, target.in_features, generator=generator) * 0.2,
                torch.randn(2 * rank, target.out_features, generator=generator) * 0.2,
            )
            for name, target in targets(spec).items()
        }
        for _ in spec.layers
    ]
    foreign_TR = torch.ones(60, 2 * rank, dtype=torch.bool)
    foreign_TR[:20, :rank] = False
    foreign_TR[20:40, rank:] = False
    names = ["first", "second", "neither"]
    lora = LoraBatch(foreign_TR, stack_layers(layers, targets(spec)))
    found = Paged(load_decoder(path)).step(dict.fromkeys(names, tokens), lora)
    for index, name in enumerate(names):
        model = tiny_models.oracle(path)
        rows = slice(index * rank, (index + 1) * rank)
        with torch.inference_mode():
            for layer, factors in zip(model.model.layers, layers, strict=True):
                for module, (a_RI, b_RO) in factors.items():
                    parent = layer.mlp if hasattr(layer.mlp, module) else layer.self_attn
                    getattr(parent, module).weight.add_(b_RO[rows].T @ a_RI[rows])
            expected = model(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=10 * TOLERANCE)
