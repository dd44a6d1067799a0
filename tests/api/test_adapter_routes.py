"""The registry of adapters over HTTP, and adapters and aliases as models: around jobs that only exist in memory."""

import asyncio
import io
import tarfile

import httpx
import openai
import pytest
from fake_jobs import FakeJobs

from tandem.api.app import build_app
from tandem.config import JobsConfig, ServerConfig

MESSAGES = [{"role": "user", "content": "Say hello"}]
FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 2000 + b"odd"}
FINE_TUNED = "ft:org/tiny:1:tandem:mine:ab12cd34"


@pytest.fixture
def jobs(tmp_path, engine):
    return FakeJobs(tmp_path, engine)


@pytest.fixture
def root(tmp_path):
    """The --lora-root, with one adapter in it, whose directory also has what only its job needs."""
    folder = tmp_path / "root"
    (folder / "one").mkdir(parents=True)
    for name, content in {**FILES, "trainer.safetensors": b"state"}.items():
        (folder / "one" / name).write_bytes(content)
    return folder


@pytest.fixture
def app(engine, tokenizer, jobs, root, tmp_path):
    state = JobsConfig(state_dir=str(tmp_path / "state"))
    return build_app(engine, tokenizer, ServerConfig(), lora_root=str(root), jobs=jobs, jobs_config=state)


