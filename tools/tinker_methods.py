"""Which public methods of Tinker's SDK work against a running server: tries each, and writes the table in
docs/tinker.md.

    python tools/tinker_methods.py                              # starts a server with the embedded model
    python tools/tinker_methods.py --base-url URL --model DIR   # or asks one that runs

A method counts once: `sample_async` is `sample` again. What is left out of the table's count is said beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "tinker.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
KEY = "tml-methods"
# Of the SDK's own plumbing, no method a user calls.
PLUMBING = {"holder"}


class Bench:
    """A session with a model, a checkpoint of each kind and a sampler, which the checks use."""

    def __init__(self, base_url: str, model: str) -> None:
        import tinker

        self.tinker, self.types, self.base_url, self.model = tinker, tinker.types, base_url, model
        self.service = tinker.ServiceClient(
            project_id="default", base_url=base_url, api_key=KEY, display_name="methods"
        )
        self.rest = tinker.RestClient(base_url=base_url, api_key=KEY)
        self.admin = tinker.AdminClient(base_url=base_url, api_key=KEY)
        self.training = self.service.create_lora_training_client(model, rank=8).result()
        self.prompt = tinker.types.ModelInput.from_ints(self.training.get_tokenizer().encode("The answer"))
        self.step()
        self.state = self.training.save_state("methods").result().path
        self.weights = self.training.save_weights_for_sampler("methods").result().path
        self.external = self.training.save_weights_external("methods").result().path
        self.sampler = self.training.save_weights_and_get_sampling_client().result()
        self.params = tinker.types.SamplingParams(max_tokens=4)

    @property
    def batch(self) -> list[Any]:
        tokens = self.prompt.to_ints()
        datum = self.types.Datum(
            model_input=self.types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]}
        )
        return [datum]

    def step(self) -> Any:
        passed = self.training.forward_backward(self.batch, "cross_entropy")
        self.training.optim_step(self.types.AdamParams(learning_rate=1e-3)).result()
        return passed.result()

    def copy(self) -> str:
        return self.rest.copy_weights(self.state, "default").result()

    def run_of(self, path: str) -> str:
        return path.removeprefix("tinker://").split("/")[0]


def checks(b: Bench) -> dict[str, dict[str, Callable[[], Any]]]:
    """By class and method: something that is true when the method did what it says, and raises when it refuses."""
    import torch

    run = b.training.model_id
    session = b.service.holder.get_session_id()

    def custom(data: Any, logprobs: Any) -> Any:
        return -torch.stack([each.sum() for each in logprobs]).sum(), {}

    def closed() -> bool:
        extra = b.tinker.ServiceClient(base_url=b.base_url, api_key=KEY)
        extra.create_sampling_client(base_model=b.model).result()
        return extra.close("success").result() is None

    def searched() -> bool:
        request = b.types.SessionSearchRequest(display_name="methods")
        return session in [found.session_id for found in b.rest.search_sessions(request).result().sessions]

    def sampled(client: Any) -> bool:
        return 0 < len(client.sample(b.prompt, 1, b.params).result().sequences[0].tokens) <= 4

    def marked(public: bool) -> bool:
        act = b.rest.publish_checkpoint_from_tinker_path if public else b.rest.unpublish_checkpoint_from_tinker_path
        act(b.state).result()
        found = b.rest.list_checkpoints(run).result().checkpoints
        return next(c for c in found if c.tinker_path == b.state).public == public

    def expires() -> bool:
        b.rest.set_checkpoint_ttl_from_tinker_path(b.weights, 7200).result()
        found = b.rest.list_checkpoints(run).result().checkpoints
        return next(c for c in found if c.tinker_path == b.weights).expires_at is not None

    def deleted(by_path: bool) -> bool:
        path = b.copy()
        if by_path:
            b.rest.delete_checkpoint_from_tinker_path(path).result()
        else:
            b.rest.delete_checkpoint(b.run_of(path), path.partition("/weights/")[1].strip("/") + "/methods").result()
        return path not in [c.tinker_path for c in b.rest.list_user_checkpoints().result().checkpoints]

    def traced() -> bool:
        import httpx

        return len(httpx.get(b.rest.export_session_trace(session).result()).json()["traceEvents"]) > 3

    def usage(client: Any) -> bool:
        now = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
        hour = datetime.timedelta(hours=1)
        return len(client.get_billing_usage(now - hour, now + hour).result().data) > 0

    def projected() -> bool:
        return b.rest.assign_session_project(session, "project").result() is None

    service = {
        "create_lora_training_client": lambda: b.service.create_lora_training_client(b.model, rank=4).result().model_id,
        "create_training_client_from_state": lambda: b.service.create_training_client_from_state(b.state).result(),
        "create_training_client_from_state_with_optimizer": lambda: (
            b.service.create_training_client_from_state_with_optimizer(b.state).result()
        ),
        "create_sampling_client": lambda: sampled(b.service.create_sampling_client(model_path=b.weights).result()),
        "create_custom_loss": lambda: b.service.create_custom_loss(
            lambda logprobs, weights: (-(logprobs * weights).sum(), {}), {"logprobs": 1, "weights": 1}
        ).result(),
        "create_rest_client": lambda: b.service.create_rest_client(),
        "copy_weights": lambda: b.service.copy_weights(b.state).result().startswith("tinker://"),
        "get_server_capabilities": lambda: b.service.get_server_capabilities().supported_models,
        "get_console_url": lambda: b.service.get_console_url(),
        "get_telemetry": lambda: b.service.get_telemetry() is not None,
        "close": closed,
    }
    training = {
        "forward": lambda: "loss:sum" in b.training.forward(b.batch, "cross_entropy").result().metrics,
        "forward_backward": lambda: "loss:sum" in b.step().metrics,
        "forward_backward_custom": lambda: b.training.forward_backward_custom(b.batch, custom).result().metrics,
        "optim_step": lambda: b.training.optim_step(b.types.AdamParams(learning_rate=1e-4)).result().metrics,
        "save_state": lambda: b.training.save_state("again").result().path,
        "load_state": lambda: b.training.load_state(b.state).result().path,
        "load_state_with_optimizer": lambda: b.training.load_state_with_optimizer(b.state).result().path,
        "save_weights_for_sampler": lambda: b.training.save_weights_for_sampler("again").result().path,
        "save_weights_external": lambda: b.training.save_weights_external("again").result().path,
        "save_weights_and_get_sampling_client": lambda: sampled(
            b.training.save_weights_and_get_sampling_client().result()
        ),
        "create_sampling_client": lambda: sampled(b.training.create_sampling_client(b.weights).result()),
        "get_info": lambda: b.training.get_info().lora_rank == 8,
        "get_tokenizer": lambda: b.training.get_tokenizer().encode("text"),
        "get_console_url": lambda: b.training.get_console_url(),
        "get_telemetry": lambda: b.training.get_telemetry() is not None,
    }
    sampling = {
        "sample": lambda: sampled(b.sampler),
        "compute_logprobs": lambda: b.sampler.compute_logprobs(b.prompt).result()[1] < 0,
        "create": lambda: sampled(b.tinker.SamplingClient.create(b.service.holder, base_model=b.model).result()),
        "get_base_model": lambda: b.sampler.get_base_model() == b.model,
        "get_tokenizer": lambda: b.sampler.get_tokenizer().encode("text"),
        "get_sampler_handle": lambda: sampled(pickle.loads(pickle.dumps(b.sampler))) and b.sampler.get_sampler_handle(),
        "from_sampler_handle": lambda: sampled(
            b.tinker.SamplingClient.from_sampler_handle(b.sampler.get_sampler_handle(), api_key=KEY)
        ),
        "get_telemetry": lambda: b.sampler.get_telemetry() is not None,
    }
    rest = {
        "get_server_capabilities": lambda: b.rest.get_server_capabilities().result().supported_models,
        "get_training_run": lambda: b.rest.get_training_run(run).result().lora_rank == 8,
        "get_training_run_by_tinker_path": lambda: b.rest.get_training_run_by_tinker_path(b.state).result(),
        "get_weights_info_by_tinker_path": lambda: b.rest.get_weights_info_by_tinker_path(b.state).result().is_lora,
        "list_training_runs": lambda: b.rest.list_training_runs().result().training_runs,
        "list_checkpoints": lambda: b.rest.list_checkpoints(run).result().checkpoints,
        "list_user_checkpoints": lambda: b.rest.list_user_checkpoints().result().checkpoints,
        "get_external_weights_urls": lambda: b.rest.get_external_weights_urls(b.external).result().urls,
        "delete_checkpoint": lambda: deleted(False),
        "delete_checkpoint_from_tinker_path": lambda: deleted(True),
        "copy_weights": lambda: b.copy() != b.state,
        "publish_checkpoint_from_tinker_path": lambda: marked(True),
        "unpublish_checkpoint_from_tinker_path": lambda: marked(False),
        "set_checkpoint_ttl_from_tinker_path": expires,
        "get_session": lambda: run in b.rest.get_session(session).result().training_run_ids,
        "list_sessions": lambda: session in b.rest.list_sessions().result().sessions,
        "search_sessions": searched,
        "assign_session_project": projected,
        "export_session_trace": traced,
        "get_sampler": lambda: b.rest.get_sampler(b.sampler._sampling_session_id).result().base_model == b.model,
        "get_audit_log": lambda: b.rest.get_audit_log().result() is not None,
        "get_billing_usage": lambda: usage(b.rest),
        "get_current_checkpoint_storage_usage": lambda: b.rest.get_current_checkpoint_storage_usage().result().data,
        "whoami": lambda: b.rest.whoami().result().user_urn,
        "get_telemetry": lambda: b.rest.get_telemetry() is not None,
    }
    admin = {
        "get_audit_log": lambda: b.admin.get_audit_log().result() is not None,
        "get_billing_usage": lambda: usage(b.admin),
        "get_current_checkpoint_storage_usage": lambda: b.admin.get_current_checkpoint_storage_usage().result().data,
        "get_telemetry": lambda: b.admin.get_telemetry() is not None,
    }
    future = {
        "result": lambda: b.training.forward(b.batch, "cross_entropy").result(30),
        "future": lambda: b.training.forward(b.batch, "cross_entropy").future().result(30),
    }
    return {
        "ServiceClient": service, "TrainingClient": training, "SamplingClient": sampling, "RestClient": rest,
        "AdminClient": admin, "APIFuture": future,
    }  # fmt: skip


def public_methods(cls: type) -> list[str]:
    """A class's own public methods by name; an async twin is not another one."""
    own = {name for each in cls.__mro__ if each.__module__.startswith("tinker") for name in vars(each)}
    names = [n for n, member in inspect.getmembers(cls, callable) if n in own and not n.startswith("_")]
    return [n for n in names if not (n.endswith("_async") and n.removesuffix("_async") in names) and n not in PLUMBING]


