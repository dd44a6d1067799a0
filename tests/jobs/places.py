"""A state directory with servers on a fake engine that come, go and are killed, and what tests ask of them."""

import asyncio
import json
from pathlib import Path

from fake_engine import FakeEngine

from tandem.config import JobsConfig
from tandem.jobs.records import JobRequest, TandemExtras
from tandem.jobs.service import Jobs


class Place:
    """A state directory that servers come and go on."""

    def __init__(self, root, tokenizer, database_url=None):
        self.root, self.tokenizer, self.url = root, tokenizer, database_url
        self.engine = FakeEngine()
        self.jobs = None

    async def open(self, resume_every_s=1000.0, model_names=("demo",), **options):
        config = JobsConfig(state_dir=str(self.root), database_url=self.url, organization="acme", **options)
        self.jobs = await Jobs.open(config, self.engine, self.tokenizer, model_names, resume_every_s)
        return self.jobs

    async def kill(self, engine=None):
        """End the server as `kill -9` would: no task gets to say anything more."""
        queue = self.jobs._queue
        tasks = [queue._loop, queue._check, self.jobs._expiry, *queue._tasks.values()]
        self.engine.die()
        self.jobs._db._transaction = None  # nothing more reaches the database
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        await asyncio.to_thread(self.jobs._db.close)
        self.jobs._lock.release()
        self.engine = engine or FakeEngine()

    async def upload(self, content, name="train.jsonl", purpose="fine-tune", **more):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content

        async def chunks():
            for start in range(0, len(data), 1000):
                yield data[start : start + 1000]

        return (await self.jobs.save_file(name, purpose, chunks(), **more)).file_id

    async def create(self, rows=8, model="demo", file_id=None, **more):
        file_id = file_id or await self.upload(facts(rows))
        extras = TandemExtras(**more.pop("tandem", {}))
        settings = {"n_epochs": 2, "batch_size": 2, "seed": 7} | more
        return await self.jobs.create(JobRequest(model=model, training_file=file_id, tandem=extras, **settings))

    async def explore(self, rows=8, **more):
        """A reinforcement job: answers are worth more the more they are like the row's."""
        grader = more.pop("grader", SIMILAR)
        file_id = more.pop("file_id", None) or await self.upload(questions(rows))
        more["tandem"] = {"max_tokens": 4, "group_size": 4} | more.get("tandem", {})
        return await self.create(file_id=file_id, method="reinforcement", grader=grader, **more)

    async def until(self, job_id, *statuses, timeout=20.0):
        async with asyncio.timeout(timeout):
            while (job := await self.jobs.job(job_id)).status not in statuses:
                assert job.status not in ("failed", "succeeded", "cancelled") or job.status in statuses, job
                await asyncio.sleep(0.005)
        return job

    async def until_step(self, job_id, step):
        async with asyncio.timeout(20):
            while (await self.jobs.job(job_id)).step < step:
                await asyncio.sleep(0.002)

    async def messages(self, job_id):
        """Oldest first."""
        return [event.message for event in reversed((await self.jobs.events(job_id, limit=1000))[0])]

    async def weights(self, name):
        return Path((await self.jobs.adapter(name)).path, "adapter_model.safetensors").read_text()


SIMILAR = {
    "type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}  # fmt: skip


def questions(rows):
    return [{"messages": [{"role": "user", "content": f"Fact {i}?"}], "answer": f"It is {i * 7}."} for i in range(rows)]


def facts(rows):
    return [{"prompt": f"Fact {i}?", "completion": f" It is {i * 7}."} for i in range(rows)]
