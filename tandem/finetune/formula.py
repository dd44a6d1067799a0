"""Arithmetic over scores: the `calculate_output` of a grader of several, `0.7 * exact + 0.3 * similar` say.

The text is parsed with `ast` and only the nodes below are computed, by this file: names, numbers, + - * / and ^ (or
**), and a few functions. Nothing is ever handed to Python's own evaluation.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

from tandem.errors import InvalidRequest

MAX_LENGTH, MAX_NODES = 1000, 200
_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# With the least and the largest number of arguments.
FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, MAX_NODES), "max": (max, 2, MAX_NODES), "abs": (abs, 1, 1), "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1), "exp": (math.exp, 1, 1), "sqrt": (math.sqrt, 1, 1), "log": (math.log, 1, 1),
}  # fmt: skip


class Formula:
    """A checked formula over named scores."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        """Raises InvalidRequest for anything but arithmetic over `names`."""
        if len(text) > MAX_LENGTH:
            raise InvalidRequest(f"has {len(text)} characters, at most {MAX_LENGTH} are allowed")
        try:
            tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise InvalidRequest(f"is no formula: {str(error)[:100]}") from None
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise InvalidRequest(f"is too long: it has more than {MAX_NODES} parts")
        self._names = set(names)
        self._body = tree.body
        self._check(tree.body)

    def __call__(self, scores: Mapping[str, float]) -> float:
        """The value for these scores. Raises InvalidRequest where it is not a finite number."""
        try:
            value = float(self._value(self._body, scores))
        except (ArithmeticError, ValueError) as error:
            raise InvalidRequest(f"cannot be computed for {_shown(scores)}: {error}") from None
        if not math.isfinite(value):
            raise InvalidRequest(f"gives {value} for {_shown(scores)}, which is no finite number")
        return value

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                self._check(left)
                self._check(right)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                self._check(operand)
            case ast.Constant(value=value) if type(value) in (int, float):
                pass
            case ast.Name(id=name):
                if name not in self._names:
                    known = ", ".join(sorted(self._names))
                    raise InvalidRequest(f"uses {name[:64]!r}, but the scores are called {known}")
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                _, least, most = FUNCTIONS[name]
                if not least <= len(args) <= most:
                    raise InvalidRequest(f"{name}() takes {least}{' or more' if most > least else ''} numbers")
                for argument in args:
                    self._check(argument)
            case _:
                allowed = f"names of graders, numbers, + - * / ^ and {', '.join(FUNCTIONS)}"
                raise InvalidRequest(f"may only have {allowed}; not {ast.unparse(node)[:64]!r}")

    def _value(self, node: ast.expr, scores: Mapping[str, float]) -> float:
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                return _BINARY[type(op)](self._value(left, scores), self._value(right, scores))
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self._value(operand, scores))
            case ast.Constant(value=value):
                assert isinstance(value, int | float)
                return float(value)
            case ast.Name(id=name):
                return scores[name]
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name][0](*(self._value(argument, scores) for argument in args))
        raise AssertionError("checked before")


def _shown(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in scores.items())
