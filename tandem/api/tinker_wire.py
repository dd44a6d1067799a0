"""Training data of Tinker's wire, protobuf or JSON, as our examples. numpy, no torch.

The messages are in `tinker.proto`. Arrays come as bytes or as JSON lists, dense or as compressed sparse rows. The way
back is in `tinker_results.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from tandem.api import tinker_pb2 as pb
from tandem.api.tinker_schemas import JsonTensor, ModelInput, PassEnvelope, PassInput, read
from tandem.errors import InvalidRequest
from tandem.work import Example

PROTOBUF = "application/x-protobuf"
DTYPES: dict[int, np.dtype] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
IDS, FLOATS = "int64", "float32"
INPUTS = {
    "target_tokens": IDS, "weights": FLOATS, "logprobs": FLOATS, "advantages": FLOATS, "sequence_ratio_mask": FLOATS,
}  # fmt: skip
POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")
# Where the advantage is zero these give neither loss nor gradient.
LINEAR_LOSSES = ("importance_sampling", "ppo", "cispo")
REFUSED_LOSSES = {
    "stable_reinforce": "use importance_sampling, ppo, cispo or gspo, which need no record of the sampling",
    "custom": "custom losses run in the client: forward_backward_custom does that by itself here",
}


@dataclass(frozen=True, slots=True)
class PassData:
    """`shapes[i]` is that of example i's target_tokens, and of the log-probabilities returned for it."""

    examples: list[Example]
    loss: str
    loss_params: dict[str, float]
    shapes: list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PassRequest:
    """Who asks for a pass, and when in its order; `data` raises InvalidRequest where that cannot be trained on."""

    model_id: str
    seq_id: int | None
    forward_only: bool
    data: Callable[[], PassData]


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its content encoding. Raises InvalidRequest where it is damaged or longer than `limit`."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise InvalidRequest(f"Content-Encoding {encoding[:40]!r} is not understood: send zstd, or none")
    try:
        size = zstandard.frame_content_size(body)  # -1 where the sender did not say
        plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)).read(limit + 1)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"the body is not zstd: {error}") from None
    if len(plain) > limit:
        raise InvalidRequest(f"the body unpacks to more than {limit} bytes: send fewer datums at once")
    if size not in (-1, len(plain)):
        raise InvalidRequest(f"the body is cut off: it unpacks to {len(plain)} of {size} bytes")
    return plain


def read_pass(body: bytes, content_type: str, forward_only: bool) -> PassRequest:
    """A forward_backward or forward request. Raises InvalidRequest where not even its sender can be read."""
    if content_type.partition(";")[0].strip().lower() == PROTOBUF:
        message = pb.ForwardBackwardRequest()
        try:
            message.ParseFromString(body)
        except DecodeError as error:
            raise InvalidRequest(f"the body is not a ForwardBackwardRequest: {error}") from None
        return PassRequest(
            message.model_id, message.seq_id, forward_only or message.forward_only, lambda: _from_message(message)
        )
    envelope = read(body, PassEnvelope)
    found = envelope.forward_input if forward_only else envelope.forward_backward_input
    name = "forward_input" if forward_only else "forward_backward_input"

    def data() -> PassData:
        if not (raw := bytes(found)):
            raise InvalidRequest(f"{name} is missing", name)
        return _from_json(read(raw, PassInput))

    return PassRequest(envelope.model_id, envelope.seq_id, forward_only, data)


def _from_message(message: pb.ForwardBackwardRequest) -> PassData:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    data = []
    for i, datum in enumerate(message.data):
        tokens: list[int] = []
        for chunk in datum.model_input:
            if chunk.WhichOneof("chunk") != "encoded_text":
                raise InvalidRequest(f"datum {i} has a chunk that is no text: this model reads tokens only", "data")
            tokens += _array(chunk.encoded_text.tokens, np.dtype("<i4"), f"datum {i}: tokens").tolist()
        inputs = {name: _dense(tensor, f"datum {i}: {name}") for name, tensor in datum.loss_fn_inputs.items()}
        data.append((tokens, inputs))
    return _pass_data(data, message.loss_fn, config)


def _array(raw: bytes, dtype: np.dtype, what: str) -> np.ndarray:
    if len(raw) % dtype.itemsize:
        raise InvalidRequest(f"{what} has {len(raw)} bytes, which is no whole number of {dtype.itemsize}", "data")
    return np.frombuffer(raw, dtype)


