"""A running reinforcement job: sample, grade, learn, publish; again.

Every answer is of the version that learns from it. A group's gradient is computed as soon as its last answer is graded,
while others are still being sampled. What steps are made of is in `rollouts.py`; saving, pausing and ending are every
run's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import Conflict, InvalidRequest
from tandem.finetune import graders
from tandem.jobs import results, rollouts
from tandem.jobs.adapters import PRIVATE
from tandem.jobs.grading import GraderFailed
from tandem.jobs.recipe import num_answers
from tandem.jobs.records import Job
from tandem.jobs.rollouts import Explorer, Group
from tandem.jobs.runner import Run, Sent, is_due
from tandem.jobs.shop import Failure, Loaded, Shop
from tandem.work import PassReport

Groups = list[Group]


@dataclass(frozen=True)
class Explored(Sent):
    """An optimiser step, the answers that it learns from, and those that were asked for after it."""

    groups: Groups = field(default_factory=list)
    evaluated: Groups = field(default_factory=list)
    published: asyncio.Future[Any] | None = None


class ReinforcementRun(Run):
    """One reinforcement job. `_rollouts` is what samples the answers of step `_next` and learns from them, `_passes`
    are the gradients that it has asked for."""

    def __init__(self, job: Job, loaded: Loaded, shop: Shop) -> None:
        super().__init__(job, loaded, shop)
        assert job.grader is not None and job.tandem.max_tokens is not None
        self._adapter = PRIVATE + job.job_id
        parts = shop.engine.report.max_num_seqs // 2 // rollouts.TOGETHER  # the other half is for users
        self._explorer = Explorer(
            shop.engine, shop.tokenizer, shop.grading, graders.parse(job.grader), self._adapter, job.tandem.max_tokens,
            asyncio.Semaphore(max(1, parts)),
        )  # fmt: skip
        self._rollouts: asyncio.Task[Groups] | None = None
        self._passes: list[asyncio.Future[PassReport]] = []
        self._num_tokens = 0  # in those
        # The same for all tokens of all steps, so that a group need not wait for the others.
        self._weight = 1.0 / (self._recipe.batch_size * num_answers(job) * job.tandem.max_tokens)
        self._is_published = False
        self._has_warned = False

    # ------------------------------------------------------------ begin and end

    async def _open(self) -> None:
        try:
            self._shop.grading.check(self._explorer.grader)  # the server may have other options than when it was made
        except InvalidRequest as error:
            raise Failure("invalid_grader", error.message, error.param) from error
        await super()._open()
        if self._is_open:
            await self._renewed(self._publish_version())

    def _has_step(self, step: int, wanted: int) -> bool:
        return step <= wanted  # steps from which nothing could be learnt made no update

    async def _suspend(self) -> None:
        await self._drop_rollouts()
        await super()._suspend()

    async def _abandon(self) -> None:
        await self._drop_rollouts()
        await super()._abandon()
        self._retire_version()

    async def _drop_rollouts(self) -> None:
        task, self._rollouts = self._rollouts, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # ------------------------------------------------------------ steps

    async def _after(self, sent: Sent) -> None:
        assert isinstance(sent, Explored)
        await self._arrival(sent)
        if sent.published is not None:
            await self._renewed(sent.published)
        if self._next < self._recipe.total_steps and self._stop is None:
            self._rollouts = await self._begun()
        await self._evaluate(sent)
        if sent.step == self._recipe.total_steps:
            self._retire_version()  # the model that was made may need its room
        await self._record(sent)
        await self._fill()

    async def _fill(self) -> None:
        """Wait until the next step's answers are there, and send what makes a step of their gradients."""
        if self._stop is not None or self._next == self._recipe.total_steps:
            return
        self._rollouts = self._rollouts or await self._begun()
        if not await self._unless_stopped(self._rollouts):
            return
        task, self._rollouts = self._rollouts, None
        self._sent.append(self._step(self._next, await self._graded(task)))
        self._next += 1

    async def _begun(self) -> asyncio.Task[Groups]:
        index, self._passes, self._num_tokens = self._next, [], 0
        if not self._recipe.is_ready(index):
            await asyncio.to_thread(self._recipe.make_ready, index)
        numbers, seed = self._recipe.batch(index), f"{self.job.seed}/{index}"
        return asyncio.create_task(
            self._explorer.groups(self._train, numbers, num_answers(self.job), seed, self._learn_group)
        )

    def _learn_group(self, group: Group) -> None:
        examples, loss = rollouts.examples(group, self._weight), self.job.tandem.loss
        if examples and self._stop is None:
            assert loss is not None
            self._passes.append(self._track(self._engine.forward_backward(self.job.job_id, examples, loss)))
            self._num_tokens += sum(len(example.tokens) for example in examples)

    def _step(self, index: int, groups: Groups) -> Explored:
        """The update from the gradients there are, if any, and the version that it makes."""
        rate, updated, published = self._recipe.learning_rate(index), None, None
        if self._passes:
            updated = self._track(self._engine.optim_step(self.job.job_id, self._params(rate)))
            published = self._publish_version()
        return self._with_saves(
            Explored(
                index + 1, self._num_tokens, rate, self._passes, updated, groups=groups, published=published
            )  # fmt: skip
        )

    async def _evaluate(self, sent: Explored) -> None:
        """Sample answers to the validation file with the version that the step has made, where that is due."""
        is_last = sent.step == self._recipe.total_steps
        if self._valid is None or not (is_last or is_due(sent.step, int(self.job.hyperparameters["eval_interval"]))):
            return
        count, rows = int(self.job.hyperparameters["eval_samples"]), range(self._valid.num_groups)
        task = asyncio.create_task(self._explorer.groups(self._valid, rows, count, f"{self.job.seed}/valid"))
        try:
            if await self._unless_stopped(task):
                sent.evaluated.extend(await self._graded(task))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _graded(self, task: asyncio.Task[Groups]) -> Groups:
        try:
            groups = await task
        except GraderFailed as error:
            raise Failure("grader_failed", error.message, error.param) from error
        grades = [grade for group in groups for grade in group.grades]
        faults = [name for grade in grades for name, kind in grade.faults.items() if kind == "model"]
        if faults and all("model" in grade.faults.values() for grade in grades):
            raise Failure(
                "grader_failed", f"The judge {faults[0]} gave no number within its range for any answer of a step: "
                "ask it to reply with a number alone", graders.PARAM,
            )  # fmt: skip
        if faults and not self._has_warned:
            self._has_warned = True
            await self._say(f"{len(faults)} replies of the judge had no number within its range: lowest score", "warn")
        return groups

    async def _unless_stopped(self, task: asyncio.Task[Any]) -> bool:
        """Wait for a task; False where the run is to stop before."""
        stopping = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        return self._stop is None

    def _metrics(self, sent: Sent, validated: list[PassReport]) -> dict[str, Any]:
        assert isinstance(sent, Explored)
        learnt = [learnt.result() for learnt in sent.learnt]
        found = results.rewards("train", sent.groups) | results.policy(learnt, self._weight)
        return self._line(sent, found | (results.rewards("valid", sent.evaluated) if sent.evaluated else {}))

    # ------------------------------------------------------------ versions

    def _publish_version(self) -> asyncio.Future[Any]:
        self._is_published = True
        return self._track(self._engine.publish(self.job.job_id, self._adapter))

    def _retire_version(self) -> None:
        if self._is_published:
            self._is_published = False
            self._track(self._engine.retire_adapter(self._adapter))

    async def _renewed(self, published: asyncio.Future[Any]) -> None:
        """Wait until the newest version can be sampled from, making room for it where the engine is full."""
        while True:
            try:
                await published
                return
            except Conflict as error:
                if not await self._shop.adapters.make_room():
                    raise Failure("insufficient_memory", str(error)) from error
                published = self._publish_version()
