"""Every error Tandem raises on purpose. The message says what to do; all of them survive pickling.

    TandemError
    ├── InvalidRequest        400  the caller sent something that can never work (also a ValueError)
    │   ├── ContextTooLong    400  prompt or prompt + max_tokens does not fit the model or the cache
    │   └── DataError         400  a training file cannot be used; says which line and what to do
    ├── NotFound              404  no such model, adapter, job or file
    ├── Gone                  410  it was here and is no longer: an expired session, future or set of weights
    ├── Conflict              409  the name is taken, or the thing is in use
    ├── Overloaded            429  the queue is full or the predicted wait too long; carries retry_after seconds
    ├── ModelError                 a model or adapter directory cannot be run (names the field or tensor)
    ├── ConfigError                an option or environment variable is wrong
    ├── BudgetError           400  weights, KV cache or a training run do not fit into the memory there is (exit code 5)
    ├── Diverged                   a loss or gradient is no longer finite; the weights are those before that step
    ├── Cancelled                  the training run was closed before this was done
    └── EngineDead            503  the engine process ended; the server is about to exit

What a programmer can get wrong is an assert, not one of these.
"""

from __future__ import annotations


class TandemError(Exception):
    """Root of the tree. `param` names the offending request field, where there is one."""

    status = 500

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class InvalidRequest(TandemError, ValueError):
    status = 400


class ContextTooLong(InvalidRequest):
    pass


class DataError(InvalidRequest):
    pass


class NotFound(TandemError):
    status = 404


class Gone(TandemError):
    status = 410


class Conflict(TandemError):
    status = 409


class Overloaded(TandemError):
    status = 429

    def __init__(self, message: str, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param)
        self.args = (message, param, retry_after)
        self.retry_after = retry_after


class ModelError(TandemError, ValueError):
    status = 400


class ConfigError(TandemError, ValueError):
    status = 400


class BudgetError(TandemError):
    status = 400


class Diverged(TandemError):
    pass


class Cancelled(TandemError):
    pass


class EngineDead(TandemError):
    status = 503


def by_name(name: str) -> type[TandemError]:
    """The class called `name`: how an error's kind crosses the process border. Unknown names give TandemError."""
    known = {cls.__name__: cls for cls in _descendants(TandemError)}
    return known.get(name, TandemError)


def _descendants(cls: type[TandemError]) -> list[type[TandemError]]:
    return [cls, *(d for sub in cls.__subclasses__() for d in _descendants(sub))]
