"""OpenAI's routes that try a grader out before a job depends on it.

What graders are is in `finetune/graders.py`, how they grade in `jobs/grading.py`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from fastapi import APIRouter
from starlette.responses import Response

from tandem.api.finetuning_schemas import GraderBody, GraderRunBody
from tandem.finetune.graders import Grader, Multi, ScoreModel, leaves
from tandem.finetune.templates import NoSuchField
from tandem.jobs.grading import Grade, GraderFailed

if TYPE_CHECKING:
    from tandem.jobs.service import Jobs

ERRORS = (
    "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
    "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
    "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
)  # fmt: skip
DETAILS = (
    "model_grader_server_error_details", "python_grader_runtime_error_details", "python_grader_server_error_type",
)  # fmt: skip
FAULTS = {"sample": "sample_parse_error", "model": "model_grader_parse_error"}


def add(routes: APIRouter, jobs: Jobs) -> None:
    @routes.post("/v1/fine_tuning/alpha/graders/validate", response_model=None)
    async def validate_grader(body: GraderBody) -> Response:
        """Check a grader as a job's creation would."""
        return _json({"grader": msgspec.to_builtins(jobs.grader(body.grader))})

    @routes.post("/v1/fine_tuning/alpha/graders/run", response_model=None)
    async def run_grader(body: GraderRunBody) -> Response:
        """Let a grader judge one answer."""
        grader = jobs.grader(body.grader)
        began = time.perf_counter()
        errors: dict[str, Any] = dict.fromkeys(ERRORS, False)
        grade = Grade(0.0, {})
        try:
            grade = await jobs.grade(grader, body.item, body.model_sample)
            errors |= {FAULTS[kind]: True for kind in grade.faults.values()}
        except NoSuchField as error:
            errors |= {"invalid_variable_error": True, "other_error_details": f"the item {error.message}"}
        except GraderFailed as error:
            errors |= {"other_error": True, "other_error_details": error.message}
        return _json(_result(grader, grade, errors, time.perf_counter() - began))


def _result(grader: Grader, grade: Grade, errors: dict[str, Any], seconds: float) -> dict[str, Any]:
    """`other_error_details` says what went wrong where OpenAI's reply has no place for it."""
    judges = [leaf.model for leaf in leaves(grader).values() if isinstance(leaf, ScoreModel)]
    return {
        "reward": grade.reward,
        "sub_rewards": grade.scores if isinstance(grader, Multi) else {},
        "metadata": {
            "name": grader.name,
            "type": type(grader).__struct_config__.tag,
            "errors": {**dict.fromkeys(DETAILS), **errors},
            "execution_time": seconds,
            "scores": grade.scores,
            "token_usage": grade.tokens if judges else None,
            "sampled_model_name": judges[0] if judges else None,
        },
        "model_grader_token_usage_per_model": {judges[0]: grade.tokens} if len(set(judges)) == 1 else {},
    }


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
