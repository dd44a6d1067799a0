"""What crosses the border between the HTTP process and the engine process: msgspec structs, msgpack on the wire."""

from __future__ import annotations

import msgspec

from tandem.config import EngineConfig
from tandem.errors import Overloaded, TandemError, by_name
from tandem.work import (
    Adapter,
    EngineReport,
    EngineStats,
    LoraConfig,
    Request,
    TokenEvent,
    TrainOp,
    TrainReport,
)


class Error(msgspec.Struct, frozen=True):
    """A TandemError in transit."""

    kind: str
    message: str
    param: str | None = None
    retry_after: float = 1.0

    @classmethod
    def of(cls, error: TandemError) -> Error:
        return cls(type(error).__name__, error.message, error.param, getattr(error, "retry_after", 1.0))

    def restore(self) -> TandemError:
        kind = by_name(self.kind)
        if issubclass(kind, Overloaded):
            return kind(self.message, self.param, self.retry_after)
        return kind(self.message, self.param)


# HTTP process -> engine process


class Start(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    name: str


class CheckRun(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    lora: LoraConfig
    longest: int


class OpenRun(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    run_id: str
    lora: LoraConfig
    init_from: str | None
    resume_from: str | None
    priority: int


class Train(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    op: TrainOp


class CloseRun(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    run_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


# engine process -> HTTP process


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Loading: `done` of `total` bytes of weights."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    report: EngineReport
    adapters: list[Adapter]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; the process exits next."""

    error: Error


class Stepped(msgspec.Struct, frozen=True, tag=True):
    events: list[TokenEvent]
    stats: EngineStats


class Refused(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    error: Error


class Replied(msgspec.Struct, frozen=True, tag=True):
    """The answer to LoadAdapter (with the new version) or UnloadAdapter: the published adapters now, or an error."""

    call_id: int
    adapters: list[Adapter]
    error: Error | None = None
    adapter: Adapter | None = None


class Trained(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call about training: a report where there is one, or an error."""

    call_id: int
    report: TrainReport | None = None
    error: Error | None = None


ToEngine = Start | Submit | Cancel | LoadAdapter | UnloadAdapter | CheckRun | OpenRun | Train | CloseRun | Shutdown
FromEngine = Progress | Ready | Failed | Stepped | Refused | Replied | Trained

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