@pytest.fixture
async def http(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def ok(call):
    response = await call
    assert response.status_code == 200, response.text
    return response.json()


async def refused(call, status, words=""):
    response = await call
    error = response.json()["error"]
    assert response.status_code == status and words in error["message"], error
    return error


@pytest.fixture
async def two(http):
    for name in (FINE_TUNED, "team/second"):
        await ok(http.post("/v1/adapters", json={"name": name, "path": "one"}))


async def test_import_list_delete(http, two, jobs, engine):
    listed = await ok(http.get("/v1/adapters"))
    assert [a["id"] for a in listed["data"]] == [FINE_TUNED, "team/second"] and listed["has_more"] is False
    assert listed["data"][0] == {
        "id": FINE_TUNED, "object": "adapter", "name": FINE_TUNED, "path": jobs.kept["adapter"][FINE_TUNED].path,
        "base_model": "org/tiny:1", "created_at": 400, "rank": 8, "job_id": None, "kind": "imported",
        "resident": False, "aliases": [],
    }  # fmt: skip
    await refused(http.post("/v1/adapters", json={"name": FINE_TUNED, "path": "one"}), 409)
    await ok(http.post("/v1/chat/completions", json={"model": "team/second", "messages": MESSAGES}))
    assert [a["resident"] for a in (await ok(http.get("/v1/adapters")))["data"]] == [False, True]
    assert await ok(http.delete("/v1/adapters/team/second")) == {
        "id": "team/second", "object": "adapter", "deleted": True,
    }  # fmt: skip
    assert engine.adapters == {} and list(jobs.kept["adapter"]) == [FINE_TUNED]
    await refused(http.delete("/v1/adapters/team/second"), 404)
    await refused(http.post("/v1/chat/completions", json={"model": "team/second", "messages": MESSAGES}), 404)


@pytest.mark.parametrize("path", ["..", "/etc", "missing", "one/../..", "x" * 4000])
async def test_imports_stay_inside_the_root(http, path):
    assert (await refused(http.post("/v1/adapters", json={"name": "a", "path": path}), 400))["param"] == "path"


async def test_unknown_fields_are_refused(http, two):
    bodies = {
        "": {"name": "a", "path": "one", "force": True},
        "/promote": {"alias": "a", "targt": FINE_TUNED},
        "/rollback": {"alias": "a", "steps": 2},
        "/export": {"name": FINE_TUNED, "path": "x", "overwrite": True},
    }
    for route, body in bodies.items():
        await refused(http.post("/v1/adapters" + route, json=body), 400, "unknown field")
    await refused(http.post("/v1/adapters", json={"name": "a\nb", "path": "one"}), 400)


async def test_promote_and_rollback(http, two, engine):
    promote = lambda target: http.post("/v1/adapters/promote", json={"alias": "my-assistant", "target": target})  # noqa: E731
    rollback = lambda: http.post("/v1/adapters/rollback", json={"alias": "my-assistant"})  # noqa: E731
    await refused(rollback(), 404)
    await refused(promote("nothing"), 404)
    first = await ok(promote(FINE_TUNED))
    assert first == {"object": "adapter.alias", "name": "my-assistant", "target": FINE_TUNED, "history": []}
    await refused(rollback(), 409)
    ask = {"model": "my-assistant", "messages": MESSAGES}
    reply = await ok(http.post("/v1/chat/completions", json=ask))
    assert reply["model"] == "my-assistant" and engine.requests[-1].adapter == FINE_TUNED
    assert (await ok(promote("team/second")))["history"] == [FINE_TUNED]
    await ok(http.post("/v1/completions", json={"model": "my-assistant", "prompt": "x"}))
    assert engine.requests[-1].adapter == "team/second"
    listed = await ok(http.get("/v1/adapters"))
    assert [a["aliases"] for a in listed["data"]] == [[], ["my-assistant"]]
    assert listed["aliases"][0]["target"] == "team/second"
    assert (await ok(rollback()))["target"] == FINE_TUNED
    await ok(http.post("/v1/completions", json={"model": "my-assistant", "prompt": "x"}))
    assert engine.requests[-1].adapter == FINE_TUNED
    await refused(http.delete(f"/v1/models/{FINE_TUNED}"), 409, "alias")
    await ok(http.delete("/v1/adapters/my-assistant"))
    await ok(http.delete(f"/v1/models/{FINE_TUNED}"))
    await refused(http.post("/v1/chat/completions", json=ask), 404)


async def test_adapters_are_loaded_when_they_are_asked_for(http, two, engine, jobs):
    for _ in range(3):
        await ok(http.post("/v1/completions", json={"model": FINE_TUNED, "prompt": "x"}))
    assert jobs.loads == [FINE_TUNED] and engine.adapters[FINE_TUNED].path == jobs.kept["adapter"][FINE_TUNED].path
    # Looking at a model, or counting its tokens, loads nothing.
    assert (await ok(http.get("/v1/models/team/second")))["parent"] == "org/tiny:1"
    await ok(http.post("/tokenize", json={"model": "team/second", "prompt": "x"}))
    assert jobs.loads == [FINE_TUNED] and "team/second" not in engine.adapters
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        error = await refused(http.post(path, json={**body, "model": "nothing"}), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
    await ok(http.post("/v1/completions", json={"model": "org/tiny:1", "prompt": "x"}))
    assert engine.requests[-1].adapter is None


async def test_what_is_loaded_by_hand_and_the_registry_keep_their_names_apart(http, two, jobs):
    load = lambda name: http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "one"})  # noqa: E731
    await ok(http.post("/v1/adapters/promote", json={"alias": "mine", "target": FINE_TUNED}))
    for name in (FINE_TUNED, "mine", "org/tiny:1"):
        await refused(load(name), 409)
    assert (await load("by-hand")).status_code == 200
    await refused(http.post("/v1/adapters", json={"name": "by-hand", "path": "one"}), 409)
    await ok(http.post("/v1/completions", json={"model": "by-hand", "prompt": "x"}))
    await ok(http.delete("/v1/models/by-hand"))
    await refused(http.delete("/v1/models/by-hand"), 404)
    await refused(http.delete("/v1/models/org/tiny:1"), 400, "base model")


