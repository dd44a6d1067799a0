"""A stand-in for an OpenAI-compatible server, on a real socket: enough for the client verbs, with faults on demand."""

import http.server
import json
import threading
import time

import pytest


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers every completion with `words`; `pause_s` between them; `refuse` maps a request's number to a status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.words, self.pause_s, self.refuse, self.break_off, self.bodies = ["Hel", "lo", "!"], 0.0, {}, False, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "fake-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            return self.reply(200, {"tokens": [100 + i for i, _ in enumerate(body["prompt"].split())]})
        fake = self.server
        fake.bodies.append({**body, "path": self.path, "key": self.headers.get("authorization")})
        if status := fake.refuse.get(len(fake.bodies)):
            return self.reply(status, {"error": {"message": "no, thank you"}})
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for word in fake.words:
            self.event({"choices": [{"text": word} if "prompt" in body else {"delta": {"content": word}}]})
            time.sleep(fake.pause_s)
        if fake.break_off:
            self.event({"error": {"message": "the engine died"}})
        usage = {"prompt_tokens": len(body.get("prompt", [])), "completion_tokens": len(fake.words)}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, payload):
        self.chunk(b"data: " + json.dumps(payload).encode() + b"\n\n")

    def chunk(self, raw):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.wfile.flush()

    def reply(self, status, payload):
        raw = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def fake_server():
    """A running FakeServer."""
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_client_environment(monkeypatch):
    """The developer's own OPENAI_* must not leak into what the verbs talk to."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "TANDEM_URL", "TANDEM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
