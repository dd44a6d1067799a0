"""What Tinker's sample requests do: wait for seats, run in the engine among everybody else's, end in a future.

Log-probabilities are the model's own at temperature 1, before any truncation, so that they can be compared with those
of a training pass over the same tokens.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence

from tandem.api.serving import Serving
from tandem.api.tinker_futures import Future
from tandem.api.tinker_results import Candidates, Result, Sampled, SampleResult
from tandem.api.tinker_schemas import CreateSamplingSession, Sample, Sampling
from tandem.api.tinker_sessions import Sampler, Session, Sessions
from tandem.api.tinker_training import check_base
from tandem.api.tinker_wire import prompt_tokens
from tandem.engine.client import Stream
from tandem.errors import ContextTooLong, InvalidRequest, Overloaded
from tandem.tokenizer import Detokenizer, StopMatcher
from tandem.work import Request, SamplingParams, TokenEvent, TopLogprobs

# Choices of one engine request: they share their prompt's computation, and draw by their place in it.
TOGETHER = 8
MAX_SAMPLES = 1024
MAX_TOP_K = 128
MAX_WAITING_SAMPLES = 8192  # of one tenant
MAX_WAITING_TOKENS = 2**22
RETRY_S = 0.25


def create_sampler(sessions: Sessions, session: Session, body: CreateSamplingSession) -> Sampler:
    """Raises NotFound for a checkpoint or base model that is not there, InvalidRequest."""
    sampler_id = f"{session.session_id}:sample:{body.sampling_session_seq_id}"
    if sampler_id in session.samplers:
        return session.samplers[sampler_id]
    sampler = session.samplers[sampler_id] = _sampler(sessions, session, sampler_id, body.model_path, body.base_model)
    return sampler


def _sampler(
    sessions: Sessions, session: Session, sampler_id: str, model_path: str | None, base_model: str | None
) -> Sampler:
    if model_path is not None:
        record = sessions.store.readable(session.tenant, model_path)
        check_base(sessions, record.base_model)
        return Sampler(sampler_id, session, record.base_model, record.path, record.path)
    if base_model is None:
        raise InvalidRequest("give model_path or base_model", "base_model")
    check_base(sessions, base_model)
    return Sampler(sampler_id, session, base_model)


def sample(sessions: Sessions, sampler: Sampler, body: Sample) -> Future:
    """Raises InvalidRequest for what cannot be sampled, Overloaded where too much waits already."""
    session = sampler.session
    key = (sampler.sampler_id, body.seq_id if body.seq_id is not None else uuid.uuid4().hex)
    if known := sessions.futures.find(key):
        return known
    job = _Job(sessions, sampler, body)
    waiting = sessions.waiting.setdefault(session.tenant, [0, 0])
    size = len(job.prompt) * math.ceil(body.num_samples / TOGETHER)
    if waiting[0] + body.num_samples > MAX_WAITING_SAMPLES or waiting[1] + size > MAX_WAITING_TOKENS:
        raise Overloaded(
            f"{waiting[0]} samples of yours are waiting or under way (at most {MAX_WAITING_SAMPLES}): try again later",
            retry_after=1.0,
        )
    sessions.futures.check_room(session.tenant)
    future = sessions.futures.add(session.tenant, session.session_id, key, "sample", job.run())
    future.sequence_ids = [f"{future.request_id}:{i}" for i in range(body.num_samples)]
    waiting[0] += body.num_samples
    waiting[1] += size

    def done(_: asyncio.Task[Result]) -> None:
        waiting[0] -= body.num_samples
        waiting[1] -= size
        sampler.finish(future.request_id)

    future.task.add_done_callback(done)
    return future


def check(serving: Serving, body: Sample) -> tuple[list[int], SamplingParams, tuple[str, ...]]:
    """Prompt, parameters and stop strings of a request. Raises InvalidRequest, ContextTooLong."""
    prompt = prompt_tokens(body.prompt, "the prompt")
    longest, vocab = serving.report.max_model_len, serving.report.vocab_size
    if not prompt:
        raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
    if any(not 0 <= token < vocab for token in prompt):
        raise InvalidRequest(f"the prompt has a token id outside the vocabulary of {vocab}", "prompt")
    if not 1 <= body.num_samples <= MAX_SAMPLES:
        raise InvalidRequest(
            f"num_samples must be 1 to {MAX_SAMPLES}, not {body.num_samples}: send several requests", "num_samples"
        )
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(body, name):
            raise InvalidRequest(f"{name} is not available here: leave it out", name)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(body, name) <= min(MAX_TOP_K, vocab):
            raise InvalidRequest(f"{name} must be 0 to {min(MAX_TOP_K, vocab)}", name)
    last_n = body.prompt_logprobs_last_n
    if last_n is not None and not 1 <= last_n < len(prompt):
        raise InvalidRequest(f"prompt_logprobs_last_n must be 1 to {len(prompt) - 1}, not {last_n}", "prompt")
    p = body.sampling_params
    max_tokens = longest - len(prompt) if p.max_tokens is None else p.max_tokens
    if max_tokens < 1 or len(prompt) + max_tokens > longest:
        raise ContextTooLong(
            f"prompt ({len(prompt)} tokens) and max_tokens ({max_tokens}) exceed the context of {longest} tokens",
            "max_tokens",
        )
    _check_ranges(p, vocab)
    stop = [p.stop] if isinstance(p.stop, str) else p.stop or []
    texts, tokens = [s for s in stop if isinstance(s, str)], [s for s in stop if isinstance(s, int)]
    if any(not text for text in texts) or any(not 0 <= token < vocab for token in tokens):
        raise InvalidRequest("stop has an empty string, or a token id outside the vocabulary", "stop")
    scores = body.prompt_logprobs or body.topk_prompt_logprobs
    params = SamplingParams(
        max_tokens=max_tokens, temperature=p.temperature, top_k=max(0, p.top_k), top_p=p.top_p, seed=p.seed,
        stop_token_ids=tuple(tokens), ignore_eos=p.stop == [], logprobs=body.topk_sample_logprobs,
        prompt_logprobs=body.topk_prompt_logprobs if scores else None,
    )  # fmt: skip
    return prompt, params, tuple(texts)


def _check_ranges(p: Sampling, vocab: int) -> None:
    if not 0 <= p.temperature <= 100:
        raise InvalidRequest(f"temperature must be 0 to 100, not {p.temperature}", "temperature")
    if not 0 < p.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {p.top_p}", "top_p")
    if not -1 <= p.top_k < 2**31:
        raise InvalidRequest(f"top_k must be -1 (off) or more, not {p.top_k}", "top_k")
    if p.seed is not None and not 0 <= p.seed < 2**63:
        raise InvalidRequest(f"seed must be 0 to 2**63 - 1, not {p.seed}", "seed")


class _Job:
    """One sample request on its way."""

    def __init__(self, sessions: Sessions, sampler: Sampler, body: Sample) -> None:
        self.sessions = sessions
        self.sampler = sampler
        self.body = body
        self.prompt, self.params, self.stops = check(sessions.serving, body)
        self.sequences = [Sampled() for _ in range(body.num_samples)]
        self.prompt_logprobs: list[TopLogprobs] | None = None
        self.cached_tokens = 0

    async def run(self) -> SampleResult:
        num, seats = self.body.num_samples, self.sessions.seats
        together = min(TOGETHER, seats.num_seats)
        parts = [(first, min(together, num - first)) for first in range(0, num, together)]
        try:
            async with asyncio.TaskGroup() as group:
                for first, n in parts:
                    group.create_task(self._part(first, n))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return self._result()

    async def _part(self, first: int, n: int) -> None:
        """Choices first to first + n, as one engine request."""
        sessions, session_id = self.sessions, self.sampler.session.session_id
        await sessions.seats.take(session_id, n)
        held = n
        try:
            resident = None
            if (adapter := self.sampler.adapter) is not None:
                directory = sessions.checkpoint_directory(self.sampler)
                resident = await sessions.residents.use(adapter, session_id, directory)
            try:
                stream = await self._submit(first, n)
                try:
                    async for events in stream:
                        for event in events:
                            if self._take(first, event, stream):
                                held -= 1
                                sessions.seats.give()
                        if not held:
                            break
                finally:
                    await stream.aclose()
            finally:
                if resident is not None:
                    sessions.residents.release(resident)
        finally:
            if held:
                sessions.seats.give(held)

    async def _submit(self, first: int, n: int) -> Stream:
        params = self.params
        seed = None if params.seed is None else (params.seed + first // TOGETHER * 0x9E3779B97F4A7C15) % 2**63
        request = Request(
            request_id=f"tinker-{uuid.uuid4().hex}", prompt=self.prompt, adapter=self.sampler.adapter,
            keep_for_training=self.sampler.adapter is not None,
            sampling=SamplingParams(
                max_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
                seed=seed, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos,
                logprobs=params.logprobs, prompt_logprobs=params.prompt_logprobs if first == 0 else None, n=n,
            ),
        )  # fmt: skip
        while True:
            try:
                return self.sessions.serving.engine.submit(request)
            except Overloaded:  # it was accepted here, so it waits until the engine takes it
                await asyncio.sleep(RETRY_S)

    def _take(self, first: int, event: TokenEvent, stream: Stream) -> bool:
        """News of one choice; True when it is finished by this."""
        found = self.sequences[first + event.index]
        if found.is_done:
            return False
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.index == 0 and first == 0:
            self.cached_tokens += event.cached_tokens
        if event.token_id is not None:
            found.tokens.append(event.token_id)
            if event.logprob is not None:
                found.logprobs.append(event.logprob.logprob)
                found.top.append(list(zip(event.logprob.token_ids, event.logprob.logprobs)))
            if self.stops and self._stopped(found, event):
                found.is_done, found.stop_reason = True, "stop"
                if event.finish_reason is None:
                    self.sessions.serving.engine.cancel(stream.request_id, event.index)
                return True
        if event.finish_reason is not None:
            found.is_done, found.stop_reason = True, "stop" if event.finish_reason == "stop" else "length"
        return found.is_done

    def _stopped(self, found: Sampled, event: TokenEvent) -> bool:
        """Whether the text so far holds a stop string. Its tokens stay: they are what the model said."""
        if found.matcher is None:
            found.matcher = StopMatcher(self.stops)
            found.detokenizer = Detokenizer(self.sessions.serving.tokenizer, False, self.prompt[-8:])
        assert event.token_id is not None
        found.matcher.push(found.detokenizer.push(event.token_id))
        return found.matcher.matched is not None

    def _result(self) -> SampleResult:
        body, length = self.body, len(self.prompt)
        session = self.sampler.session
        self.sessions.count(session, "sampling_prefill", length)
        self.sessions.count(session, "sampling_sample", sum(len(s.tokens) for s in self.sequences))
        scored = self.prompt_logprobs
        if scored is None:
            return SampleResult(self.sequences, k_sample=body.topk_sample_logprobs, cached_tokens=self.cached_tokens)
        first = 1 if body.prompt_logprobs_last_n is None else length - body.prompt_logprobs_last_n
        k = body.topk_prompt_logprobs
        return SampleResult(
            self.sequences,
            [None] * first + [entry.logprob for entry in scored[first - 1 :]] if body.prompt_logprobs else None,
            [None] * first + _candidates(scored[first - 1 :]) if k else None,
            k,
            body.topk_sample_logprobs,
            self.cached_tokens,
        )


def _candidates(entries: Sequence[TopLogprobs]) -> list[Candidates | None]:
    return [list(zip(entry.token_ids, entry.logprobs)) for entry in entries]
