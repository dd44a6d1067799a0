"""Graders: what gives an answer its reward, as OpenAI's API writes them, and `endpoint`, which asks a URL.

Here: their shapes, every check that needs no server, and the scores that are computed from texts alone. Asking a model
or a URL is in `jobs/grading.py`, templates in `templates.py`, formulas in `formula.py`, metrics in `similarity.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from tandem.errors import InvalidRequest
from tandem.finetune import templates
from tandem.finetune.formula import FUNCTIONS, Formula
from tandem.finetune.similarity import METRICS
from tandem.finetune.templates import Sample

T = TypeVar("T")
PARAM = "method.reinforcement.grader"
MAX_GRADERS = 32
MAX_CHARS = 2**16  # of one, written as JSON
MAX_URL = 2048
_AT = re.compile(r" - at `\$\.?(.*)`$")
_REFUSED = {
    "python": "python graders are not run here, for there is no sandbox to run them in: serve the code yourself and "
    'give its address, {"type": "endpoint", "url": ...}',
    "label_model": "label_model graders are not supported: use score_model, or string_check on the label",
}  # fmt: skip


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="type"):
    """What all graders are."""


class StringCheck(Spec, frozen=True, kw_only=True, tag="string_check"):
    """1 where the input is, is not, or contains (like; ilike in any case) the reference; else 0."""

    name: str
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(Spec, frozen=True, kw_only=True, tag="text_similarity"):
    """How alike input and reference are, 0 to 1; the metrics are `similarity.METRICS`."""

    name: str
    input: str
    reference: str
    evaluation_metric: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`content`: text, a text part, or a list of either."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Any
    type: Literal["message"] | None = None

    @property
    def text(self) -> str:
        """Raises InvalidRequest for anything but text."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        return "\n".join(map(_part, parts))


class JudgeSampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a judging model answers: greedily, unless the temperature says otherwise."""

    max_completions_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    reasoning_effort: str | None = None


class ScoreModel(Spec, frozen=True, kw_only=True, tag="score_model"):
    """The last number in the answer of a model that this server has, within `range`."""

    name: str
    model: str
    input: list[Message]
    range: tuple[float, float] = (0.0, 1.0)
    sampling_params: JudgeSampling = JudgeSampling()


class Endpoint(Spec, frozen=True, kw_only=True, tag="endpoint"):
    """Whatever a URL says: it is sent {"sample": ..., "item": ...} and answers {"score": a number}."""

    url: str
    name: str = "endpoint"
    timeout_s: float = 10.0
    max_retries: int = 3


Leaf = StringCheck | TextSimilarity | ScoreModel | Endpoint


class Multi(Spec, frozen=True, kw_only=True, tag="multi"):
    """A formula over the scores of several graders, by their keys."""

    name: str
    graders: dict[str, Leaf]
    calculate_output: str

    @property
    def formula(self) -> Formula:
        return Formula(self.calculate_output, self.graders)


Grader = Leaf | Multi


def parse(raw: Any, param: str = PARAM) -> Grader:
    """The checked grader. Raises InvalidRequest; its `param` is the field at fault, below `param`."""
    text = json.dumps(raw, ensure_ascii=False, default=str)
    if len(text) > MAX_CHARS or "\\u0000" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest(f"{param}: must be valid Unicode without NUL, {MAX_CHARS} characters at most", param)
    try:
        return _parse(raw, param)
    except InvalidRequest as error:
        raise InvalidRequest(f"{error.param}: {error.message}", error.param) from error


def _parse(raw: Any, param: str) -> Grader:
    kind = raw.get("type") if isinstance(raw, dict) else None
    known = ("string_check", "text_similarity", "score_model", "multi", "endpoint")
    if isinstance(kind, str) and kind in _REFUSED:
        raise InvalidRequest(_REFUSED[kind], f"{param}.type")
    if kind not in known:
        raise InvalidRequest(f"must be an object whose type is one of {', '.join(known)}", f"{param}.type")
    if kind == "multi":
        return _multi(raw, param)
    grader: Leaf = _convert(raw, Leaf, param)
    _check(grader, param)
    return grader


def _multi(raw: dict[str, Any], param: str) -> Multi:
    given = raw.get("graders")
    if isinstance(given, dict) and isinstance(given.get("type"), str):
        given = [given]  # the SDK's type has one grader here, the API's guide several by name
    if isinstance(given, list):
        given = {str(one.get("name")) if isinstance(one, dict) else str(i): one for i, one in enumerate(given)}
    if not isinstance(given, dict) or not 1 <= len(given) <= MAX_GRADERS:
        raise InvalidRequest(f"must have 1 to {MAX_GRADERS} graders by name", f"{param}.graders")
    for name, one in given.items():
        where = f"{param}.graders.{name[:64]}"
        if not name.isidentifier() or name in FUNCTIONS:
            raise InvalidRequest(f"{name[:64]!r} cannot be a name in calculate_output: use letters and _", where)
        if isinstance(_parse(one, where), Multi):
            raise InvalidRequest("a grader of type multi cannot be part of another", f"{where}.type")
    multi: Multi = _convert({**raw, "graders": given}, Multi, param)
    at(f"{param}.calculate_output", Formula, multi.calculate_output, multi.graders)
    return multi


def _convert(raw: Any, kind: Any, param: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        where = _AT.search(text)
        path = f".{where[1]}" if where and where[1] else ""
        raise InvalidRequest(_AT.sub("", text).replace("`", "'"), f"{param}{path}") from None


def at(param: str, act: Any, *args: Any) -> Any:
    """act(*args); what it refuses names the field `param`."""
    try:
        return act(*args)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param) from error


def _check(grader: Leaf, param: str) -> None:
    match grader:
        case TextSimilarity(evaluation_metric=metric) if metric not in METRICS:
            raise InvalidRequest(
                f"the metric {metric[:40]!r} is not supported: use {', '.join(METRICS)}", f"{param}.evaluation_metric"
            )
        case ScoreModel():
            _check_judge(grader, param)
        case Endpoint():
            _check_endpoint(grader, param)
    for name, template in texts(grader):
        at(f"{param}.{name}", list, templates.fields(template))


def _check_judge(grader: ScoreModel, param: str) -> None:
    low, high = grader.range
    how = grader.sampling_params
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InvalidRequest("must be two numbers, the smaller one first", f"{param}.range")
    if not grader.input:
        raise InvalidRequest("must have a message", f"{param}.input")
    for i, message in enumerate(grader.input):
        at(f"{param}.input[{i}].content", lambda message: message.text, message)
    limits = (("max_completions_tokens", 1, 2**20), ("temperature", 0, 2), ("top_p", 1e-6, 1), ("seed", 0, 2**63 - 1))
    for name, least, most in limits:
        value = getattr(how, name)
        if value is not None and not least <= value <= most:
            raise InvalidRequest(f"must be from {least:g} to {most:g}", f"{param}.sampling_params.{name}")
    if how.reasoning_effort is not None:
        raise InvalidRequest("models here have no reasoning effort", f"{param}.sampling_params.reasoning_effort")


def _check_endpoint(grader: Endpoint, param: str) -> None:
    try:
        parts = urlsplit(grader.url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and len(grader.url) <= MAX_URL
        parts.port  # noqa: B018  raises where it is none
    except ValueError:
        is_url = False
    if not is_url or not grader.url.isascii() or not grader.url.isprintable() or " " in grader.url:
        raise InvalidRequest("must be an address that begins with http:// or https://", f"{param}.url")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest("may not hold a user or password: everybody can read a job's grader", f"{param}.url")
    if not 0.1 <= grader.timeout_s <= 300:
        raise InvalidRequest("must be from 0.1 to 300", f"{param}.timeout_s")
    if not 0 <= grader.max_retries <= 10:
        raise InvalidRequest("must be from 0 to 10", f"{param}.max_retries")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text") and isinstance(text, str):
        return text
    raise InvalidRequest("must be text: images and audio cannot be judged here")


# ---------------------------------------------------------------- what a grader needs, and what it says


def leaves(grader: Grader) -> dict[str, Leaf]:
    """The graders that look at answers, by name."""
    return grader.graders if isinstance(grader, Multi) else {grader.name: grader}


def texts(grader: Leaf) -> Iterator[tuple[str, str]]:
    """Its templates, by the name of the field."""
    if isinstance(grader, StringCheck | TextSimilarity):
        yield "input", grader.input
        yield "reference", grader.reference
    elif isinstance(grader, ScoreModel):
        for i, message in enumerate(grader.input):
            yield f"input[{i}].content", message.text


def check_item(grader: Grader, item: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where a row lacks a field that the grader needs."""
    for leaf in leaves(grader).values():
        for _, template in texts(leaf):
            templates.check_item(template, item)


def score(grader: StringCheck | TextSimilarity, item: Mapping[str, Any], sample: Sample) -> float:
    """0 to 1. Raises templates.NoSuchField."""
    text, reference = (templates.render(template, item, sample) for template in (grader.input, grader.reference))
    if isinstance(grader, TextSimilarity):
        return METRICS[grader.evaluation_metric](text, reference)
    match grader.operation:
        case "eq":
            return float(text == reference)
        case "ne":
            return float(text != reference)
        case "like":
            return float(reference in text)
        case "ilike":
            return float(reference.casefold() in text.casefold())


def read_score(text: str, low: float, high: float) -> float | None:
    """The last number in a judge's answer, if it lies in the range."""
    numbers = re.findall(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)
    value = float(numbers[-1]) if numbers else math.nan
    return value if low <= value <= high else None


def to_json(grader: Grader) -> dict[str, Any]:
    """As the API shows it."""
    found = msgspec.to_builtins(grader)
    assert isinstance(found, dict)
    return found
