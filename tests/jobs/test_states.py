"""Any sequence of what users and crashes do: statuses move along the table, nothing is lost, jobs end as told."""

import asyncio
import random
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from places import Place

from tandem.errors import Conflict
from tandem.jobs.records import TRANSITIONS, UNFINISHED

MAX_RUNNING = 2
# Written by the database itself, whoever changes a status by whatever path.
TRIGGER = """create trigger watch after update of status on jobs when old.status <> new.status begin
insert into marks(name, value) values (hex(randomblob(8)), old.status || ' ' || new.status); end"""


class Life(RuleBasedStateMachine):
    tokenizer = None

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.place = Place(Path(tempfile.mkdtemp()), self.tokenizer)
        self.jobs, self.verdicts, self.most = [], {}, 0
        self.do(self.open())
        self.do(self.place.jobs._db.run(lambda c: c.execute(sa.text(TRIGGER))))
        self.file = self.do(self.place.upload([{"prompt": "a", "completion": f"b{i}"} for i in range(4)]))

    def do(self, work):
        return self.loop.run_until_complete(work)

    async def open(self):
        self.place.engine.delay = 0.001
        await self.place.open(resume_every_s=0.005, max_running_jobs=MAX_RUNNING)
        real = self.place.engine.open_run

        def open_run(*args, **kwargs):
            self.most = max(self.most, len(self.place.engine.queues) + 1)
            return real(*args, **kwargs)

        self.place.engine.open_run = open_run

    @rule(priority=st.integers(-1, 1))
    def create(self, priority):
        job = self.do(self.place.create(file_id=self.file, n_epochs=3, tandem={"priority": priority}))
        self.jobs.append(job.job_id)

    @rule(milliseconds=st.integers(1, 20))
    def wait(self, milliseconds):
        self.do(asyncio.sleep(milliseconds / 1000))

    @precondition(lambda self: self.jobs)
    @rule(verb=st.sampled_from(["pause", "resume", "cancel"]), pick=st.randoms(use_true_random=False))
    def tell(self, verb, pick):
        job_id = pick.choice(self.jobs)

        async def tell():
            before = (await self.place.jobs.job(job_id)).status
            try:
                after = (await getattr(self.place.jobs, verb)(job_id)).status
            except Conflict:
                assert verb != "cancel" or (await self.place.jobs.job(job_id)).status not in UNFINISHED
                return
            allowed = {
                "pause": {"paused", "pausing"},
                "resume": {"queued", "validating_files"},
                "cancel": {"cancelled"},
            }
            assert after in allowed[verb], (before, after)
            if verb == "cancel":
                self.verdicts[job_id] = "cancelled"

        self.do(tell())

    @rule(gently=st.booleans())
    def restart(self, gently):
        self.do(self.place.jobs.close() if gently else self.place.kill())
        self.do(self.open())

    @invariant()
    def statuses_moved_along_the_table(self):
        rows = self.do(
            self.place.jobs._db.run(
                lambda c: list(c.execute(sa.text("select value from marks where value like '% %'")))
            )
        )
        moves = {tuple(value.split()) for (value,) in rows}
        assert all(after in TRANSITIONS[before] for before, after in moves), moves
        assert self.most <= MAX_RUNNING

    @invariant()
    def no_job_is_lost_and_verdicts_stay(self):
        found = {job.job_id: job.status for job in self.do(self.place.jobs.jobs(limit=100))[0]}
        assert found.keys() == set(self.jobs)
        assert all(found[job_id] == status for job_id, status in self.verdicts.items())

    def teardown(self):
        async def finish():
            for job_id in self.jobs:
                job = await self.place.until(job_id, *(TRANSITIONS.keys() - {"pausing"}))
                if job.status == "paused":
                    await self.place.jobs.resume(job_id)
            for job_id in self.jobs:
                wanted = self.verdicts.get(job_id, "succeeded")
                job = await self.place.until(job_id, wanted)
                assert wanted == "cancelled" or job.step == job.total_steps == 6
            adapters = {Path(a.path) for a in await self.place.jobs.adapters()}
            await self.place.jobs.close()
            assert set((self.place.root / "adapters").iterdir()) == adapters
            assert list((self.place.root / "resume").iterdir()) == []

        self.do(finish())
        self.loop.close()


@pytest.mark.timeout(240)
def test_any_life(tokenizer):
    Life.tokenizer = tokenizer
    random.seed(0)
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=12, stateful_step_count=15, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
