"""`tandem adapters ...` against a stand-in server; merging for real, on a tiny model."""

import json

import pytest
from fake_finetuning import FakeFineTuning, tar

from tandem.__main__ import main

ADAPTER = {"id": "ft:demo", "name": "ft:demo", "kind": "final", "rank": 16, "created_at": 1_760_000_000,
           "resident": True, "aliases": ["mine"]}  # fmt: skip
ALIAS = {"name": "mine", "target": "ft:demo", "history": ["ft:old"]}
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 70_000}
CONTENT = "GET /v1/adapters/ft:demo:t::x/content"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("TANDEM_SERVER", raising=False)
    with FakeFineTuning({}) as fake:
        yield fake


def adapters(server, *argv):
    return main(["adapters", *argv, "--server", server.url])


def test_ls_lists_the_registry_and_what_is_only_loaded(server, capsys):
    server.answers["GET /v1/adapters"] = {"data": [ADAPTER], "aliases": [ALIAS]}
    cards = [{"id": "demo", "parent": None}, {"id": "ft:demo", "parent": "demo"}, {"id": "sql", "parent": "demo"},
             {"id": "mine", "parent": "demo"}]  # fmt: skip
    server.answers["GET /v1/models"] = {"data": cards}
    assert adapters(server, "ls") == 0
    head, ours, loaded = capsys.readouterr().out.splitlines()
    assert head.split() == ["ADAPTER", "KIND", "RANK", "CREATED", "RESIDENT", "ALIASES"]
    assert [*ours.split()[:3], *ours.split()[-2:]] == ["ft:demo", "final", "16", "yes", "mine"]
    assert loaded.split() == ["sql", "loaded", "yes"]
    assert adapters(server, "ls", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"adapters": [ADAPTER], "aliases": [ALIAS]}


def test_load_sends_an_absolute_path(server, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.answers["POST /v1/adapters"] = ADAPTER
    assert adapters(server, "load", "ft:demo", "here") == 0
    assert server.asked == [("POST /v1/adapters", {"name": "ft:demo", "path": str(tmp_path / "here"), "key": None})]
    assert "rank 16" in capsys.readouterr().out


def test_unload_rm_promote_and_rollback(server, capsys):
    server.answers |= {
        "POST /v1/unload_lora_adapter": "Success",
        "DELETE /v1/adapters/ft:demo:t::x": {"deleted": True},
        "POST /v1/adapters/promote": ALIAS,
        "POST /v1/adapters/rollback": ALIAS | {"history": []},
    }
    assert adapters(server, "unload", "sql") == adapters(server, "rm", "ft:demo:t::x") == 0
    assert adapters(server, "promote", "mine", "ft:demo") == adapters(server, "rollback", "mine") == 0
    assert server.bodies("POST /v1/unload_lora_adapter") == [{"lora_name": "sql", "key": None}]
    assert server.bodies("POST /v1/adapters/promote") == [{"alias": "mine", "target": "ft:demo", "key": None}]
    assert server.bodies("POST /v1/adapters/rollback") == [{"alias": "mine", "key": None}]
    said = capsys.readouterr().out
    assert "mine -> ft:demo; before: ft:old\nmine -> ft:demo\n" in said


def test_export_writes_a_peft_directory(server, tmp_path):
    server.answers[CONTENT] = tar(FILES)
    target = tmp_path / "deep" / "adapter"
    assert adapters(server, "export", "ft:demo:t::x", str(target)) == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == FILES
    assert adapters(server, "export", "ft:demo:t::x", str(target)) == 3  # exists now
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {"error": {"message": "no such adapter"}}), "no such adapter"),
        (tar({"something": b"else"}), "sent no adapter_config.json"),
        (b"this is no tar", "cannot write"),
        (tar({"../escape": b"x", **FILES}), "outside"),
    ],
)
def test_a_bad_export_leaves_nothing(server, tmp_path, capsys, answer, words):
    server.answers[CONTENT] = answer
    assert adapters(server, "export", "ft:demo:t::x", str(tmp_path / "adapter")) == 1
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_merge_of_a_directory_and_of_a_servers_adapter(server, tiny_model, tmp_path, capsys):
    import tiny_adapters
    import tiny_models
    import torch
    from safetensors.torch import load_file

    model = tiny_model("llama")
    adapter = tiny_adapters.build(model, tmp_path / "adapter")
    assert main(["adapters", "merge", str(adapter), "--model", str(model), "--output", str(tmp_path / "one")]) == 0
    assert f"tandem serve {tmp_path / 'one'}" in capsys.readouterr().out
    # A merge is right by tests/model/test_export.py; here: it is of these two.
    expected = tiny_adapters.logprobs(model, adapter, [1, 50, 60])
    with torch.inference_mode():
        found = tiny_models.oracle(tmp_path / "one")(input_ids=torch.tensor([[1, 50, 60]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    # PEFT wrote where the base was loaded from, so --model may be left out.
    names = ("adapter_config.json", "adapter_model.safetensors")
    server.answers[CONTENT] = tar({name: (adapter / name).read_bytes() for name in names})
    assert adapters(server, "merge", "ft:demo:t::x", "--output", str(tmp_path / "two")) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_merge_says_what_is_missing(server, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapters(server, "merge", str(tmp_path), "--output", str(tmp_path / "out")) == 2
    assert adapters(server, "merge", str(tmp_path), "--output", str(tmp_path)) == 3
    assert main(["adapters", "merge", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "give --model" in said and "exists already" in said and "--output" in said
