"""What an answer is worth: grading by texts, by a model of this server, by a URL, or by a formula over these.

Shapes and checks that need no server are in `finetune/graders.py`. A URL is asked only where the server's operator has
allowed its host; an answer that a grader cannot read scores lowest, a grader that fails ends the job.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx

from tandem.errors import ContextTooLong, InvalidRequest, NotFound, TandemError
from tandem.finetune import graders
from tandem.finetune.graders import PARAM, Endpoint, Grader, Leaf, Multi, ScoreModel
from tandem.finetune.templates import NoSuchField, Sample, render
from tandem.jobs import sampling
from tandem.jobs.adapters import Adapters
from tandem.tokenizer import Tokenizer
from tandem.work import SamplingParams

if TYPE_CHECKING:
    from tandem.engine.client import EngineClient

T = TypeVar("T")
MAX_ASKED = 32  # questions to models and URLs at once
MAX_REPLY_BYTES = 2**16
MAX_REWARD = 1e9  # what can still be averaged and compared
RETRY_S, MAX_RETRY_S = 0.5, 10.0
WORTH_A_RETRY = (408, 425, 429)
Item = Mapping[str, Any]


class GraderFailed(TandemError):
    """The grader cannot say what an answer is worth, and trying again did not help."""


@dataclass(frozen=True)
class Grade:
    """`scores` by the graders' names. `faults`: graders to which the answer was unreadable (sample), or whose own
    answer was (model): they gave their lowest score. `tokens` were written by a judging model."""

    reward: float
    scores: dict[str, float]
    faults: dict[str, str] = field(default_factory=dict)
    tokens: int = 0


class Grading:
    """One per server: what graders may use of it."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, adapters: Adapters, model_names: Sequence[str],
        hosts: Collection[str],
    ) -> None:  # fmt: skip
        """`hosts`: names, or name:port, that may be asked."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._model_names = set(model_names)
        self._hosts = {host.lower() for host in hosts}
        self._turn = asyncio.Semaphore(MAX_ASKED)
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    def check(self, grader: Grader, param: str = PARAM) -> None:
        """Raises InvalidRequest for a model that is not here, or a host that may not be asked."""
        for name, leaf in graders.leaves(grader).items():
            where = f"{param}.graders.{name}" if isinstance(grader, Multi) else param
            if isinstance(leaf, ScoreModel):
                self._check_model(leaf.model, where)
            elif isinstance(leaf, Endpoint):
                self._check_host(leaf.url, where)

    def _check_model(self, model: str, where: str) -> None:
        if model in self._model_names:
            return
        try:
            self._adapters.get(model)
        except NotFound:
            raise InvalidRequest(
                f"{where}.model: {model[:200]!r} is not served here, and only models of this server can judge: "
                f"use {min(self._model_names)!r}, an adapter of it, or a grader of type endpoint",
                f"{where}.model",
            ) from None

    def _check_host(self, url: str, where: str) -> None:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not {host, f"{host}:{port}", f"[{host}]:{port}"} & self._hosts:
            raise InvalidRequest(
                f"{where}.url: this server may not ask {host}: start it with --grader-hosts {host}", f"{where}.url"
            )

    async def grade(self, grader: Grader, item: Item, text: str) -> Grade:
        """Raises GraderFailed; NoSuchField for an item that lacks what the grader needs; EngineDead."""
        answer = Sample(text)
        leaves = graders.leaves(grader)
        found = await together(self._score(leaf, item, answer) for leaf in leaves.values())
        scores = {name: score for name, (score, _, _) in zip(leaves, found, strict=True)}
        faults = {name: fault for name, (_, fault, _) in zip(leaves, found, strict=True) if fault}
        try:
            reward = grader.formula(scores) if isinstance(grader, Multi) else next(iter(scores.values()))
        except InvalidRequest as error:
            raise GraderFailed(f"calculate_output {error.message}", f"{PARAM}.calculate_output") from error
        if not abs(reward) <= MAX_REWARD:
            raise GraderFailed(f"the reward {reward:g} is beyond {MAX_REWARD:g}", PARAM)
        return Grade(reward, scores, faults, sum(tokens for _, _, tokens in found))

    async def _score(self, grader: Leaf, item: Item, answer: Sample) -> tuple[float, str, int]:
        """(score, fault, tokens written by a model)"""
        try:
            if isinstance(grader, Endpoint):
                return await self._ask_url(grader, item, answer), "", 0
            if isinstance(grader, ScoreModel):
                return await self._ask_model(grader, item, answer)
            return graders.score(grader, item, answer), "", 0
        except NoSuchField as error:
            if not error.is_sample:
                raise
            return grader.range[0] if isinstance(grader, ScoreModel) else 0.0, "sample", 0

    # ------------------------------------------------------------ models

    async def _ask_model(self, grader: ScoreModel, item: Item, answer: Sample) -> tuple[float, str, int]:
        messages = [{"role": m.role, "content": render(m.text, item, answer)} for m in grader.input]
        low, high = grader.range
        how = grader.sampling_params
        try:
            prompt = self._tokenizer.render(messages)
            room = self._engine.report.max_model_len - len(prompt)
            if room < 1:
                raise ContextTooLong("the question to the judge is longer than its context")
            params = SamplingParams(
                max_tokens=min(how.max_completions_tokens, room), temperature=how.temperature, top_p=how.top_p,
                seed=how.seed,
            )  # fmt: skip
            async with self._turn:
                adapter = None if grader.model in self._model_names else await self._adapters.resident(grader.model)
                if adapter is None and grader.model not in self._model_names:
                    raise NotFound(f"there is no model {grader.model!r} any more")
                (said,) = await sampling.sample(self._engine, self._tokenizer, prompt, adapter, params)
        except ContextTooLong:
            return low, "model", 0
        except (InvalidRequest, NotFound) as error:
            raise GraderFailed(f"the judge {grader.model} cannot be asked: {error}", PARAM) from error
        score = graders.read_score(said.text, low, high)
        return (low, "model", len(said.tokens)) if score is None else (score, "", len(said.tokens))

    # ------------------------------------------------------------ URLs

    async def _ask_url(self, grader: Endpoint, item: Item, answer: Sample) -> float:
        try:
            parsed = answer.output_json
        except NoSuchField:
            parsed = None
        body = json.dumps({"sample": {"output_text": answer.output_text, "output_json": parsed}, "item": item}).encode()
        attempts = grader.max_retries + 1
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(min(RETRY_S * 2 ** (attempt - 1), MAX_RETRY_S))
            try:
                async with self._turn, asyncio.timeout(grader.timeout_s):
                    return await self._post(grader.url, body)
            except TimeoutError:
                reason = f"no answer within {grader.timeout_s:g} s"
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            except _BadReply as error:
                reason = str(error)
                if error.is_final:
                    attempts = attempt + 1
                    break
        times = "" if attempts == 1 else f" {attempts} times"
        raise GraderFailed(f"the grader at {grader.url} failed{times}: {reason}", PARAM)

    async def _post(self, url: str, body: bytes) -> float:
        if self._http is None:
            # Neither redirects nor proxies: what is asked is the host that was allowed.
            self._http = httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=None)
        headers = {"content-type": "application/json", "accept": "application/json"}
        async with self._http.stream("POST", url, content=body, headers=headers) as response:
            content = b""
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise _BadReply(f"its answer is longer than {MAX_REPLY_BYTES} bytes", is_final=True)
        if response.status_code != 200:
            is_final = response.status_code < 500 and response.status_code not in WORTH_A_RETRY
            raise _BadReply(f"status {response.status_code}: {_shown(content)}", is_final)
        try:
            score = json.loads(content)["score"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise _BadReply(f'its answer is not {{"score": NUMBER}} but {_shown(content)}') from None
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= MAX_REWARD:
            raise _BadReply(f"its score is no finite number of at most {MAX_REWARD:g}: {_shown(content)}")
        return float(score)


class _BadReply(Exception):
    """`is_final`: asking again would give the same."""

    def __init__(self, message: str, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


def _shown(content: bytes) -> str:
    return repr(content[:100].decode(errors="replace"))


async def together(work: Any) -> list[Any]:
    """All results in order; the first that fails ends the others, and is what is raised."""
    tasks: list[asyncio.Task[Any]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(one)) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _awaited(work: Awaitable[T]) -> T:
    return await work
