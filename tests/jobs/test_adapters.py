"""Names for adapters: importing, deleting, aliases, and what the engine holds of them."""

import asyncio
import json
from pathlib import Path

import pytest

from tandem.errors import Conflict, InvalidRequest, ModelError, NotFound


def peft_directory(path, rank=4, **more):
    path.mkdir(parents=True)
    config = {"r": rank, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], "peft_type": "LORA"} | more
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_text(f"weights of {path.name}")
    (path / "state.json").write_text("optimiser")
    return path


async def imported(place, name):
    return await place.jobs.import_adapter(name, peft_directory(place.root.parent / "peft" / name.replace("/", "_")))


async def test_import_copies_and_serves(any_place, tmp_path):
    place = any_place
    await place.open()
    source = peft_directory(tmp_path / "mine")
    record = await place.jobs.import_adapter("org/mine", str(source))
    assert (record.rank, record.kind, record.base_model, record.job_id) == (4, "imported", "demo", None)
    copied = Path(record.path)
    assert {p.name for p in copied.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert copied.is_relative_to(place.root) and await place.jobs.resident("org/mine") == "org/mine"
    await place.jobs.close()
    place.engine = type(place.engine)()
    await place.open()
    assert [a.name for a in await place.jobs.adapters()] == ["org/mine"]
    assert place.jobs.resident_now("org/mine") is None
    assert await place.jobs.resident("org/mine") == "org/mine" == place.jobs.resident_now("org/mine")


async def test_import_refuses_and_leaves_nothing(place, tmp_path):
    await place.open()
    good = peft_directory(tmp_path / "good")
    bare = peft_directory(tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    await place.jobs.import_adapter("taken", good)
    for name, path, kind in (
        ("a", tmp_path / "none", ModelError), ("a", bare, ModelError), ("taken", good, Conflict),
        ("demo", good, Conflict), ("", good, InvalidRequest), ("new\nline", good, InvalidRequest),
        ("x" * 201, good, InvalidRequest),
    ):  # fmt: skip
        with pytest.raises(kind):
            await place.jobs.import_adapter(name, path)

    async def refuse(name, path):
        raise ModelError("layer 3 has the wrong shape")

    place.engine.load_adapter = refuse
    with pytest.raises(ModelError, match="wrong shape"):
        await place.jobs.import_adapter("b", good)
    assert [a.name for a in await place.jobs.adapters()] == ["taken"]
    assert len(list((place.root / "adapters").iterdir())) == 1


async def test_aliases_move_and_go_back(any_place):
    place = any_place
    await place.open()
    for name in ("one", "two", "three"):
        await imported(place, name)
    assert (await place.jobs.promote("best", "one")).history == []
    await place.jobs.promote("best", "two")
    assert (await place.jobs.promote("best", "two")).history == ["one"]
    await place.jobs.promote("other", "best")  # what it points at now, not the alias
    assert (await place.jobs.promote("best", "three")).history == ["one", "two"]
    assert await place.jobs.resident("best") == "three" and await place.jobs.resident("other") == "two"
    assert (await place.jobs.adapter("best")).name == "three"
    await place.jobs.close()
    await place.open()
    assert {a.name: a.target for a in await place.jobs.aliases()} == {"best": "three", "other": "two"}
    assert (await place.jobs.rollback("best")).target == "two"
    assert (await place.jobs.rollback("best")).target == "one"
    with pytest.raises(Conflict):
        await place.jobs.rollback("best")
    for call in (place.jobs.rollback("none"), place.jobs.promote("best", "none")):
        with pytest.raises(NotFound):
            await call
    for taken in ("demo", "one"):
        with pytest.raises(Conflict):
            await place.jobs.promote(taken, "two")


async def test_deleting(any_place):
    place = any_place
    await place.open()
    for name in ("one", "two"):
        await imported(place, name)
        await place.jobs.promote("best", name)
    with pytest.raises(Conflict, match="best"):
        await place.jobs.delete_adapter("two")
    path = Path((await place.jobs.adapter("one")).path)
    await place.jobs.delete_adapter("one")
    assert not path.exists() and "one" not in place.engine.adapters and await place.jobs.resident("one") is None
    with pytest.raises(Conflict):  # its past went with it
        await place.jobs.rollback("best")
    with pytest.raises(NotFound):
        await place.jobs.delete_adapter("one")
    await place.jobs.delete_adapter("best")
    assert await place.jobs.aliases() == []
    await place.jobs.delete_adapter("two")
    await place.jobs.close()
    await place.open()
    assert await place.jobs.adapters() == []


async def test_a_parent_stays_while_a_job_continues_it_and_checkpoints_may_go(place):
    await place.open()
    first = await place.until((await place.create()).job_id, "succeeded")
    place.engine.delay = 0.005
    second = await place.create(model=first.fine_tuned_model, rows=20)
    await place.until_step(second.job_id, 1)
    with pytest.raises(Conflict, match=second.job_id):
        await place.jobs.delete_adapter(first.fine_tuned_model)
    await place.until_step(second.job_id, 11)
    (checkpoint,), _ = await place.jobs.checkpoints(second.job_id)
    await place.jobs.delete_adapter(checkpoint.name)
    assert (await place.jobs.checkpoints(second.job_id))[0] == []
    place.engine.delay = 0.0
    await place.until(second.job_id, "succeeded")
    await place.jobs.delete_adapter(first.fine_tuned_model)


async def test_a_parent_that_vanished_from_the_disk_fails_the_job(place):
    await place.open()
    record = await imported(place, "one")
    place.jobs._queue._is_closing = True
    job = await place.create(model="one")
    for file in Path(record.path).iterdir():
        file.unlink()
    await place.jobs.close()
    await place.open()
    job = await place.until(job.job_id, "failed")
    assert job.error["code"] == "model_not_found" and "adapter_config.json" in job.error["message"]


@pytest.mark.parametrize(
    "extras, param",
    [({"rank": 8}, "tandem.rank"), ({"alpha": 1.0}, "tandem.alpha"), ({"use_rslora": True}, "tandem.use_rslora"),
     ({"target_modules": ("o_proj",)}, "tandem.target_modules")],
)  # fmt: skip
async def test_a_continued_adapter_keeps_its_shape(place, extras, param):
    await place.open()
    await imported(place, "one")
    with pytest.raises(InvalidRequest) as caught:
        await place.create(model="one", tandem=extras)
    assert caught.value.param == param
    same = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj")}
    job = await place.until((await place.create(model="one", tandem=same)).job_id, "succeeded")
    assert (job.tandem.rank, job.tandem.alpha) == (4, 8.0)


async def test_an_adapter_of_several_ranks_cannot_be_continued(place, tmp_path):
    await place.open()
    with pytest.raises(ModelError, match="rank_pattern"):
        await place.jobs.import_adapter("p", peft_directory(tmp_path / "p", rank_pattern={"q_proj": 2}))


async def test_a_full_engine_gives_up_the_least_recently_used_idle_adapter(place):
    place.engine.max_adapters = 3
    await place.open()
    await place.engine.load_adapter("by hand", str(peft_directory(place.root.parent / "hand")))
    for name in ("one", "two"):
        await imported(place, name)
    assert await place.jobs.resident("one") == "one"
    await imported(place, "three")
    assert place.engine.adapters.keys() == {"by hand", "one", "three"}
    place.engine.stats.running_adapters = ["one"]
    assert await place.jobs.resident("two") == "two"
    assert place.engine.adapters.keys() == {"by hand", "one", "two"}
    place.engine.stats.waiting_adapters = ["two"]
    with pytest.raises(Conflict):
        await place.jobs.resident("three")
    assert await place.jobs.resident("by hand") == "by hand"
    assert await place.jobs.resident("nobody") is None


async def test_an_adapter_that_many_ask_for_is_loaded_once(place):
    await place.open()
    await imported(place, "one")
    await place.engine.unload_adapter("one")
    loads = []
    real = place.engine.load_adapter

    async def load_adapter(name, path):
        loads.append(name)
        await asyncio.sleep(0.01)
        await real(name, path)

    place.engine.load_adapter = load_adapter
    assert set(await asyncio.gather(*(place.jobs.resident("one") for _ in range(20)))) == {"one"}
    assert loads == ["one"]


async def test_what_belongs_to_another_base_model_waits_for_it(place):
    await place.open()
    await imported(place, "one")
    place.jobs._queue._is_closing = True
    waiting = await place.create()
    await place.jobs.close()
    place.engine = type(place.engine)()
    await place.open(model_names=["Qwen/Qwen3-0.6B"])
    with pytest.raises(ModelError, match="adapter of demo"):
        await place.jobs.resident("one")
    with pytest.raises(InvalidRequest, match="adapter of demo"):
        await place.create(model="one")
    await place.until((await place.create(model="Qwen/Qwen3-0.6B")).job_id, "succeeded")
    assert (await place.jobs.job(waiting.job_id)).status == "validating_files"
    await place.jobs.close()
    await place.open(model_names=["/models/demo"])
    assert await place.jobs.resident("one") == "one"
    await place.until(waiting.job_id, "succeeded")
