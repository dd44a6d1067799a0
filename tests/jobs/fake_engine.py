"""An engine that trains by hashing: its weights say exactly which examples, rates and order they were made from."""

import asyncio
import hashlib
import json
import math
import os
from pathlib import Path
from random import Random
from types import SimpleNamespace

from tandem.errors import BudgetError, Cancelled, Conflict, Diverged, ModelError, NotFound, Overloaded
from tandem.work import Adapter, PassReport, PublishReport, RunReport, TokenEvent, TopLogprobs, UpdateReport


class FakeEngine:
    """As EngineClient. Knobs: `delay` seconds a call, `diverge_at` step, `save_error`, `max_runs`, `max_adapters`;
    `answer(request, i)` gives choice i's tokens, `step_s` seconds between two. `open` counts streams."""

    def __init__(self, delay=0.0, max_adapters=8, max_runs=99, longest=4096):
        self.report = SimpleNamespace(hidden_size=512, max_model_len=256, max_num_seqs=32)
        self.stats = SimpleNamespace(tpot_p95_s=0.025, running_adapters=[], waiting_adapters=[])
        self.delay, self.max_adapters, self.max_runs, self.longest = delay, max_adapters, max_runs, longest
        self.diverge_at = self.save_error = None
        self.adapters, self.runs, self.queues, self.calls = {}, {}, {}, []
        self.answer, self.step_s, self.open, self.asked, self.overloads = some_tokens, 0.0, 0, [], 0

    async def check_run(self, lora, longest):
        self.calls.append(("check_run", lora, longest))
        if longest > self.longest:
            raise BudgetError(f"a run with rows of {longest} tokens needs 9 GB, 1 GB is free")
        return longest

    def open_run(self, run_id, lora, *, init_from=None, resume_from=None, priority=0):
        assert run_id not in self.queues
        self.queues[run_id] = asyncio.Queue()
        self.queues[run_id].worker = asyncio.create_task(self._work(run_id))

        def open_it():
            if len(self.runs) >= self.max_runs:
                del self.queues[run_id]
                raise BudgetError("no room for another run")
            start = json.loads(Path(resume_from, "state.json").read_text()) if resume_from else None
            origin = Path(init_from, "adapter_model.safetensors").read_text() if init_from else repr(lora)
            self.runs[run_id] = start or {"step": 0, "weights": origin, "gradient": "", "rank": lora.rank}
            return RunReport(run_id=run_id, num_parameters=1, step=self.runs[run_id]["step"])

        return self._call("open_run", run_id, open_it)

    def forward_backward(self, run_id, examples, *loss):
        return self._call("forward_backward", run_id, lambda: self._pass(run_id, examples, True, *loss))

    def forward(self, run_id, examples, *loss):
        return self._call("forward", run_id, lambda: self._pass(run_id, examples, False, *loss))

    def probe(self, run_id, examples, params, seed):
        def act():
            report = self._pass(run_id, [*examples, seed][:-1], True)
            self._update(run_id, (params, seed))
            return report

        return self._call("probe", run_id, act)

    def _pass(self, run_id, examples, learns, *loss):
        run = self.runs[run_id]
        if learns:
            run["gradient"] += repr(examples) + repr(loss)
        if loss and loss[0] != "dpo":
            tokens = sum(weight > 0 for example in examples for weight in example.weights)
            metrics = {"num_clipped": 0.0, "kl_from_sampler": 0.0}
            return PassReport(loss=-0.001, nll=1.0, num_tokens=tokens, num_correct=0, metrics=metrics)
        if loss:
            pairs, gain = len(examples) // 2, 0.1 * run["step"]
            metrics = dict(num_pairs=pairs, num_preferred=pairs, chosen_reward=gain * pairs, rejected_reward=-gain)
            total = pairs * math.log1p(math.exp(-gain)) * loss[1]["scale"]
            return PassReport(loss=total, nll=1.0, num_tokens=9, num_correct=3, metrics=metrics)
        tokens = sum(weight > 0 for example in examples for weight in example.weights)
        nll = tokens * 3.0 / (1 + 0.1 * run["step"])
        loss = math.fsum(w for example in examples for w in example.weights) * nll / tokens
        return PassReport(loss=loss, nll=nll, num_tokens=tokens, num_correct=min(tokens, run["step"]))

    def optim_step(self, run_id, params):
        return self._call("optim_step", run_id, lambda: self._update(run_id, params))

    def _update(self, run_id, params):
        run = self.runs[run_id]
        if self.diverge_at is not None and run["step"] + 1 >= self.diverge_at:
            raise Diverged("the loss is nan")
        text = run["weights"] + run["gradient"] + repr(params)
        run.update(step=run["step"] + 1, weights=hashlib.sha256(text.encode()).hexdigest(), gradient="")
        return UpdateReport(step=run["step"], grad_norm=1.0)

    def save_run(self, run_id, path):
        def save():
            if self.save_error:
                raise self.save_error
            os.makedirs(path + ".tmp")
            config = {"r": self.runs[run_id]["rank"], "lora_alpha": 32, "target_modules": ["q_proj"]}
            Path(path + ".tmp", "adapter_config.json").write_text(json.dumps(config))
            Path(path + ".tmp", "adapter_model.safetensors").write_text(self.runs[run_id]["weights"])
            Path(path + ".tmp", "state.json").write_text(json.dumps(self.runs[run_id]))
            os.rename(path + ".tmp", path)

        return self._call("save_run", run_id, save)

    def publish(self, run_id, name):
        def publish():
            if name not in self.adapters and len(self.adapters) >= self.max_adapters:
                raise Conflict("full")
            weights = self.runs[run_id]["weights"]
            self.adapters[name] = Adapter(name=name, version=1, rank=1, path=weights)
            return PublishReport(adapter=self.adapters[name])

        return self._call("publish", run_id, publish)

    def retire_adapter(self, name):
        done = asyncio.get_running_loop().create_future()
        self.adapters.pop(name, None)
        done.set_result(None)
        return done

    def submit(self, request):
        if self.overloads:
            self.overloads -= 1
            raise Overloaded("too much")
        self.asked.append(request)
        return FakeStream(self, request)

    def close_run(self, run_id):
        queue = self.queues.pop(run_id, None)
        done = asyncio.get_running_loop().create_future()
        while queue is not None and not queue.empty():
            _settle(queue.get_nowait()[1], error=Cancelled("closed"))
        if queue is not None:
            queue.worker.cancel()
        self.runs.pop(run_id, None)
        done.set_result(None) if queue is not None else done.set_exception(NotFound(run_id))
        return done

    def _call(self, name, run_id, act):
        self.calls.append((name, run_id))
        done = asyncio.get_running_loop().create_future()
        self.queues[run_id].put_nowait((act, done))
        return done

    async def _work(self, run_id):
        queue = self.queues[run_id]
        while self.queues.get(run_id) is queue:
            act, done = await queue.get()
            try:
                await asyncio.sleep(self.delay)
                _settle(done, act())
            except asyncio.CancelledError:
                _settle(done, error=Cancelled("closed"))
                raise
            except Exception as error:
                _settle(done, error=error)

    async def load_adapter(self, name, path):
        if not Path(path, "adapter_config.json").exists():
            raise ModelError(f"{path} is not a PEFT adapter directory")
        if name not in self.adapters and len(self.adapters) >= self.max_adapters:
            raise Conflict("full")
        self.adapters[name] = Adapter(name=name, version=1, rank=1, path=path)

    async def unload_adapter(self, name):
        del self.adapters[name]

    def die(self):
        """What a killed server leaves of it: nothing."""
        for queue in self.queues.values():
            queue.worker.cancel()


