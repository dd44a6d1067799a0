"""What Tinker's futures give, as JSON or as protobuf. numpy, no torch.

The messages are in `tinker.proto`. How the results come about is in `tinker_training.py` and `tinker_sampling.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.api import tinker_pb2 as pb
from tandem.errors import Cancelled, Diverged, TandemError
from tandem.work import PassReport

LOWEST = float(np.finfo(np.float32).min)  # JSON has no infinity
NO_TOKEN, NO_LOGPROB = 0, -99999.0  # how the SDKs mark places of a top-k that have no candidate


class Result:
    """What a future gives. Only passes and samples travel as protobuf, and only to those who ask for it."""

    def json(self) -> dict[str, Any]:
        raise NotImplementedError

    def protobuf(self) -> bytes | None:
        return None


@dataclass(frozen=True, slots=True)
class Plain(Result):
    """An answer that has no protobuf form."""

    content: dict[str, Any]

    def json(self) -> dict[str, Any]:
        return self.content


@dataclass(frozen=True, slots=True)
class PassResult(Result):
    """Log-probabilities of every target of every datum, and sums."""

    report: PassReport
    shapes: Sequence[tuple[int, ...]]

    @property
    def metrics(self) -> dict[str, float]:
        """A name's part after the colon says how the SDKs put the metrics of several requests together."""
        report = self.report
        found = {f"{name}:sum": value for name, value in report.metrics.items()}
        return found | {"loss:sum": report.loss, "tokens:sum": float(report.num_tokens)}

    def json(self) -> dict[str, Any]:
        outputs = [
            {"logprobs": {"data": [max(value, LOWEST) for value in values], "dtype": "float32", "shape": list(shape)}}
            for values, shape in zip(self.report.logprobs, self.shapes, strict=True)
        ]
        return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": self.metrics}

    def protobuf(self) -> bytes:
        message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=self.metrics)
        datums = zip(self.report.logprobs, self.shapes, strict=True)
        for trailing, group in itertools.groupby(datums, key=lambda datum: datum[1][1:]):
            arrays = [np.asarray(values, "<f4").tobytes() for values, _ in group]
            offsets = np.cumsum([0, *map(len, arrays)], dtype="<i8").tobytes()
            record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
            record.fields["logprobs"].CopyFrom(
                pb.BatchedTensor(
                    data=b"".join(arrays), offsets=offsets, dtype=pb.DTYPE_FLOAT32, trailing_shape=trailing
                )
            )
        return message.SerializeToString()


Candidates = list[tuple[int, float]]


@dataclass(slots=True)
class Sampled:
    """One sample: its tokens with the end token that stopped it, their log-probabilities, the best candidates."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Candidates] = field(default_factory=list)
    stop_reason: str = "length"
    is_done: bool = False
    detokenizer: Any = None  # where stop strings are looked for
    matcher: Any = None


@dataclass(frozen=True, slots=True)
class SampleResult(Result):
    """`prompt_logprobs[i]` is that of prompt token i given those before it: None for the first one, and where it was
    not asked for. `top_prompt` likewise; `k_prompt` and `k_sample` are how many candidates were asked for."""

    sequences: Sequence[Sampled]
    prompt_logprobs: Sequence[float | None] | None = None
    top_prompt: Sequence[Candidates | None] | None = None
    k_prompt: int = 0
    k_sample: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        sequences = [
            {"stop_reason": s.stop_reason, "tokens": s.tokens, "logprobs": [max(p, LOWEST) for p in s.logprobs]}
            | ({"topk_logprobs": s.top} if self.k_sample else {})
            for s in self.sequences
        ]
        found: dict[str, Any] = {"type": "sample", "sequences": sequences}
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs
        if self.top_prompt is not None:
            found["topk_prompt_logprobs"] = self.top_prompt
        return found

    def protobuf(self) -> bytes:
        message = pb.SampleResponse(prompt_cache_hit_tokens=self.cached_tokens)
        for s in self.sequences:
            reason = pb.STOP_REASON_STOP if s.stop_reason == "stop" else pb.STOP_REASON_LENGTH
            added = message.sequences.add(
                stop_reason=reason, tokens=np.asarray(s.tokens, "<i4").tobytes(),
                logprobs=np.asarray(s.logprobs, "<f4").tobytes(),
            )  # fmt: skip
            if self.k_sample:
                added.topk_sampled_logprobs.CopyFrom(_topk(s.top, self.k_sample))
        if self.prompt_logprobs is not None:
            values = [np.nan if value is None else value for value in self.prompt_logprobs]
            message.prompt_logprobs = np.asarray(values, "<f4").tobytes()
        if self.top_prompt is not None:
            message.topk_prompt_logprobs.CopyFrom(_topk(self.top_prompt, self.k_prompt))
        return message.SerializeToString()


def _topk(rows: Sequence[Candidates | None], k: int) -> pb.TopkLogprobs:
    ids, logprobs = np.full((len(rows), k), NO_TOKEN, "<i4"), np.full((len(rows), k), NO_LOGPROB, "<f4")
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate((row or [])[:k]):
            ids[i, j], logprobs[i, j] = token, logprob
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows))


@dataclass(frozen=True, slots=True)
class Failure(Result):
    """Why a future has no result. The SDKs tell what the user can help from what the server should have."""

    error: TandemError

    def json(self) -> dict[str, Any]:
        is_theirs = self.error.status < 500 or isinstance(self.error, Diverged | Cancelled)
        category = "user" if is_theirs else "server"
        return {"error": self.error.message, "category": category}
