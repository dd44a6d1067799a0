"""LoRA adapters in the engine: PEFT is the oracle, and what must never happen is tried."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_adapters
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from tandem.engine.engine import Engine
from tandem.errors import Conflict, InvalidRequest, ModelError, NotFound, TandemError
from tandem.work import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "qv": {},
    "all-rank-3": {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    "mlp-rs": {"r": 16, "use_rslora": True, "target_modules": ["gate_proj", "down_proj"]},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 12},
        "alpha_pattern": {"q_proj": 7, "down_proj": 3},
    },
    "one-layer": {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: tiny_adapters.build(tiny_model("llama"), folder / name, seed, **config)
        for seed, (name, config) in enumerate(KINDS.items())
    }


def prompt(seed: int, length: int = 20) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


def run(engine: Engine, jobs: dict[str, tuple[list[int], str | None]]) -> dict[str, list[int]]:
    for name, (ids, adapter) in jobs.items():
        engine.submit(Request(request_id=name, prompt=ids, sampling=GREEDY, adapter=adapter))
    found: dict[str, list[int]] = {name: [] for name in jobs}
    for events in engine.run():
        engine.check()
        for event in events:
            if event.token_id is not None:
                found[event.request_id].append(event.token_id)
    return found


def test_all_kinds_in_one_batch_give_pefts_text(make_engine, tiny_model, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    ids = prompt(0)
    found = run(engine, {name: (ids, name) for name in adapters} | {"base": (ids, None)})
    for name, path in adapters.items():
        assert found[name] == tiny_adapters.generate(tiny_model("llama"), path, ids, 16), name
    assert found["base"] == make_engine().generate([ids], GREEDY)[0]
    assert len({tuple(text) for text in found.values()}) == len(found), "the adapters must matter"


@pytest.mark.parametrize("family", ["phi3", "qwen3", "gemma2"])
def test_logits_are_pefts_in_other_families(make_engine, tiny_model, tmp_path: Path, family: str) -> None:
    targets = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"] if family == "phi3" else ALL
    path = tiny_adapters.build(tiny_model(family), tmp_path / "a", 3, target_modules=targets)
    engine = make_engine(family)
    engine.load_adapter("a", str(path))
    ids = prompt(1, 30)
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.submit(Request(request_id="r", prompt=ids, sampling=scoring, adapter="a"))
    (events,) = engine.run()
    oracle = tiny_adapters.logprobs(tiny_model(family), path, ids)
    expected = [oracle[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert [entry.logprob for entry in events[0].prompt_logprobs] == pytest.approx(expected, abs=1e-4)


def test_more_adapters_than_fit_in_one_batch(make_engine, adapters: dict[str, Path]) -> None:
    ids = prompt(2)
    roomy, tight = make_engine(), make_engine(max_loras=1)
    for engine in (roomy, tight):
        for name, path in adapters.items():
            engine.load_adapter(name, str(path))
    jobs = {name: (ids, name) for name in adapters} | {"base": (ids, None)}
    assert run(tight, jobs) == run(roomy, jobs)
    for plan, *_ in tight.plan_log:
        assert len(plan.segments) <= 2


def test_a_reload_never_meets_the_old_versions_prefix_cache(make_engine, tiny_model, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    ids = prompt(3, 60)
    engine.load_adapter("mine", str(adapters["qv"]))
    run(engine, {"before": (ids, "mine")})
    engine.load_adapter("mine", str(adapters["all-rank-3"]))
    after = run(engine, {"after": (ids, "mine")})["after"]
    assert after == tiny_adapters.generate(tiny_model("llama"), adapters["all-rank-3"], ids, 16)
    hits = engine.stats.prefix_hits
    run(engine, {"again": (ids, "mine")})
    assert engine.stats.prefix_hits > hits, "the same version does share"


def test_adapters_never_share_prefixes_with_each_other_or_the_base(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    ids = prompt(4, 60)
    engine.load_adapter("a", str(adapters["qv"]))
    engine.load_adapter("b", str(adapters["mlp-rs"]))
    run(engine, {"base": (ids, None)})
    run(engine, {"a": (ids, "a")})
    run(engine, {"b": (ids, "b")})
    assert engine.stats.prefix_hits == 0


def test_a_running_request_keeps_the_version_it_started_with(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    ids = prompt(5)
    engine.load_adapter("mine", str(adapters["qv"]))
    expected = run(engine, {"alone": (ids, "mine")})["alone"]
    engine.submit(Request(request_id="old", prompt=ids, sampling=GREEDY, adapter="mine"))
    tokens = [e.token_id for _ in range(5) for e in engine.step()]
    engine.load_adapter("mine", str(adapters["all-rank-3"]))
    engine.submit(Request(request_id="new", prompt=ids, sampling=GREEDY, adapter="mine"))
    rest = [e for events in engine.run() for e in events]
    tokens += [e.token_id for e in rest if e.request_id == "old"]
    assert tokens == expected
    assert [e.token_id for e in rest if e.request_id == "new"] != expected
    assert len(engine.worker.resident) == 1, "the old version's bytes went with its last request"


def test_unloading_waits_for_the_last_pin_and_takes_the_name_at_once(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    ids = prompt(6)
    engine.load_adapter("mine", str(adapters["qv"]))
    expected = run(engine, {"alone": (ids, "mine")})["alone"]
    engine.submit(Request(request_id="r", prompt=ids, sampling=GREEDY, adapter="mine"))
    tokens = [e.token_id for e in engine.step()]
    engine.unload_adapter("mine")
    with pytest.raises(NotFound, match="mine"):
        engine.submit(Request(request_id="late", prompt=ids, sampling=GREEDY, adapter="mine"))
    tokens += [e.token_id for events in engine.run() for e in events]
    assert tokens == expected and not engine.worker.resident
    with pytest.raises(NotFound):
        engine.unload_adapter("mine")


def test_a_waiting_request_of_an_unloaded_adapter_can_be_cancelled(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    engine.load_adapter("mine", str(adapters["qv"]))
    engine.submit(Request(request_id="r", prompt=prompt(7), sampling=GREEDY, adapter="mine"))
    engine.unload_adapter("mine")
    engine.cancel("r")
    assert not engine.worker.resident


def test_the_pool_grows_and_gives_rows_back(make_engine, tiny_model, tmp_path: Path) -> None:
    engine = make_engine(max_loras=2)
    expected = {}
    for i, rank in enumerate((4, 40, 100, 7)):
        path = tiny_adapters.build(tiny_model("llama"), tmp_path / str(i), i, r=rank, lora_alpha=rank)
        engine.load_adapter(str(i), str(path))
        expected[str(i)] = tiny_adapters.generate(tiny_model("llama"), path, prompt(8), 16)
    for _ in range(2):
        assert run(engine, {name: (prompt(8), name) for name in expected}) == expected


def test_too_many_adapters_is_a_conflict(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine(max_cpu_loras=1)
    engine.load_adapter("a", str(adapters["qv"]))
    with pytest.raises(Conflict, match="--max-cpu-loras"):
        engine.load_adapter("b", str(adapters["qv"]))
    assert engine.adapters.names() == ["a"] and len(engine.worker.resident) == 1


def edited(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r=0"),
        ({"target_modules": ["q_proj", "v_proj", "wq"]}, "'wq' does not exist"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "'o_proj' has no weights"),
        ({"target_modules": [1]}, "no module name"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": 1e40}, "once scaled"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(
    make_engine, adapters: dict[str, Path], tmp_path: Path, fields: dict, message: str
) -> None:
    engine = make_engine()
    with pytest.raises(ModelError, match=message):
        engine.load_adapter("a", str(edited(adapters["qv"], tmp_path / "a", **fields)))
    assert engine.adapters.names() == [] and not engine.worker.resident


def rewritten(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY.replace("q_proj", "wq"): t.pop(KEY)}), "wq"),
        (lambda t: t.update({KEY.replace("layers.0", "layers.7"): t.pop(KEY)}), "layers.7"),
        (lambda t: t.update({KEY.replace("self_attn", "mlp"): t.pop(KEY)}), "mlp.q_proj"),
        (lambda t: t.update({KEY.replace("weight", "default.weight"): t[KEY].clone()}), "two lora_A"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.2" in k], "has no weights in layer 2"),
        (lambda t: t.update({KEY: torch.zeros(8, 63)}), "shapes"),
        (lambda t: t.update({KEY: torch.zeros(())}), "shapes"),
        (lambda t: t.update({KEY: torch.zeros(0, 64)}), "shapes"),
        (lambda t: t.update({KEY: torch.zeros(8, 64, dtype=torch.int32)}), "int32"),
        (lambda t: t.pop(KEY), "only lora_B"),
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), "NaN"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}), "lm_head"),
        (lambda t: t.clear(), "no LoRA factors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    make_engine, adapters: dict[str, Path], tmp_path: Path, change: Callable, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_engine().load_adapter("a", str(rewritten(adapters["qv"], tmp_path / "a", change)))


def test_missing_broken_and_oversized_adapters_are_refused(
    make_engine, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = make_engine(max_lora_rank=4)
    with pytest.raises(ModelError, match="adapter_config.json is missing"):
        engine.load_adapter("a", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="--max-lora-rank 4"):
        engine.load_adapter("a", str(adapters["qv"]))
    broken = edited(adapters["qv"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all")
    with pytest.raises(ModelError, match="cannot be read"):
        engine.load_adapter("a", str(broken))
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        engine.load_adapter("a", str(broken))


def test_an_adapter_that_overflows_harms_nobody_else(make_engine, adapters: dict[str, Path], tmp_path: Path) -> None:
    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] *= 1e19

    engine = make_engine()
    engine.load_adapter("wild", str(rewritten(adapters["qv"], tmp_path / "wild", blow_up)))
    engine.load_adapter("tame", str(adapters["all-rank-3"]))
    ids = prompt(9)
    expected = {name: run(engine, {name: (ids, name if name != "base" else None)})[name] for name in ("base", "tame")}
    for _ in range(2):
        found = run(engine, {"wild": (ids, "wild"), "base": (ids, None), "tame": (ids, "tame")})
        assert {name: found[name] for name in expected} == expected


def test_an_adapter_may_not_take_the_base_models_name(make_engine, adapters: dict[str, Path]) -> None:
    engine = make_engine()
    for name in ("", engine.config.model.model):
        with pytest.raises(InvalidRequest):
            engine.load_adapter(name, str(adapters["qv"]))


def test_errors_are_tandems_own() -> None:
    assert issubclass(ModelError, TandemError)
