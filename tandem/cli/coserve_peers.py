"""What a user would run instead of Tandem: vLLM's CPU build as a server, a PEFT loop beside it, each a process of its
own in an environment of its own. Started, measured and ended here; what the figures mean is in `coserve_figures`.

Times are seconds on the clock of time.perf_counter.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from typing import IO

import httpx

from tandem.cli import coserve_cells, coserve_figures, open_loop
from tandem.cli.coserve_cells import Job, Span
from tandem.cli.latency import Trial
from tandem.cli.workload import Arrival
from tandem.errors import ConfigError, TandemError

# Runs in the peers' environment, where there is no Tandem. One line of JSON per pass: tokens, seconds, peak bytes.
PEFT_LOOP = """
import json, resource, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

path, dtype, rank, batch, length, passes_per_step = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
if "--checkpointing" in sys.argv:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
while True:
    for _ in range(passes_per_step):
        start = time.perf_counter()
        ids = torch.randint(10, model.config.vocab_size, (batch, length))
        (model(input_ids=ids, labels=ids).loss / passes_per_step).backward()
        if _ == passes_per_step - 1:
            optimizer.step()
            optimizer.zero_grad()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens": batch * length, "seconds": time.perf_counter() - start, "peak": peak}), flush=True)
"""
START_S = 600.0
STOP_GRACE_S = 10.0
TAIL_LINES = 15


def peft_command(
    python: str, model: str, dtype: str, job: Job, *, whole_batch: bool = False, checkpointing: bool = False
) -> list[str]:
    """The PEFT loop on a job. One sequence a pass, which is fastest there, unless the whole batch is to go at once."""
    batch, passes = (job.batch, 1) if whole_batch else (1, job.batch)
    command = [python, "-c", PEFT_LOOP, model, dtype, str(job.rank), str(batch), str(job.length), str(passes)]
    return [*command, "--checkpointing"] if checkpointing else command


def vllm_command(python: str, model: str, dtype: str, port: int, longest: int) -> list[str]:
    """vLLM's server with room for sequences of `longest` tokens; prompts are random, so no prefix is worth keeping."""
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(longest), "--max-num-seqs", "64",
        "--no-enable-prefix-caching",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """This process's, without what would show another environment's Python this one's packages."""
    mine = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    return {"VLLM_CPU_KVCACHE_SPACE": "3", "HF_HUB_OFFLINE": "1"} | mine


@contextlib.asynccontextmanager
async def running(command: Sequence[str], nice: bool = False) -> AsyncIterator[tuple[asyncio.subprocess.Process, IO]]:
    """A process in a group of its own, which is ended with all its children when the block ends; its standard error
    goes to the file. ConfigError where it cannot be started."""
    with tempfile.TemporaryFile() as log:
        try:
            process = await asyncio.create_subprocess_exec(
                *(("nice", "-n", "19") if nice else ()), *command, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=log, env=environment(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"cannot run {command[0]}: {error}") from error
        try:
            yield process, log
        finally:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The leader may be gone and its children not: the group is what counts.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_GRACE_S)


def _failed(name: str, log: IO) -> TandemError:
    log.seek(0)
    tail = "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
    return TandemError(f"{name} ended by itself:\n{tail}")


# ------------------------------------------------------------ the PEFT loop


class PeftLoop:
    """A running loop: `readings` of the tokens it has trained, and the `peak` bytes it said it had resident."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO) -> None:
        self.readings: list[tuple[float, int]] = []
        self.peak = 0
        self._process = process
        self._log = log

    async def read(self) -> None:
        """Take in its lines. Raises TandemError when it ends."""
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            if raw.startswith(b"{"):
                said = json.loads(raw)
                trained = said["tokens"] + (self.readings[-1][1] if self.readings else 0)
                self.readings.append((time.perf_counter(), trained))
                self.peak = said["peak"]
        await self._process.wait()
        raise _failed("the PEFT loop", self._log)

    async def passes(self, num: int) -> None:
        """Until it has done so many passes."""
        while len(self.readings) < num:
            await asyncio.sleep(coserve_cells.GLANCE_S)


async def train_alone(command: Sequence[str], seconds: float) -> tuple[float, int]:
    """The PEFT loop by itself: tokens per second over at least `seconds` and two passes, after a first one that does
    not count; and its peak resident bytes. Raises TandemError where it fails."""
    async with running(command) as (process, log):
        loop = PeftLoop(process, log)

        async def watch() -> None:
            await loop.passes(1)
            await asyncio.sleep(seconds)
            await loop.passes(3)

        await _first(watch(), loop.read())
    (start, first), (stop, last) = loop.readings[0], loop.readings[-1]
    return (last - first) / (stop - start), loop.peak


async def _first(*work) -> None:  # noqa: ANN002
    """Until one is done; raises what it raised."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ------------------------------------------------------------ two processes


@contextlib.asynccontextmanager
async def serving(python: str, model: str, dtype: str, longest: int) -> AsyncIterator[httpx.AsyncClient]:
    """vLLM's server, ready; ends with the block. Raises TandemError where it does not start."""
    port = _free_port()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with running(vllm_command(python, model, dtype, port, longest)) as (process, log):
        assert process.stdout is not None
        drain = asyncio.create_task(_discard(process.stdout))
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as http:
                await _until_healthy(http, process, log)
                yield http
        finally:
            drain.cancel()


async def _until_healthy(http: httpx.AsyncClient, process: asyncio.subprocess.Process, log: IO) -> None:
    give_up = time.perf_counter() + START_S
    while time.perf_counter() < give_up:
        if process.returncode is not None:
            raise _failed("vLLM", log)
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/health")).status_code == 200:
                return
        await asyncio.sleep(1.0)
    raise TandemError(f"vLLM was not ready within {START_S:.0f} s")


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def closed_loop(
    http: httpx.AsyncClient, model: str, requests: Sequence[Arrival], streams: int, span: Span,
    train: Sequence[str] | None, nice: bool,
) -> tuple[list[Trial], float]:  # fmt: skip
    """As `coserve_cells.closed_loop`, against a server, with the command `train` running beside it."""
    body = {"model": model, "temperature": 0.0, "ignore_eos": True}
    await open_loop.warm_up(http, "/v1/completions", body, requests[0])
    async with contextlib.AsyncExitStack() as stack:
        loop = reader = None
        if train is not None:
            loop = PeftLoop(*await stack.enter_async_context(running(train, nice)))
            reader = asyncio.create_task(loop.read())
            stack.callback(reader.cancel)
            await _first(loop.passes(1), asyncio.shield(reader))
        begin = time.perf_counter()
        trials: list[Trial] = []
        queue = itertools.cycle(requests)

        async def client() -> None:
            for arrival in queue:
                trials.append(await open_loop.send_at(http, "/v1/completions", body, arrival, 0.0))
                if trials[-1].error:
                    await asyncio.sleep(coserve_cells.RETRY_S)

        clients = [client() for _ in range(streams)]
        await coserve_cells.for_a_while([*clients, reader] if reader else clients, span.total_s)
    start, stop = begin + span.warm_up_s, begin + span.stop_s
    rate = coserve_figures.tokens_per_s(loop.readings, start, stop) if loop else 0.0
    return coserve_cells.within(trials, start, stop), rate
