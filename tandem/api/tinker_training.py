"""What Tinker's training operations do: each is checked, takes its turn in its model's order, and ends in a future.

The engine's run is the model. Data that cannot be trained on still takes its turn and fails there: the client has
counted it, and what it sends next must not wait for it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from tandem.api.tinker_futures import Future
from tandem.api.tinker_results import PassResult, Plain, Result
from tandem.api.tinker_schemas import CreateModel, LoraShape, OptimStep
from tandem.api.tinker_sessions import Model, Session, Sessions
from tandem.api.tinker_wire import PassData, PassRequest
from tandem.errors import InvalidRequest, NotFound, TandemError
from tandem.jobs.checkpoints import RunRecord
from tandem.work import LoraConfig, OptimParams

ALPHA = 32.0  # Tinker's, whatever the rank
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
LARGEST_INLINE_BODY = 2**16
OPTIMIZERS = ("adamw", "adamw8bit", "sgd", "lion", "adafactor", "muon")


# ---------------------------------------------------------------- models


def create_model(sessions: Sessions, session: Session, body: CreateModel) -> Future:
    """Raises NotFound for a base model that is not served here, InvalidRequest for what this server cannot train."""
    model_id = f"{session.session_id}:train:{body.model_seq_id}"
    if known := sessions.futures.find(model_id):
        return known
    check_base(sessions, body.base_model)
    shape = body.lora_config
    if shape is None:
        raise InvalidRequest("only LoRA models can be trained here: give lora_config", "lora_config")
    optimizer = str((body.optimizer_config or {}).get("type", "adamw"))
    check_optimizer(optimizer)
    lora = lora_config(sessions, shape)
    model = Model(
        model_id, session, body.base_model, shape.rank, shape.train_attn, shape.train_mlp, optimizer
    )  # fmt: skip
    return open_run(sessions, model, lora, body.user_metadata, "create_model", None, False)


def check_base(sessions: Sessions, base_model: str) -> None:
    if not base_model or not sessions.serving.is_base(base_model):
        names = ", ".join(sessions.serving.model_names)
        raise NotFound(f"the base model {base_model[:200]!r} is not served here: use {names}", "base_model")


def check_optimizer(optimizer: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise InvalidRequest(
            f"the optimizer {optimizer[:40]!r} is not available: use one of {', '.join(OPTIMIZERS)}", "optimizer_config"
        )


def lora_config(sessions: Sessions, shape: LoraShape) -> LoraConfig:
    """Raises InvalidRequest where nothing would be trained. The output head never carries an adapter."""
    targets = _targets(sessions, shape.train_attn, shape.train_mlp)
    if not targets:
        raise InvalidRequest(
            "train_attn or train_mlp must be true: the output head cannot be trained here", "lora_config"
        )
    seed = secrets.randbits(31) if shape.seed is None else shape.seed
    if not -(2**63) <= seed < 2**63:
        raise InvalidRequest(f"seed must fit 64 bits, not {seed}", "lora_config")
    return LoraConfig(rank=shape.rank, alpha=ALPHA, target_modules=targets, seed=seed)


def _targets(sessions: Sessions, train_attn: bool, train_mlp: bool) -> tuple[str, ...]:
    if train_attn and train_mlp:
        return ("all-linear",)
    fused = sessions.serving.report.architecture.lower().startswith("phi3")
    names = ATTENTION * train_attn + MLP * train_mlp
    unknown = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if fused else ("qkv_proj", "gate_up_proj")
    return tuple(name for name in names if name not in unknown)


def open_run(
    sessions: Sessions, model: Model, lora: LoraConfig, user_metadata: dict[str, Any] | None, kind: str,
    path: Path | None, with_optimizer: bool,
) -> Future:  # fmt: skip
    """Begin a run; operations may be sent to it from now on."""
    session = model.session
    sessions.futures.check_room(session.tenant)
    where = str(path) if path is not None else None
    opened = sessions.serving.engine.open_run(
        model.model_id, lora, init_from=None if with_optimizer else where, resume_from=where if with_optimizer else None
    )
    session.models[model.model_id] = model
    session.model_ids.append(model.model_id)

    async def work() -> Result:
        try:
            await opened
            now = time.time()
            run = RunRecord(
                run_id=model.model_id, tenant=session.tenant, session_id=session.session_id,
                base_model=model.base_model, rank=model.rank, train_attn=model.train_attn, train_mlp=model.train_mlp,
                created_at=now, last_request_at=now, user_metadata=user_metadata,
            )  # fmt: skip
            await sessions.store.put_run(run)
        except TandemError:
            session.models.pop(model.model_id, None)
            session.model_ids.remove(model.model_id)
            raise
        return Plain({"type": kind, "model_id": model.model_id})

    return sessions.futures.add(session.tenant, session.session_id, model.model_id, kind, work())


def unload(sessions: Sessions, model: Model) -> Future:
    closed = sessions.drop_model(model)

    async def work() -> Result:
        await closed
        return Plain({"type": "unload_model", "model_id": model.model_id})

    session = model.session
    return sessions.futures.add(
        session.tenant, session.session_id, ("unload", model.model_id), "unload_model", work()
    )  # fmt: skip


# ---------------------------------------------------------------- passes and updates


async def run_pass(sessions: Sessions, model: Model, request: PassRequest, size: int) -> Future:
    """forward_backward, or forward."""
    kind = "forward" if request.forward_only else "forward_backward"
    if known := sessions.known_op(model, request.seq_id, kind):
        return known
    found: PassData | TandemError
    try:
        found = request.data() if size <= LARGEST_INLINE_BODY else await asyncio.to_thread(request.data)
    except TandemError as error:
        found = error
    engine = sessions.serving.engine
    act = engine.forward if request.forward_only else engine.forward_backward

    def start() -> Awaitable[Result]:
        if isinstance(found, TandemError):
            raise found
        report = act(model.model_id, found.examples, found.loss, found.loss_params, True)

        async def result() -> Result:
            done = await report
            sessions.count(model.session, "training", sum(len(example.tokens) for example in found.examples))
            return PassResult(done, found.shapes)

        return result()

    return sessions.submit(model, request.seq_id, kind, start)


def optim_step(sessions: Sessions, model: Model, body: OptimStep) -> Future:
    def start() -> Awaitable[Result]:
        report = sessions.serving.engine.optim_step(model.model_id, optim_params(model, body))

        async def result() -> Result:
            update = await report
            return Plain({"metrics": {"grad_norm:mean": update.grad_norm, "step:max": float(update.step)}})

        return result()

    return sessions.submit(model, body.seq_id, "optim_step", start)


def optim_params(model: Model, body: OptimStep) -> OptimParams:
    """Raises InvalidRequest for another optimizer than the model was created with, or a field that it does not take."""
    if (adam := body.adam_params) is not None:
        _check_kind(model, model.optimizer if model.optimizer == "adamw8bit" else "adamw")
        return OptimParams(
            kind=model.optimizer, learning_rate=adam.learning_rate, beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps,
            weight_decay=adam.weight_decay, max_grad_norm=adam.grad_clip_norm,
        )  # fmt: skip
    given = dict(body.optimizer_params or {})
    _check_kind(model, str(given.pop("type", "adamw")))
    if "grad_clip_norm" in given:
        given["max_grad_norm"] = given.pop("grad_clip_norm")
    given.setdefault("learning_rate", 1e-4)
    fields = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm", "momentum")
    for name, value in given.items():
        if name not in fields or not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidRequest(
                f"optimizer_params {name!r} is unknown or no number: there are {', '.join(fields)}", "optimizer_params"
            )
    return OptimParams(kind=model.optimizer, **given)


def _check_kind(model: Model, kind: str) -> None:
    if kind != model.optimizer:
        raise InvalidRequest(
            f"the model was created with the optimizer {model.optimizer}, and these are parameters of {kind[:40]!r}",
            "optimizer_params",
        )
