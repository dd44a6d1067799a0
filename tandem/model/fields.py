"""Typed reading of a config.json: every getter gives a value of the promised type and range, or a ModelError that names
the field and what stands there.

Not here: what the fields mean (`spec.py`, `rope.py`). A null counts as a missing field exactly where the default is
None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from tandem.errors import ModelError

Config = Mapping[str, Any]
# No size in a config is larger; a sum of products of a few stays far from what memory could hold.
LARGEST = 2**31 - 1
_REQUIRED: Any = object()


def refuse(name: str, value: object, wanted: str) -> NoReturn:
    """Raise the ModelError of a field that is not what it must be."""
    shown = repr(value)
    raise ModelError(f"config.json: {name}={shown[:200]} must be {wanted}")


def integer(config: Config, name: str, default: Any = _REQUIRED, low: int = 1, high: int = LARGEST) -> Any:
    """A whole number of `low` to `high`, or `default` where there is none."""
    value = _value(config, name, default)
    if value is None and default is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        wanted = "a positive integer" if (low, high) == (1, LARGEST) else f"an integer from {low} to {high}"
        refuse(name, value, wanted)
    return value


def number(config: Config, name: str, default: Any = _REQUIRED, above: float = 0.0, most: float = math.inf) -> Any:
    """A finite number above `above` and at most `most`, as a float, or `default` where there is none."""
    value = _value(config, name, default)
    if value is None and default is None:
        return None
    if not is_number(value) or not above < value <= most:
        refuse(name, value, f"a number above {above:g}" + (f", at most {most:g}" if math.isfinite(most) else ""))
    return float(value)


def flag(config: Config, name: str, default: bool = False) -> bool:
    """True or false; null is false, as in Python."""
    value = config.get(name, default)
    if value is not None and not isinstance(value, bool):
        refuse(name, value, "true or false")
    return bool(value)


def text(config: Config, name: str) -> str | None:
    """A string, None where there is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        refuse(name, value, "a string")
    return value


def mapping(config: Config, name: str) -> dict[str, Any]:
    """An object; an empty one where there is none."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(name, value, "an object")
    return value


def items(config: Config, name: str, kind: type, wanted: str) -> list[Any] | None:
    """A list of `kind`s, None where there is none."""
    value = config.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
        refuse(name, value, f"a list of {wanted}")
    return value


def is_number(value: object) -> bool:
    """Whether this is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _value(config: Config, name: str, default: Any) -> Any:
    return config.get(name) if default is _REQUIRED else config.get(name, default)
