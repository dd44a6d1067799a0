"""Reading checkpoints: sharded equals single, and every defect is named before or while it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem import ops
from tandem.errors import ModelError
from tandem.model.spec import load_spec
from tandem.model.weights import Weights, expected_shapes, load_weights
from tandem.ops.linear import unpack

TinyModel = Callable[[str], Path]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(path, load_spec(path), dtype=dtype, device="cpu", kernels=ops.load("cpu", dtype))


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / FILE)
    return target


def shard(source: Path, target: Path, count: int) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / FILE)
    (target / FILE).unlink()
    weight_map = {}
    for index in range(count):
        name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        part = dict(sorted(tensors.items())[index::count])
        save_file(part, target / name)
        weight_map |= dict.fromkeys(part, name)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def assert_same(one: Weights, other: Weights) -> None:
    assert torch.equal(one.embedding.weight, other.embedding.weight)
    assert torch.equal(unpack(one.lm_head), unpack(other.lm_head))
    for a, b in zip(one.layers, other.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(unpack(getattr(a, name)), unpack(getattr(b, name)))
        assert torch.equal(a.input_norm, b.input_norm)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_equals_single(tiny_model: TinyModel, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    assert_same(load(tiny_model(family), dtype), load(shard(tiny_model(family), tmp_path, 3), dtype))


def test_fused_linears_hold_the_parts_in_order(tiny_model: TinyModel) -> None:
    tensors, weights = load_file(tiny_model("qwen2") / FILE), load(tiny_model("qwen2"))
    prefix = "model.layers.1.self_attn."
    assert torch.equal(unpack(weights.layers[1].qkv), torch.cat([tensors[f"{prefix}{n}_proj.weight"] for n in "qkv"]))
    assert torch.equal(weights.layers[1].qkv.bias, torch.cat([tensors[f"{prefix}{n}_proj.bias"] for n in "qkv"]))


def test_nbytes_counts_a_tied_head_once(tiny_model: TinyModel) -> None:
    for family in ("llama", "llama-tied"):
        weights = load(tiny_model(family), torch.bfloat16)
        assert weights.nbytes == 2 * load_spec(tiny_model(family)).num_parameters
    assert weights.lm_head is weights.embedding


def test_progress_reaches_its_total(tiny_model: TinyModel) -> None:
    path, calls = tiny_model("llama"), []
    kernels = ops.load("cpu", torch.float32)
    load_weights(
        path, load_spec(path), dtype=torch.float32, device="cpu", kernels=kernels, progress=lambda *a: calls.append(a)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_float16_checkpoints_and_rotary_buffers_are_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    weights = load(changed(tiny_model("llama"), tmp_path, change))
    exact = load(tiny_model("llama")).embedding.weight
    torch.testing.assert_close(weights.embedding.weight, exact, rtol=1e-3, atol=1e-3)


def test_a_saved_head_beside_a_tied_embedding_is_ignored(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = changed(tiny_model("llama-tied"), tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(264, 64)}))
    assert load(path).lm_head.weight.shape == (264, 64)
    assert not torch.equal(load(path).lm_head.weight, torch.ones(264, 64))


def test_loading_does_not_depend_on_the_file_afterwards(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = changed(tiny_model("llama"), tmp_path, lambda tensors: None)
    weights = load(path)
    (path / FILE).write_bytes(b"")
    assert weights.embedding.weight.isfinite().all()


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (put("model.norm.weight", torch.ones(7)), ["model.norm.weight", "[7]", "[64]"]),
        (put("model.layers.0.self_attn.k_proj.weight", torch.ones(64, 64)), ["k_proj", "[64, 64]", "[32, 64]"]),
        (put("model.layers.0.self_attn.q_proj.bias", torch.ones(64)), ["q_proj.bias", "unexpected"]),
        (put("model.layers.3.input_layernorm.weight", torch.ones(64)), ["layers.3", "unexpected"]),
        (put("model.norm.weight", torch.ones(64, dtype=torch.float8_e4m3fn)), ["model.norm.weight", "F8_E4M3"]),
        (put("model.norm.weight", torch.ones(64, dtype=torch.int64)), ["model.norm.weight", "I64"]),
    ],
)
def test_defects_are_named(
    tiny_model: TinyModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    path = changed(tiny_model("llama"), tmp_path, change)
    with pytest.raises(ModelError) as refusal:
        load(path)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 100, b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}"]
)
def test_a_broken_file_is_refused(tiny_model: TinyModel, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ModelError, match=FILE):
        load(tmp_path)


def test_a_truncated_file_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(tmp_path)


def test_missing_files_are_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = shard(tiny_model("llama"), tmp_path, 2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        load(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="x.safetensors"):
        load(path)
    (path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load(path)
    (path / INDEX).unlink()
    with pytest.raises(ModelError, match="neither"):
        load(path)


def test_an_unsupported_config_is_refused_before_weights_are_opened(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).write_bytes(b"never read")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DeepseekV3ForCausalLM"]}))
    with pytest.raises(ModelError, match="DeepseekV3ForCausalLM"):
        load(tmp_path)


def test_expected_shapes_are_those_of_the_checkpoint(tiny_model: TinyModel) -> None:
    for family in ("llama-bias", "llama-tied", "qwen3", "gemma2", "phi3", "smollm3"):
        saved = {name: tuple(t.shape) for name, t in load_file(tiny_model(family) / FILE).items()}
        assert expected_shapes(load_spec(tiny_model(family))) == saved, family