def attempt(check: Callable[[], Any]) -> tuple[bool, str]:
    """Whether a check holds, and what was said where it does not."""
    found: list[tuple[bool, str]] = []

    def run() -> None:
        try:
            found.append((bool(check()), ""))
        except Exception as error:
            found.append((False, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    return found[0] if found else (False, "no answer in 60 s")


def table(base_url: str, model: str) -> tuple[str, int, int]:
    """The Markdown of all methods, how many work, of how many."""
    import tinker

    warnings.simplefilter("ignore")
    tried = checks(Bench(base_url, model))
    lines = ["| class | works | refuses, and what it says |", "|---|---|---|"]
    num_works = num_all = 0
    for name, by_method in tried.items():
        works, refuses = [], []
        # What only the SDK itself calls has no check, and is no method a user would miss.
        for method in [m for m in public_methods(getattr(tinker, name)) if m in by_method]:
            holds, said = attempt(by_method[method])
            print(f"{name}.{method}: {'works' if holds else said or 'wrong'}", flush=True)
            (works if holds else refuses).append(f"`{method}`" + (f" ({said})" if said else ""))
        num_works, num_all = num_works + len(works), num_all + len(works) + len(refuses)
        lines.append(f"| {name} | {', '.join(works)} | {', '.join(refuses) or '-'} |")
    head = f"Of {num_all} public methods of SDK {tinker.__version__}, {num_works} work (an async twin is not counted):"
    return "\n".join([head, "", *lines]), num_works, num_all


@contextlib.contextmanager
def own_server() -> Iterator[tuple[str, str]]:
    """A server with the embedded model, and that model's directory."""
    from tandem.config import DEMO_MODEL

    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "tandem", "serve", "--demo", "--port", "0", "--state-dir", state]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            found = next((m for line in lines if (m := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line))), None)
            if found is None:
                raise SystemExit("the server did not start: run `tandem serve --demo` to see why")
            threading.Thread(target=lambda: list(lines), daemon=True).start()
            time.sleep(0.5)
            yield found.group(1), str(DEMO_MODEL)
        finally:
            process.terminate()
            process.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="a running server (default: one is started)")
    parser.add_argument("--model", help="the model's name there; a directory, so that its tokenizer can be loaded")
    parser.add_argument("--dry-run", action="store_true", help="print the table and leave the document alone")
    options = parser.parse_args()
    os.environ.pop("TINKER_TELEMETRY", None)
    given = contextlib.nullcontext((options.base_url, options.model)) if options.base_url else own_server()
    with given as (base_url, model):
        text, num_works, num_all = table(base_url, model)
    print(text)
    if not options.dry_run:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0 if num_works >= 60 else 1


if __name__ == "__main__":
    sys.exit(main())
