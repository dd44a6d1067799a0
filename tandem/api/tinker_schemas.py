"""The JSON bodies of Tinker's API, as its SDKs from 0.16 to 0.38 send them.

What would change the training and is unknown here is refused, what only describes is ignored. What they mean is in
`tinker_training.py` and `tinker_sampling.py`; protobuf bodies are read in `tinker_wire.py`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from tandem.errors import InvalidRequest

T = TypeVar("T")


class CreateSession(msgspec.Struct):
    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class SessionName(msgspec.Struct):
    session_id: str


class LoraShape(msgspec.Struct, forbid_unknown_fields=True):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(msgspec.Struct):
    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraShape | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, Any] | None = None


class ModelName(msgspec.Struct):
    model_id: str


class Adam(msgspec.Struct, forbid_unknown_fields=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(msgspec.Struct):
    model_id: str
    seq_id: int | None = None
    adam_params: Adam | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(msgspec.Struct):
    """Also of save_weights_for_sampler, where `path` may be missing, and of save_weights_external."""

    model_id: str
    path: str | None = None
    seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    age_encryption_recipients: list[str] | None = None


class LoadWeights(msgspec.Struct):
    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = None


class CreateSamplingSession(msgspec.Struct):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplerName(msgspec.Struct):
    sampling_session_id: str


class Chunk(msgspec.Struct):
    type: str = "encoded_text"
    tokens: list[int] = []


class ModelInput(msgspec.Struct):
    chunks: list[Chunk]


class Sampling(msgspec.Struct, forbid_unknown_fields=True):
    """`stop` None stops at the model's end of text, an empty list at nothing."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(msgspec.Struct):
    prompt: ModelInput
    sampling_params: Sampling
    num_samples: int = 1
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None


class RetrieveFuture(msgspec.Struct):
    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(msgspec.Struct):
    sampling_session_id: str
    cloned_sampler_id: int = 0


class RetrieveFutures(msgspec.Struct):
    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class FutureName(msgspec.Struct):
    request_id: str


class PassEnvelope(msgspec.Struct):
    """A JSON forward_backward or forward: who and when, with the data read afterwards, so that data nobody can use
    still takes its turn."""

    model_id: str
    seq_id: int | None = None
    forward_backward_input: msgspec.Raw = msgspec.Raw(b"")
    forward_input: msgspec.Raw = msgspec.Raw(b"")


class JsonTensor(msgspec.Struct):
    data: list[float]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class JsonDatum(msgspec.Struct):
    model_input: ModelInput
    loss_fn_inputs: dict[str, JsonTensor]


class PassInput(msgspec.Struct):
    data: list[JsonDatum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class TinkerPath(msgspec.Struct):
    tinker_path: str


class Ttl(msgspec.Struct):
    ttl_seconds: int | None = None


class CopyWeights(msgspec.Struct):
    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None


class FinishReason(msgspec.Struct, frozen=True):
    type: str = "success"


class FinishSession(msgspec.Struct):
    reason: FinishReason = FinishReason()
    detail: str | None = None


class Project(msgspec.Struct):
    project_id: str | None = None


class SearchSessions(msgspec.Struct):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    statuses: list[dict[str, Any]] | None = None
    limit: int = 50
    cursor: dict[str, str] | None = None


def read(body: bytes, kind: type[T]) -> T:
    """A JSON body. Raises InvalidRequest naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not what this route takes: {error}") from None
