"""A real engine on a tiny model behind Tinker's routes, several apps on one event loop in a thread."""

import asyncio
import sys
import threading
from pathlib import Path

import uvicorn

from tandem.api.app import build_app
from tandem.config import CacheConfig, EngineConfig, JobsConfig, ModelConfig, SchedulerConfig, ServerConfig
from tandem.engine.client import EngineClient
from tandem.jobs.service import Jobs
from tandem.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models  # noqa: E402


class TinkerServer:
    """`start(...)` opens one more app, with sessions of its own, on the same engine and state directory."""

    def __init__(self, directory):
        self.model = str(tiny_models.build("llama", directory / "model"))
        self.state = directory / "state"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.servers = []

    def call(self, coroutine, timeout_s=100):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    async def _open(self):
        config = EngineConfig(
            model=ModelConfig(model=self.model, dtype="float32", num_threads=1),
            cache=CacheConfig(num_blocks=256),
            scheduler=SchedulerConfig(max_num_seqs=16),
        )
        self.jobs_config = JobsConfig(state_dir=str(self.state))
        self.tokenizer = Tokenizer.load(self.model)
        self.engine = await EngineClient.start(config)
        self.jobs = await Jobs.open(self.jobs_config, self.engine, self.tokenizer, [self.model])

    def start(self, patience=None, **server):
        return self.call(self._start(patience, ServerConfig(**server)))

    async def _start(self, patience, config):
        app = build_app(
            self.engine, self.tokenizer, config, jobs=self.jobs, jobs_config=self.jobs_config, patience=patience
        )
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.servers.append((server, task))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    async def _close(self):
        for server, task in self.servers:
            server.force_exit = server.should_exit = True
            await task
        await self.jobs.close()
        await self.engine.close()

    def __enter__(self):
        self.thread.start()
        self.call(self._open())
        return self

    def __exit__(self, *_):
        self.call(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