def _dense(tensor: pb.Tensor, what: str) -> np.ndarray:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"{what} has dtype {tensor.dtype}: send float32 or int64", "data")
    shape = tuple(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        csr, wide = tensor.sparse_csr, np.dtype("<i8")
        values = _widened(_array(csr.values, dtype, what))
        return _from_rows(
            values, _array(csr.crow_indices, wide, what), _array(csr.col_indices, wide, what), shape, what
        )
    return _shaped(_widened(_array(tensor.dense, dtype, what)), shape, what)


def _widened(values: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy lacks, is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.dtype("<u2") else values


def _shaped(values: np.ndarray, shape: Sequence[int], what: str) -> np.ndarray:
    if not shape:
        return values
    if min(shape) < 0 or int(np.prod(shape, dtype=object)) != values.size:
        raise InvalidRequest(f"{what} has {values.size} numbers, which do not fill its shape {list(shape)}", "data")
    return values.reshape(shape)


def _from_rows(values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Sequence[int], what: str) -> np.ndarray:
    """Compressed sparse rows with zeros filled in. What is sparse on the wire may not grow without bound here."""
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > max(2**20, 1024 * values.size):
        raise InvalidRequest(f"{what} is sparse: its shape must be two numbers, not {list(shape)}", "data")
    rows, columns = shape
    is_sound = len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == values.size == col.size
    is_sound = is_sound and bool((np.diff(crow) >= 0).all())
    if not is_sound or (col.size and not (0 <= col.min() and col.max() < columns)):
        raise InvalidRequest(f"{what} is sparse and its indices do not fit its shape {list(shape)}", "data")
    dense = np.zeros((rows, columns), values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return dense


def _from_json(found: PassInput) -> PassData:
    data = [
        (
            prompt_tokens(datum.model_input, f"datum {i}"),
            {name: _from_json_tensor(t, f"datum {i}: {name}") for name, t in datum.loss_fn_inputs.items()},
        )
        for i, datum in enumerate(found.data)
    ]
    return _pass_data(data, found.loss_fn, found.loss_fn_config or {})


def _from_json_tensor(tensor: JsonTensor, what: str) -> np.ndarray:
    if tensor.dtype not in (IDS, FLOATS):
        raise InvalidRequest(f"{what} has dtype {tensor.dtype[:40]!r}: send float32 or int64", "data")
    values = np.asarray(tensor.data, np.float64).astype(np.dtype(tensor.dtype))
    shape = tensor.shape or ()
    if tensor.sparse_crow_indices is not None:
        crow, col = np.asarray(tensor.sparse_crow_indices, "<i8"), np.asarray(tensor.sparse_col_indices or [], "<i8")
        return _from_rows(values, crow, col, shape, what)
    return _shaped(values, shape, what)


def prompt_tokens(found: ModelInput, what: str) -> list[int]:
    """The tokens of a model input. Raises InvalidRequest for images and audio."""
    for chunk in found.chunks:
        if chunk.type != "encoded_text":
            kind = chunk.type[:40]
            raise InvalidRequest(f"{what} has a chunk of type {kind!r}: this model reads tokens only", "data")
    return [token for chunk in found.chunks for token in chunk.tokens]


def _pass_data(
    data: Sequence[tuple[list[int], Mapping[str, np.ndarray]]], loss: str, config: Mapping[str, float | str]
) -> PassData:
    if loss in REFUSED_LOSSES:
        raise InvalidRequest(f"the loss {loss} is not available: {REFUSED_LOSSES[loss]}", "loss_fn")
    params = {}
    for name, value in config.items():
        if isinstance(value, str):
            raise InvalidRequest(f"loss_fn_config {name!r} must be a number, not {value[:40]!r}", "loss_fn_config")
        params[name] = value
    examples, shapes = [], []
    for i, (tokens, inputs) in enumerate(data):
        example, shape = _example(i, tokens, inputs, loss)
        examples.append(example)
        shapes.append(shape)
    return PassData(examples, loss, params, shapes)


def _example(
    i: int, tokens: list[int], inputs: Mapping[str, np.ndarray], loss: str
) -> tuple[Example, tuple[int, ...]]:
    for name, values in inputs.items():
        if name not in INPUTS:
            raise InvalidRequest(f"datum {i} has an input {name!r}, which no loss here takes", "loss_fn_inputs")
        kind = "iu" if INPUTS[name] == IDS else "f"
        if values.dtype.kind not in kind:
            raise InvalidRequest(f"datum {i}: {name} must be {INPUTS[name]}, not {values.dtype}", "loss_fn_inputs")
    targets = inputs.get("target_tokens")
    if targets is None:
        raise InvalidRequest(f"datum {i} has no target_tokens", "loss_fn_inputs")
    if targets.ndim == 2 and loss == "cross_entropy":
        return _soft_example(i, tokens, targets, inputs.get("weights"))
    flat = {name: _flat(i, name, values, len(tokens)) for name, values in inputs.items()}
    logprobs, advantages = flat.get("logprobs", []), flat.get("advantages", [])
    weights = flat.get("weights", [1.0] * len(tokens))
    if loss in POLICY_LOSSES:
        if loss in LINEAR_LOSSES and len(advantages) == len(weights):
            weights = [weight if advantage else 0.0 for weight, advantage in zip(weights, advantages)]
        elif loss == "gspo":
            weights = flat.get("sequence_ratio_mask", weights)
    return Example(tokens, flat["target_tokens"], weights, logprobs, advantages), targets.shape


def _flat(i: int, name: str, values: np.ndarray, length: int) -> list[Any]:
    if values.shape != (length,):
        raise InvalidRequest(
            f"datum {i}: {name} has shape {list(values.shape)}, and the model input has {length} tokens: give one "
            "number for each",
            "loss_fn_inputs",
        )
    return values.tolist()


def _soft_example(
    i: int, tokens: list[int], targets: np.ndarray, weights: np.ndarray | None
) -> tuple[Example, tuple[int, ...]]:
    if weights is None:
        weights = np.ones(targets.shape, np.float32)
    if targets.shape != weights.shape or targets.shape[0] != len(tokens) or not targets.shape[1]:
        raise InvalidRequest(
            f"datum {i}: target_tokens has shape {list(targets.shape)}, weights {list(weights.shape)}, and there are "
            f"{len(tokens)} tokens: give [tokens, candidates] for both",
            "loss_fn_inputs",
        )
    example = Example(
        tokens, targets[:, 0].tolist(), [1.0] * len(tokens), soft_targets=targets.tolist(),
        soft_weights=weights.tolist(),
    )  # fmt: skip
    return example, targets.shape
