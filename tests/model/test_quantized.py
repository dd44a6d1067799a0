"""Models with int8 and int4 weights: what they hold, how far their logits and gradients are off, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import finetune_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem import ops
from tandem.config import DEMO_MODEL, CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.errors import ConfigError, ModelError
from tandem.model.spec import load_spec
from tandem.model.weights import expected_shapes, load_weights, resident_bytes
from tandem.ops import quant
from tandem.work import LoraConfig, SamplingParams

TinyModel = Callable[[str], Path]
FILE = "model.safetensors"
FORMATS = quant.FORMATS
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def engine_of(model: Path | str, quantization: str = "none", **options: str) -> Engine:
    return Engine(
        EngineConfig(
            model=ModelConfig(model=str(model), quantization=quantization, **options), cache=CacheConfig(num_blocks=64)
        )
    )


def dequantised(source: Path, target: Path, format: quant.Format) -> Path:
    """The checkpoint that a quantised model stands for: what `expected_shapes` calls a linear, rounded and back.

    Projections that are fused at load are quantised row by row, so fusing changes nothing.
    """
    shutil.copytree(source, target)
    spec = load_spec(source)
    tensors = load_file(target / FILE)

    def rounded(weight: Tensor, to: quant.Format) -> Tensor:
        return quant.unpack(quant.pack(weight, None, to)).float()

    for name, shape in expected_shapes(spec).items():
        if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and spec.tie_embeddings):
            tensors[name] = rounded(tensors[name], quant.HEAD)
        elif len(shape) == 2 and name != "model.embed_tokens.weight":
            tensors[name] = rounded(tensors[name], format)
    save_file(tensors, target / FILE)
    return target


def gradients(engine: Engine, adapter: Path) -> oracle.Factors:
    """Of one batch through an adapter of every target."""
    engine.open_run("run", LORA, init_from=str(adapter))
    engine.forward_backward("run", oracle.examples(0, (17, 1, 12)))
    return oracle.copied(engine.gradients("run"))


@pytest.fixture
def no_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.model.gradients.DenseLayer.weight", lambda *args: pytest.fail("a dense copy"))


@pytest.mark.parametrize("family", ["llama-bias", "llama-tied", "gemma3", "phi3"])
def test_int8_in_float32_trains_as_the_model_it_stands_for(
    tiny_model: TinyModel, tmp_path: Path, no_dense_weights: None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(family)
    adapter = oracle.random_adapter(source, tmp_path / "adapter", LORA)
    found = gradients(engine_of(source, "int8", dtype="float32"), adapter)
    monkeypatch.undo()
    same = dequantised(source, tmp_path / "same", "int8")
    oracle.assert_near(found, gradients(engine_of(same, dtype="float32"), adapter), 1e-5)


@pytest.mark.parametrize(("format", "most"), [("int8", 0.08), ("int4", 0.5)])
def test_gradients_stay_near_those_of_the_full_weights(
    tiny_model: TinyModel, tmp_path: Path, no_dense_weights: None, format: quant.Format, most: float
) -> None:
    """Compiled kernels where there are any; a random model's gradients are as sensitive as gradients get."""
    source = tiny_model("llama-tied")
    adapter = oracle.random_adapter(source, tmp_path / "adapter", LORA)
    run = oracle.PeftRun(source, adapter)
    run.forward_backward(oracle.examples(0, (17, 1, 12)))
    assert oracle.mean(gradients(engine_of(source, format, dtype="bfloat16"), adapter), run.gradients()) < most


@pytest.mark.parametrize("format", FORMATS)
def test_the_demo_model_says_the_same(format: quant.Format) -> None:
    """Greedy text of a trained model, and log-probabilities of what it says, hardly move."""
    prompts = [[1, 60 + i, 200 + 3 * i, 700 + i, 90] for i in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    plain, found = engine_of("demo").generate(prompts, params), engine_of("demo", format).generate(prompts, params)
    same = sum(a == b for one, other in zip(plain, found, strict=True) for a, b in zip(one, other, strict=True))
    assert same / (8 * len(prompts)) > (0.9 if format == "int8" else 0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_text_does_not_depend_on_the_batch(format: quant.Format) -> None:
    engine = engine_of("demo", format)
    assert engine.report.batch_invariant
    prompts = [[1, 50 + i] * (1 + i) for i in range(9)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    together = engine.generate(prompts, params)
    assert [engine.generate([prompt], params)[0] for prompt in prompts] == together


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi3"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_held(tiny_model: TinyModel, family: str, format: quant.Format) -> None:
    path = tiny_model(family)
    spec = load_spec(path)
    kernels = ops.load("cpu", torch.bfloat16, "auto", format)
    weights = load_weights(path, spec, dtype=torch.bfloat16, device="cpu", kernels=kernels)
    linears = [getattr(layer, name) for layer in weights.layers for name in ("qkv", "o", "gate_up", "down")]
    assert {w.format for w in linears} == {format}
    assert weights.lm_head.format == "int8"
    assert (weights.embedding is weights.lm_head) == spec.tie_embeddings
    tensors = sum(w.weight.nbytes for w in {id(w): w for w in (*linears, weights.lm_head, weights.embedding)}.values())
    norms = sum(t.nbytes for layer in weights.layers for t in (layer.input_norm, layer.pre_mlp_norm))
    biases = sum(w.bias.nbytes for w in linears if w.bias is not None)
    assert weights.nbytes == tensors + norms + biases + weights.final_norm_D.nbytes
    predicted = resident_bytes(spec, torch.bfloat16, format)
    assert weights.nbytes <= predicted < 2.5 * weights.nbytes
    assert weights.nbytes < resident_bytes(spec, torch.bfloat16, "none")


def test_what_is_not_finite_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), path)
    tensors = load_file(path / FILE)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / FILE)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: a number that is not finite"):
        engine_of(path, "int8")


def test_a_checkpoint_that_is_quantised_already_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), path)
    config = path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "awq"},', 1))
    with pytest.raises(ModelError, match="quantization_config is set .quant_method awq.*--quantization int8"):
        load_spec(path)


def test_only_a_cpu_quantises() -> None:
    with pytest.raises(ConfigError, match="--quantization int8 is for --device cpu"):
        ops.load("cuda", torch.bfloat16, "auto", "int8")


def test_the_embedded_model_shrinks() -> None:
    spec = load_spec(DEMO_MODEL)
    whole, eight, four = (resident_bytes(spec, torch.bfloat16, q) for q in ("none", "int8", "int4"))
    assert four < eight < 0.7 * whole
