"""Templates in graders: `{{item.FIELD}}` is a row's, `{{sample.output_text}}` the answer that is judged.

Here: finding the fields, checking that a row has them, filling them in, once: what is filled in is never read as a
template. No loops, conditions or filters. Which texts are templates is said in `graders.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tandem.errors import InvalidRequest

_FIELD = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"[^\W\d][\w-]*(?:\.[\w-]+|\[\d+\])*")
_STEP = re.compile(r"[\w-]+")
_SAMPLE = ("output_text", "output_json")


class NoSuchField(InvalidRequest):
    """A row has no such field; or the answer has none, which is the answer's fault (`is_sample`)."""

    def __init__(self, message: str, is_sample: bool = False) -> None:
        super().__init__(message)
        self.args = (message, is_sample)
        self.is_sample = is_sample


@dataclass(frozen=True)
class Sample:
    """An answer, as templates see it."""

    output_text: str

    @cached_property
    def output_json(self) -> Any:
        """The answer as JSON. Raises NoSuchField where it is none."""
        try:
            return json.loads(self.output_text)
        except (ValueError, RecursionError):
            raise NoSuchField("the answer is not JSON, so it has no sample.output_json", is_sample=True) from None


def fields(template: str) -> Iterator[list[str]]:
    """The paths that a template names, `["item", "answer"]` say. Raises InvalidRequest for what is none."""
    rest = _FIELD.sub("", template)
    if "{{" in rest or "}}" in rest:
        raise InvalidRequest("has '{{' without '}}', or the other way round: write {{item.FIELD}}")
    for match in _FIELD.finditer(template):
        yield _path(match[1])


def _path(text: str) -> list[str]:
    text = text.strip()
    if not _PATH.fullmatch(text):
        raise InvalidRequest(f"{{{{{text[:64]}}}}} is no field: write {{{{item.FIELD}}}} or {{{{sample.output_text}}}}")
    path = _STEP.findall(text)
    if path[0] == "item" or (path[0] == "sample" and path[1:2] and path[1] in _SAMPLE):
        if path[:2] == ["sample", "output_text"] and len(path) > 2:
            raise InvalidRequest(f"{{{{{text[:64]}}}}}: output_text is text and has no fields; output_json may have")
        return path
    known = " or ".join(f"{{{{sample.{name}}}}}" for name in _SAMPLE)
    raise InvalidRequest(f"{{{{{text[:64]}}}}} is not known: use {{{{item.FIELD}}}}, or of the answer {known}")


def check_item(template: str, item: Mapping[str, Any]) -> None:
    """Raises NoSuchField where a row lacks what the template needs of it."""
    for path in fields(template):
        if path[0] == "item":
            _walk(item, path, 1)


def render(template: str, item: Mapping[str, Any], sample: Sample) -> str:
    """The text with all fields filled in; what is not text as JSON. Raises NoSuchField."""

    def value(match: re.Match[str]) -> str:
        path = _path(match[1])
        if path[0] == "item":
            return _text(_walk(item, path, 1))
        return sample.output_text if path[1] == "output_text" else _text(_walk(sample.output_json, path, 2))

    return _FIELD.sub(value, template)


def _walk(value: Any, path: list[str], start: int) -> Any:
    for i, step in enumerate(path[start:], start):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isascii() and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise NoSuchField(f"has no {'.'.join(path[: i + 1])}, which the grader needs", path[0] == "sample")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
