"""A stand-in for a server's fine-tuning and adapter routes, on a real socket: answers as told, keeps what came."""

import email
import email.policy
import http.server
import io
import json
import tarfile
import threading

JOB = {
    "id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1_760_000_000, "status": "running", "model": "demo",
    "fine_tuned_model": None, "finished_at": None, "trained_tokens": None, "estimated_finish": None, "error": None,
    "training_file": "file-1", "validation_file": None, "result_files": [], "seed": 7,
    "hyperparameters": {"n_epochs": 3, "batch_size": 4}, "tandem": {"rank": 16, "step": 12, "total_steps": 88},
}  # fmt: skip


def event(number, message="", **data):
    """The event `ftevent-number`, of type metrics when there is data."""
    kind = "metrics" if data else "message"
    return {"id": f"ftevent-{number}", "object": "fine_tuning.job.event", "created_at": 1_760_000_000 + number,
            "level": "info", "message": message or f"event {number}", "type": kind, "data": data or None}  # fmt: skip


class FakeFineTuning(http.server.ThreadingHTTPServer):
    """`answers` maps "METHOD /path" to an object, an (status, object) pair, a bytes tar, or a function of the query;
    a list is a script of such answers, the last of which stays. `asked` holds (METHOD /path, body)."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = dict(answers), []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return super().__enter__()

    def __exit__(self, *_):
        self.shutdown()
        super().__exit__(*_)

    def bodies(self, route):
        return [body for asked, body in self.asked if asked == route]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        path, _, query = self.path.partition("?")
        route = f"{self.command} {path}"
        self.server.asked.append((route, self.body() | {"key": self.headers.get("authorization")}))
        answer = self.server.answers.get(route, (404, {"error": {"message": f"no route {route}"}}))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(dict(pair.split("=") for pair in query.split("&") if pair))
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/x-tar" if raw is content else "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_DELETE = answer

    def body(self):
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        kind = self.headers.get("content-type", "")
        if not kind.startswith("multipart/"):
            return json.loads(raw) if raw else {}
        head = f"content-type: {kind}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + raw, policy=email.policy.HTTP).iter_parts()
        return {
            p.get_param("name", header="content-disposition"): (p.get_filename(), p.get_payload(decode=True).decode())
            for p in parts
        }


def page(objects):
    """An answer that lists `objects`, newest first, by `after` and `limit`."""

    def answer(query):
        first = next((i + 1 for i, entry in enumerate(objects) if entry["id"] == query.get("after")), 0)
        stop = first + int(query.get("limit", 20))
        return {"object": "list", "data": objects[first:stop], "has_more": stop < len(objects)}

    return answer


def tar(files):
    """A tar of names and bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
