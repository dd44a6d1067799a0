"""`tandem chat` and `tandem complete` against a stand-in server."""

import io

import pytest

from tandem.__main__ import main


def chat(fake_server, *argv):
    return main(["chat", "--url", fake_server.url + "/v1", *argv])


def test_quick_question(fake_server, capsys):
    assert chat(fake_server, "-q", "Hi", "--system-prompt", "Be brief", "--max-tokens", "7", "--temperature", "0") == 0
    assert capsys.readouterr().out == "Hello!\n"
    (body,) = fake_server.bodies
    assert body["path"] == "/v1/chat/completions" and body["model"] == "fake-model" and body["stream"] is True
    assert body["messages"] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert (body["max_tokens"], body["temperature"]) == (7, 0.0)


def test_options_nobody_gave_are_not_sent(fake_server):
    chat(fake_server, "-q", "Hi", "--model-name", "other")
    (body,) = fake_server.bodies
    assert body["model"] == "other" and not {"max_tokens", "temperature"} & body.keys()


def test_a_conversation_remembers_until_reset(fake_server, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\n/what\nthree\n/exit\nnever\n"))
    assert chat(fake_server) == 0
    roles = [[(m["role"], m["content"]) for m in body["messages"]] for body in fake_server.bodies]
    assert roles == [
        [("user", "one")],
        [("user", "one"), ("assistant", "Hello!"), ("user", "two")],
        [("user", "three")],
    ]
    assert "unknown command /what" in capsys.readouterr().out


def test_an_error_does_not_end_the_conversation_nor_stay_in_it(fake_server, capsys, monkeypatch):
    fake_server.refuse = {1: 429}
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert chat(fake_server) == 0
    assert "the server answered 429: no, thank you" in capsys.readouterr().err
    assert fake_server.bodies[1]["messages"] == [{"role": "user", "content": "two"}]


def test_a_stream_that_breaks_off_is_an_error(fake_server, capsys):
    fake_server.break_off = True
    assert chat(fake_server, "-q", "Hi") == 1
    said = capsys.readouterr()
    assert said.out.startswith("Hello!") and "the engine died" in said.err


@pytest.mark.parametrize("verb", [["chat", "-q", "x"], ["complete", "x"], ["bench", "serve"]])
def test_nobody_answers(capsys, verb, monkeypatch):
    monkeypatch.setattr("tandem.cli.client.DEFAULT_SERVER", "http://127.0.0.1:1")
    flag = "--base-url" if verb[0] == "bench" else "--url"
    assert main([*verb, flag, "http://127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "no server answers" in said and "tandem serve" in said and said.count("\n") == 1


def test_complete_takes_text_three_ways(fake_server, capsys, monkeypatch):
    url = ["--url", fake_server.url + "/v1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    for argv in (["an argument"], ["-q", "a flag"], []):
        assert main(["complete", *argv, *url]) == 0
        assert capsys.readouterr().out == "Hello!\n"
    assert [body["prompt"] for body in fake_server.bodies] == ["an argument", "a flag", "from stdin"]


def test_the_environment_lines_that_serve_prints_are_honoured(fake_server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", fake_server.url + "/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert main(["chat", "-q", "Hi"]) == 0
    assert fake_server.bodies[0]["key"] == "Bearer secret"
