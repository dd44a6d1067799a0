"""`Jobs` in memory: keeps what it is given, trains nothing. For tests of what stands in front of the real one."""

import shutil

import msgspec

from tandem.config import JobsConfig
from tandem.errors import Conflict, InvalidRequest, NotFound
from tandem.finetune import graders
from tandem.jobs.grading import Grade
from tandem.jobs.records import AdapterRecord, Alias, Event, File, Job, new_id

AUTO = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")


class FakeJobs:
    """`kept` by kind and id, oldest first; `requests` are those of create; `loads` the names that resident() got."""

    def __init__(self, folder, engine, **config):
        self.config, self.engine, self.folder = JobsConfig(state_dir=str(folder / "state"), **config), engine, folder
        self.root = folder / "state"
        self.kept = {"file": {}, "job": {}, "adapter": {}, "alias": {}}
        self.events_of, self.checkpoints_of, self.requests, self.lives, self.loads = {}, {}, [], [], []

    def _get(self, kind, name):
        if name not in self.kept[kind]:
            raise NotFound(f"there is no {kind} {name}", kind)
        return self.kept[kind][name]

    def _page(self, items, ids, after, limit):
        if after is not None and after not in ids:
            raise InvalidRequest(f"there is no {after}", "after")
        start = 0 if after is None else ids.index(after) + 1
        return items[start : start + limit], len(items) > start + limit

    # ---- files

    async def save_file(self, filename, purpose, chunks, expires_after_s):
        data = b"".join([chunk async for chunk in chunks])
        self.lives.append(expires_after_s)
        expires = None if expires_after_s is None else 100 + expires_after_s
        file = File(file_id=new_id("file-"), filename=filename, purpose=purpose, bytes=len(data), created_at=100,
                    expires_at=expires)  # fmt: skip
        (self.folder / file.file_id).write_bytes(data)
        self.kept["file"][file.file_id] = file
        return file

    async def files(self, purpose, after, limit, order):
        found = [f for f in self.kept["file"].values() if purpose in (None, f.purpose)][:: 1 if order == "asc" else -1]
        return self._page(found, [f.file_id for f in found], after, limit)

    async def file(self, file_id):
        return self._get("file", file_id)

    async def file_path(self, file_id):
        return self.folder / self._get("file", file_id).file_id

    async def delete_file(self, file_id):
        del self.kept["file"][self._get("file", file_id).file_id]

    # ---- jobs

    async def create(self, request):
        self._get("file", request.training_file)
        self.requests.append(request)
        same = {name: getattr(request, name) for name in "model training_file validation_file suffix metadata".split()}
        job = Job(job_id=new_id("ftjob-"), created_at=200, status="queued", base_model="org/tiny:1",
                  seed=request.seed or 7, hyperparameters=AUTO, tandem=request.tandem, **same)  # fmt: skip
        self.kept["job"][job.job_id] = job
        return job

    async def job(self, job_id):
        return self._get("job", job_id)

    async def jobs(self, after, limit, metadata):
        held = list(self.kept["job"].values())[::-1]
        found = [job for job in held if (metadata or {}).items() <= (job.metadata or {}).items()]
        return self._page(found, [job.job_id for job in found], after, limit)

    async def _become(self, job_id, status):
        job = self.kept["job"][job_id] = msgspec.structs.replace(self._get("job", job_id), status=status)
        return job

    async def cancel(self, job_id):
        if self._get("job", job_id).status == "cancelled":
            raise Conflict("it is cancelled already")
        return await self._become(job_id, "cancelled")

    async def pause(self, job_id):
        return await self._become(job_id, "paused")

    async def resume(self, job_id):
        return await self._become(job_id, "queued")

    def say(self, job_id, message, **more):
        event = Event(event_id=new_id("ftevent-"), job_id=job_id, created_at=300, level="info", message=message, **more)
        self.events_of.setdefault(job_id, []).insert(0, event)

    async def events(self, job_id, after, limit):
        events = self.events_of.get(self._get("job", job_id).job_id, [])
        return self._page(events, [event.event_id for event in events], after, limit)

    async def checkpoints(self, job_id, after, limit):
        found = self.checkpoints_of.get(self._get("job", job_id).job_id, [])
        return self._page(found, [checkpoint.checkpoint_id for checkpoint in found], after, limit)

    # ---- graders

    def grader(self, raw):
        return graders.parse(raw, "grader")

    async def grade(self, grader, item, text):
        graders.check_item(grader, item)
        return Grade(0.5, {"half": 0.5})

    # ---- adapters

    async def adapters(self):
        return list(self.kept["adapter"].values())

    async def aliases(self):
        return list(self.kept["alias"].values())

    async def adapter(self, name):
        alias = self.kept["alias"].get(name)
        return self._get("adapter", alias.target if alias else name)

    async def import_adapter(self, name, path):
        if name in self.kept["adapter"] or name in self.kept["alias"] or name in self.engine.adapters:
            raise Conflict(f"{name} is taken", "name")
        copy = shutil.copytree(path, self.folder / new_id("adapter-"))
        record = AdapterRecord(name=name, path=str(copy), base_model="org/tiny:1", created_at=400, rank=8,
                               kind="imported")  # fmt: skip
        self.kept["adapter"][name] = record
        return record

    async def delete_adapter(self, name):
        if self.kept["alias"].pop(name, None):
            return
        if any(alias.target == name for alias in self.kept["alias"].values()):
            raise Conflict(f"an alias stands for {name}", "name")
        del self.kept["adapter"][self._get("adapter", name).name]
        if name in self.engine.adapters:
            await self.engine.unload_adapter(name)

    async def promote(self, alias, target):
        self._get("adapter", target)
        before = self.kept["alias"].get(alias)
        history = [*before.history, before.target] if before else []
        self.kept["alias"][alias] = Alias(name=alias, target=target, history=history)
        return self.kept["alias"][alias]

    async def rollback(self, alias):
        before = self._get("alias", alias)
        if not before.history:
            raise Conflict("nothing to go back to", "alias")
        self.kept["alias"][alias] = Alias(name=alias, target=before.history[-1], history=before.history[:-1])
        return self.kept["alias"][alias]

    def resident_now(self, name):
        alias = self.kept["alias"].get(name)
        name = alias.target if alias else name
        return name if name in self.engine.adapters else None

    async def resident(self, name):
        self.loads.append(name)
        try:
            record = await self.adapter(name)
        except NotFound:
            return None
        await self.engine.load_adapter(record.name, record.path)
        return record.name
