"""What Tinker's operations with weights do: saving, loading, snapshots to sample from. Each takes its turn in the order
of its model and ends in a future.

Where checkpoints are kept is in `jobs/checkpoints.py`, what the engine holds of them in `tinker_residents.py`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any

from tandem.api import tinker_training
from tandem.api.tinker_futures import Future
from tandem.api.tinker_results import Plain, Result
from tandem.api.tinker_schemas import LoadWeights, LoraShape, SaveWeights
from tandem.api.tinker_sessions import Model, Sampler, Sessions
from tandem.errors import InvalidRequest, TandemError
from tandem.jobs.checkpoints import CheckpointRecord, Kind, check_name, expiry, parse

VERBS: dict[Kind, str] = {
    "training": "save_weights", "sampler": "save_weights_for_sampler", "external": "save_weights_external",
}  # fmt: skip


def save(sessions: Sessions, model: Model, body: SaveWeights, kind: Kind) -> Future:
    """save_weights, save_weights_for_sampler with a name, save_weights_external."""
    verb = VERBS[kind]
    if body.age_encryption_recipients:
        raise InvalidRequest("files cannot be encrypted here: leave age_encryption_recipients out")
    engine, store = sessions.serving.engine, sessions.store

    def start() -> Awaitable[Result]:
        name = body.path or f"seq-{body.seq_id or model.order.next_seq - 1}"
        check_name(name)
        if (kind, name) in model.saving:
            raise InvalidRequest(f"{name!r} is being saved already: choose another name", "path")
        store.check_free(model.model_id, kind, name, body.overwrite)
        directory, now = store.new_directory(), time.time()
        record = CheckpointRecord(
            run_id=model.model_id, name=name, kind=kind, tenant=model.session.tenant, directory=directory.name,
            base_model=model.base_model, rank=model.rank, train_attn=model.train_attn, train_mlp=model.train_mlp,
            created_at=now, with_optimizer=kind == "training", optimizer=model.optimizer,
            expires_at=expiry(body.ttl_seconds, now), user_metadata=body.user_metadata,
        )  # fmt: skip
        published = _publish(sessions, model, record.path) if kind == "sampler" else None
        saved = engine.save_run(model.model_id, str(directory), record.with_optimizer)
        model.saving.add((kind, name))

        async def result() -> Result:
            try:
                if published is not None:
                    await published
                await saved
                await store.put(record)
                run = store.run(record.tenant, model.model_id)
                run.last_request_at = time.time()
                await store.put_run(run)
            except BaseException:
                sessions.residents.forget(record.path)
                raise
            finally:
                model.saving.discard((kind, name))
            sessions.residents.keep(record.path, directory)
            sessions.note(record.tenant, "checkpoint_create", record.path)
            return Plain({"type": verb, "path": record.path})

        return result()

    return sessions.submit(model, body.seq_id, verb, start)


def _publish(sessions: Sessions, model: Model, name: str) -> Awaitable[Any]:
    return sessions.residents.publish(model.model_id, model.session.session_id, name)


def snapshot(sessions: Sessions, model: Model, body: SaveWeights) -> Future:
    """save_weights_for_sampler without a name: a version of the adapter in memory, and a sampling session for it."""
    if body.kind not in ("snapshot", "inflight"):
        raise InvalidRequest(f"kind must be snapshot or inflight, not {body.kind[:40]!r}", "kind")
    session = model.session
    number = body.sampling_session_seq_id
    sampler_id = f"{session.session_id}:sample:{number if number is not None else f'm{body.seq_id}'}"
    name = f"tinker:{sampler_id}" if body.kind == "snapshot" else f"tinker:{model.model_id}:inflight"

    def start() -> Awaitable[Result]:
        if sampler_id in session.samplers:
            raise InvalidRequest(f"the sampling session {sampler_id} exists already", "sampling_session_seq_id")
        published = _publish(sessions, model, name)

        async def result() -> Result:
            try:
                await published
            except TandemError:
                sessions.residents.forget(name)
                raise
            session.samplers[sampler_id] = Sampler(sampler_id, session, model.base_model, name)
            return Plain({"type": "save_weights_for_sampler", "sampling_session_id": sampler_id})

        return result()

    return sessions.submit(model, body.seq_id, "save_weights_for_sampler", start)


def load(sessions: Sessions, tenant: str, body: LoadWeights) -> Future:
    """Into an open model in its order, or as a new model. Raises NotFound, InvalidRequest, Gone."""
    if body.weights_access_token:
        raise InvalidRequest("access tokens are not used here: publish the checkpoint instead", "weights_access_token")
    if body.model_id is not None:
        return _load_into(sessions, sessions.model(tenant, body.model_id), body)
    if body.session_id is None or body.model_seq_id is None:
        raise InvalidRequest("give model_id, or session_id and model_seq_id", "model_id")
    session = sessions.session(tenant, body.session_id)
    model_id = f"{session.session_id}:train:{body.model_seq_id}"
    if known := sessions.futures.find(model_id):
        return known
    record = sessions.store.readable(tenant, body.path)
    _check_optimizer_saved(record, body.optimizer)
    base_model = body.base_model or record.base_model
    tinker_training.check_base(sessions, base_model)
    optimizer = record.optimizer if body.optimizer else str((body.optimizer_config or {}).get("type", "adamw"))
    tinker_training.check_optimizer(optimizer)
    shape = LoraShape(record.rank, None, False, record.train_mlp, record.train_attn)
    model = Model(model_id, session, base_model, record.rank, record.train_attn, record.train_mlp, optimizer)
    directory = sessions.store.directory(record)
    lora = tinker_training.lora_config(sessions, shape)
    return tinker_training.open_run(
        sessions, model, lora, body.user_metadata, "load_weights", directory, body.optimizer
    )  # fmt: skip


def _check_optimizer_saved(record: CheckpointRecord, wanted: bool) -> None:
    if wanted and not record.with_optimizer:
        raise InvalidRequest(
            f"{record.path} holds weights alone, without an optimizer's state: load it without, or one of save_weights",
            "optimizer",
        )


def _load_into(sessions: Sessions, model: Model, body: LoadWeights) -> Future:
    def start() -> Awaitable[Result]:
        run_id, kind, name = parse(body.path)
        if run_id == model.model_id and (kind, name) in model.saving:
            raise InvalidRequest(f"{body.path} is still being saved: await that first", "path")
        record = sessions.store.readable(model.session.tenant, body.path)
        _check_optimizer_saved(record, body.optimizer)
        if body.optimizer and record.optimizer != model.optimizer:
            raise InvalidRequest(f"{body.path} has the state of {record.optimizer}, the model uses {model.optimizer}")
        directory = sessions.store.directory(record)
        loaded = sessions.serving.engine.load_run(model.model_id, str(directory), body.optimizer)

        async def result() -> Result:
            await loaded
            return Plain({"type": "load_weights", "path": body.path, "model_id": model.model_id})

        return result()

    return sessions.submit(model, body.seq_id, "load_weights", start)