def test_the_sdk_lists_and_deletes_models(app, serve, engine, root, jobs):
    url = serve(app).url
    for name in (FINE_TUNED, "team/second"):
        httpx.post(url + "/v1/adapters", json={"name": name, "path": "one"}).raise_for_status()
    httpx.post(url + "/v1/adapters/promote", json={"alias": "mine", "target": FINE_TUNED}).raise_for_status()
    httpx.post(url + "/v1/load_lora_adapter", json={"lora_name": "by-hand", "lora_path": "one"}).raise_for_status()
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=20) as client:
        assert [m.id for m in client.models.list()] == ["org/tiny:1", FINE_TUNED, "team/second", "mine", "by-hand"]
        card = client.models.retrieve(FINE_TUNED)
        path = jobs.kept["adapter"][FINE_TUNED].path
        assert (card.parent, card.created, card.root) == ("org/tiny:1", 400, path)
        assert client.models.retrieve("mine").root == FINE_TUNED
        assert client.chat.completions.create(model=FINE_TUNED, messages=MESSAGES).model == FINE_TUNED
        assert client.models.delete("mine").deleted and client.models.delete(FINE_TUNED).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(FINE_TUNED)


# ---- export


def members(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


async def test_content_is_a_tar_of_the_peft_directory(http, two):
    await ok(http.post("/v1/adapters/promote", json={"alias": "mine", "target": FINE_TUNED}))
    for name in (FINE_TUNED, "team/second", "mine"):
        response = await http.get(f"/v1/adapters/{name}/content")
        assert response.headers["content-type"] == "application/x-tar" and members(response.content) == FILES
        assert int(response.headers["content-length"]) == len(response.content)
    await refused(http.get("/v1/adapters/nothing/content"), 404)


async def test_an_adapter_whose_files_are_gone(http, two, jobs, root, tmp_path):
    (tmp_path / jobs.kept["adapter"][FINE_TUNED].path / "adapter_model.safetensors").unlink()
    await refused(http.get(f"/v1/adapters/{FINE_TUNED}/content"), 404, "gone")
    await refused(http.post("/v1/adapters/export", json={"name": FINE_TUNED, "path": "x"}), 404, "gone")
    assert sorted(path.name for path in root.iterdir()) == ["one"]


async def test_export_to_a_directory_of_the_server(http, two, root, tmp_path):
    export = lambda path: http.post("/v1/adapters/export", json={"name": "team/second", "path": str(path)})  # noqa: E731
    state = tmp_path / "state" / "exports"
    for path, target in (("deep/er", root / "deep" / "er"), (state / "x", state / "x"), (root / "y", root / "y")):
        assert (await ok(export(path)))["path"] == str(target)
        assert {file.name: file.read_bytes() for file in target.iterdir()} == FILES
        await refused(export(path), 409, "exists")
    assert not [path for path in root.rglob(".export-*")]
    for path in ("..", ".", str(tmp_path / "state" / "files" / "x"), "/tmp/elsewhere", "a/../../x", str(root)):
        assert (await refused(export(path), 400, "inside"))["param"] == "path"
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    await refused(export("link/x"), 400, "inside")
    (root / "file").write_text("x")
    await refused(export("file/x"), 400, "cannot write")
    await refused(export("n" * 4000), 400)


async def test_export_without_a_lora_root_stays_in_the_state_directory(engine, tokenizer, jobs, http, two, tmp_path):
    app = build_app(engine, tokenizer, ServerConfig(), jobs=jobs, jobs_config=JobsConfig(state_dir=str(tmp_path / "s")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as other:
        export = lambda path: other.post("/v1/adapters/export", json={"name": FINE_TUNED, "path": path})  # noqa: E731
        assert (await ok(export("mine")))["path"] == str(tmp_path / "s" / "exports" / "mine")
        await refused(export(str(tmp_path / "elsewhere")), 400, "inside")


async def test_two_exports_to_one_place(http, two, root):
    export = lambda: http.post("/v1/adapters/export", json={"name": FINE_TUNED, "path": "same"})  # noqa: E731
    replies = await asyncio.gather(*(export() for _ in range(4)))
    assert sorted(reply.status_code for reply in replies)[0] == 200
    assert {reply.status_code for reply in replies} <= {200, 409}
    assert {file.name: file.read_bytes() for file in (root / "same").iterdir()} == FILES
