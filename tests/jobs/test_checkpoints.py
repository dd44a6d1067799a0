"""Runs and checkpoints of training loops, on disk: whole or not at all, their owner's, there after a restart."""

import time

import msgspec
import pytest

from tandem.errors import Conflict, InvalidRequest, NotFound
from tandem.jobs.checkpoints import CheckpointRecord, Checkpoints, RunRecord, check_name, expiry, parse


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "tinker")


def run(run_id="s:train:0", tenant="a"):
    return RunRecord(run_id=run_id, tenant=tenant, session_id="s", base_model="m", rank=4, created_at=1.0)


async def saved(store, name="one", tenant="a", kind="training", run_id="s:train:0", **more):
    directory = store.new_directory()
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(name.encode() * 10)
    record = CheckpointRecord(
        run_id=run_id, name=name, kind=kind, tenant=tenant, directory=directory.name, base_model="m", rank=4,
        created_at=more.pop("created_at", 1.0), **more,
    )  # fmt: skip
    return await store.put(record)


async def test_what_was_saved_is_there_after_a_restart(store):
    await store.put_run(run())
    record = await saved(store, user_metadata={"step": "3"})
    assert record.path == "tinker://s:train:0/weights/one" and record.size_bytes == 30
    again = Checkpoints(store.root)
    assert again.run("a", "s:train:0") == run()
    assert again.readable("a", record.path) == record
    assert (again.directory(record) / "adapter_model.safetensors").read_bytes() == b"one" * 10


async def test_what_a_crash_left_is_swept(store):
    record = await saved(store)
    half = store.new_directory()
    half.mkdir()  # a directory whose JSON was never written
    (store.root / "ckpt-lost.json").write_bytes(msgspec.json.encode(record).replace(b'"ckpt-', b'"lost-'))
    (store.root / ".ckpt-x.json.part").write_text("{")
    again = Checkpoints(store.root)
    assert [c.path for c in again.checkpoints("a")] == [record.path]
    assert sorted(p.name for p in store.root.iterdir()) == sorted([record.directory, f"{record.directory}.json"])


async def test_overwriting_leaves_one(store):
    first = await saved(store)
    with pytest.raises(Conflict, match="overwrite it"):
        store.check_free("s:train:0", "training", "one", overwrite=False)
    store.check_free("s:train:0", "training", "one", overwrite=True)
    second = await saved(store)
    assert not store.directory(first).exists() and store.directory(second).exists()
    assert len(list(store.root.iterdir())) == 2


async def test_tenants_see_their_own_and_what_is_public(store):
    record = await saved(store)
    await store.put_run(run())
    for ask in (lambda: store.readable("b", record.path), lambda: store.run("b", "s:train:0")):
        with pytest.raises(NotFound):
            ask()
    assert store.checkpoints("b") == [] and store.runs("b") == []
    record.public = True
    await store.put(record)
    assert store.readable("b", record.path) == record
    with pytest.raises(NotFound, match="not yours"):
        store.own("b", record.path)


async def test_copies_and_deletions(store):
    record = await saved(store, public=True)
    copied = await store.copy(record, run("copy:train:0", tenant="b"), None)
    assert copied.path == "tinker://copy:train:0/weights/one" and copied.tenant == "b" and not copied.public
    await store.delete(record)
    assert not store.directory(record).exists() and store.directory(copied).exists()
    assert store.readable("b", copied.path) == copied


async def test_checkpoints_expire(store):
    now = time.time()
    kept, late = await saved(store, "kept", expires_at=now + 99), await saved(store, "late", expires_at=now - 1)
    assert await store.expire(now) == [late]
    assert store.checkpoints("a") == [kept] and not store.directory(late).exists()


async def test_the_newest_comes_first(store):
    for i, name in enumerate(("b", "c", "a")):
        await saved(store, name, created_at=float(i))
    await saved(store, "other", run_id="s:train:1")
    assert [c.name for c in store.checkpoints("a", "s:train:0")] == ["a", "c", "b"]


@pytest.mark.parametrize(
    "path", ["", "one", "tinker://", "tinker://run", "tinker://run/weights", "tinker://run/other/x", "http://r/weights/x"]
)
def test_paths_that_are_none(path):
    with pytest.raises(InvalidRequest):
        parse(path)


def test_names_and_times():
    assert parse("tinker://s:train:0/sampler_weights/step-3") == ("s:train:0", "sampler", "step-3")
    check_name("000020"), check_name("a.b_c-d@e=f+g")
    for name in ("", "a/b", ".", "..", "-x", "x" * 129, "a b", "ä", "a\n"):
        with pytest.raises(InvalidRequest):
            check_name(name)
    assert expiry(None, 5.0) is None and expiry(3600, 5.0) == 3605.0
    for ttl in (0, 3599, 10**10):
        with pytest.raises(InvalidRequest):
            expiry(ttl, 0.0)
