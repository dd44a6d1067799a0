"""Merged checkpoints: transformers' logits of the merged model against PEFT's of base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_adapters
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.errors import ConfigError, ModelError, TandemError
from tandem.model import export
from tandem.model.export import merge_adapter
from tandem.model.spec import load_spec

TinyModel = Callable[[str], Path]
PROMPT = [1, 65, 100, 20, 33, 140, 7, 90, 201, 66, 12]
ALL = {"target_modules": "all-linear"}
LAYER = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def merged_logprobs(directory: Path) -> Tensor:
    with torch.inference_mode():
        return tiny_models.oracle(directory)(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def assert_merged(model: Path, adapter: Path, merged: Path) -> None:
    expected = tiny_adapters.logprobs(model, adapter, PROMPT)
    # An adapter that changes nothing would make every merge right.
    assert (expected - merged_logprobs(model)).abs().max() > 0.1
    torch.testing.assert_close(merged_logprobs(merged), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "gemma2", "phi3", "phi3-longrope"])
def test_merged_equals_base_with_peft(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    adapter = tiny_adapters.build(model, tmp_path / "adapter", **ALL)
    merge_adapter(model, adapter, tmp_path / "merged")
    assert_merged(model, adapter, tmp_path / "merged")
    assert load_spec(tmp_path / "merged") == load_spec(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("Hello") == tiny_models.tokenizer().encode("Hello")
    assert tokenizer.chat_template == tiny_models.CHAT_TEMPLATE


@pytest.mark.parametrize(
    "config",
    [{"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}}, {"layers_to_transform": 1}],
    ids=["rslora", "patterns", "one layer"],
)
def test_scaling_is_pefts(tiny_model: TinyModel, tmp_path: Path, config: dict) -> None:
    model = tiny_model("llama")
    adapter = tiny_adapters.build(model, tmp_path / "adapter", **config)
    merge_adapter(model, adapter, tmp_path / "merged")
    assert_merged(model, adapter, tmp_path / "merged")


def test_shards_stay_shards_and_a_tied_head_stays_tied(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), dtype=torch.float32)
    loaded.save_pretrained(model, max_shard_size="100KB")
    names = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(names) > 3
    adapter = tiny_adapters.build(model, tmp_path / "adapter", **ALL)
    steps: list[tuple[int, int]] = []
    merge_adapter(model, adapter, tmp_path / "merged", lambda *step: steps.append(step))
    assert steps == [(i + 1, len(names)) for i in range(len(names))]
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == names
    assert_merged(model, adapter, tmp_path / "merged")
    head = tiny_models.oracle(tmp_path / "merged")
    assert head.lm_head.weight.data_ptr() == head.model.embed_tokens.weight.data_ptr()


def test_only_one_file_is_in_memory(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    loaded.save_pretrained(model, max_shard_size="100KB")
    order: list[str] = []
    opened, saved = export.open_weights, export.save_file
    monkeypatch.setattr(export, "open_weights", lambda file, _: order.append(f"read {file.name}") or opened(file, _))

    def save(tensors, target, metadata):
        order.append(f"write {target.name}")
        assert sum(tensor.nbytes for tensor in tensors.values()) < 200_000
        saved(tensors, target, metadata)

    monkeypatch.setattr(export, "save_file", save)
    merge_adapter(model, tiny_adapters.build(model, tmp_path / "adapter"), tmp_path / "merged")
    names = sorted(file.name for file in model.glob("*.safetensors"))
    assert order[len(names) :] == [f"{verb} {name}" for name in names for verb in ("read", "write")]


def test_the_checkpoints_format_is_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_models.oracle(tiny_model("llama"), torch.bfloat16).save_pretrained(model)
    adapter = tiny_adapters.build(model, tmp_path / "adapter")
    merge_adapter(model, adapter, tmp_path / "merged")
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "merged"))
    factors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        expected = tensor
        if key.format("A") in factors:
            expected = (tensor.float() + 2 * factors[key.format("B")] @ factors[key.format("A")]).bfloat16()
            assert not torch.equal(after[name], tensor)
        assert after[name].dtype == torch.bfloat16
        torch.testing.assert_close(after[name], expected, rtol=2**-8, atol=1e-6)


def rename(adapter: Path, target: Path, factors: dict[str, Tensor], modules: list[str]) -> Path:
    """`adapter` with other factors and target modules."""
    shutil.copytree(adapter, target)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": modules}
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, target / "adapter_model.safetensors")
    return target


def test_a_fused_checkpoint_takes_an_adapter_with_split_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The oracle is PEFT on the fused names with the two factors stacked block by block: the same change."""
    model = tiny_model("phi3")
    fused = tiny_adapters.build(model, tmp_path / "fused", r=16, lora_alpha=16, target_modules=["qkv_proj"])
    spec = load_spec(model)
    rows = {"q_proj": slice(0, spec.q_size), "v_proj": slice(spec.q_size + spec.kv_size, None)}
    factors, split = load_file(fused / "adapter_model.safetensors"), {}
    for layer in range(len(spec.layers)):
        a_RI, b_OR = (factors[LAYER.format(layer, "qkv_proj", side)] for side in "AB")
        for half, (name, own) in enumerate(rows.items()):
            ranks = slice(half * 8, half * 8 + 8)
            # Half the rank has half the alpha, so both have scaling 1.
            split[LAYER.format(layer, name, "A")] = a_RI[ranks].clone()
            split[LAYER.format(layer, name, "B")] = b_OR[own, ranks].clone()
            kept = b_OR[own, ranks].clone()
            b_OR[:, ranks] = 0
            b_OR[own, ranks] = kept
    fused = rename(fused, tmp_path / "blocks", factors, ["qkv_proj"])
    adapter = rename(fused, tmp_path / "split", split, ["q_proj", "v_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 8, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(model, adapter, tmp_path / "merged")
    assert_merged(model, fused, tmp_path / "merged")


def test_a_split_checkpoint_takes_an_adapter_with_fused_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The oracle is PEFT on q, k and v that share A."""
    model = tiny_model("llama")
    modules = ["q_proj", "k_proj", "v_proj"]
    adapter = tiny_adapters.build(model, tmp_path / "split", target_modules=modules)
    factors, fused = load_file(adapter / "adapter_model.safetensors"), {}
    for layer in range(3):
        a_RI = factors[LAYER.format(layer, "q_proj", "A")]
        for name in modules:
            factors[LAYER.format(layer, name, "A")] = a_RI.clone()
        fused[LAYER.format(layer, "qkv_proj", "A")] = a_RI
        fused[LAYER.format(layer, "qkv_proj", "B")] = torch.cat([factors[LAYER.format(layer, n, "B")] for n in modules])
    split = rename(adapter, tmp_path / "shared", factors, modules)
    merge_adapter(model, rename(adapter, tmp_path / "fused", fused, ["qkv_proj"]), tmp_path / "merged")
    assert_merged(model, split, tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapter = tiny_adapters.build(tiny_model("gemma2"), tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match="another base"):
        merge_adapter(tiny_model("llama"), adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_directory_is_never_touched(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        merge_adapter(tiny_model("llama"), tmp_path, tmp_path)


def test_a_full_disk_leaves_nothing(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    adapter = tiny_adapters.build(model, tmp_path / "adapter")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(TandemError, match="No space left"):
        merge_adapter(model, adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == [adapter]


def test_missing_parts_are_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    with pytest.raises(ModelError, match="adapter_config.json is missing"):
        merge_adapter(model, tmp_path / "nowhere", tmp_path / "merged")
    adapter = tiny_adapters.build(model, tmp_path / "adapter")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj\.weight is missing"):
        merge_adapter(model, adapter, tmp_path / "merged")


def test_a_sum_beyond_the_format_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_models.oracle(tiny_model("llama"), torch.float16).save_pretrained(model)
    adapter = tiny_adapters.build(model, tmp_path / "adapter", lora_alpha=10_000_000)
    with pytest.raises(ModelError, match="does not fit into torch.float16"):
        merge_adapter(model, adapter, tmp_path / "merged")