def some_tokens(request, i):
    """Answers that differ, the same for the same request."""
    random = Random(f"{request.prompt}/{request.sampling.seed}/{i}")
    return [random.randrange(300, 400) for _ in range(random.randrange(1, request.sampling.max_tokens + 1))]


class FakeStream:
    def __init__(self, engine, request):
        if request.adapter is not None and request.adapter not in engine.adapters:
            raise NotFound(request.adapter)
        self.engine, self.request, self.is_open = engine, request, True
        engine.open += 1

    async def __aiter__(self):
        n, asked = self.request.sampling.n, self.request.sampling.logprobs is not None
        answers = [self.engine.answer(self.request, i) for i in range(n)]
        for at in range(max(map(len, answers))):
            await asyncio.sleep(self.engine.step_s)
            yield [
                TokenEvent(
                    request_id=self.request.request_id, index=i, token_id=tokens[at],
                    logprob=TopLogprobs(-0.5, 1, [], []) if asked else None, stop_token=at == len(tokens) - 1,
                    finish_reason="stop" if at == len(tokens) - 1 else None,
                )
                for i, tokens in enumerate(answers) if at < len(tokens)
            ]  # fmt: skip

    async def aclose(self):
        self.engine.open -= self.is_open
        self.is_open = False


def _settle(future, result=None, error=None):
    if not future.done():
        future.set_exception(error) if error else future.set_result(result)
