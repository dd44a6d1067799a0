"""The plain data that travels between the parts: what is asked, what one step does, what came out.

Structs of integers, floats, strings and lists; msgspec encodes them across the process border. No torch, no logic
beyond properties. Everything here may be logged, replayed and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

# ---------------------------------------------------------------- what a user asks


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen. Validated in `tandem/api/schemas.py`; ranges as in OpenAI's API.

    temperature 0 is greedy. top_k 0 is off. seed None lets the engine draw one. logprobs is the number of
    alternatives to report beside the chosen token (0: the chosen token only, None: nothing); prompt_logprobs likewise
    for the prompt's own tokens. Stop strings are text, so they live in the API process, not here.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt as token ids, and what to do with it. `adapter` is a name (None: the base model).

    `keep_for_training`: what comes of it is going to be trained on. Where the adapter is an open run's as it is now, a
    pass over the prompt and an answer need not go forward again until the run's next update.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams = SamplingParams()
    adapter: str | None = None
    priority: int = 0
    keep_for_training: bool = False


class Example(msgspec.Struct, frozen=True, array_like=True):
    """One training sequence: at position i the model reads `tokens[i]` and should predict `targets[i]`.

    `weights[i]` is what that prediction counts in the loss, sum(weight * -log p(target)); 0 leaves it out. All three
    have the same length. A batch's mean loss is the caller's: weights divided by their sum over the batch.

    For losses beyond cross-entropy (`finetune/losses.py` has the formulas), each as long as the tokens: `logprobs` are
    those of the targets when they were sampled, or a reference model's for dpo (empty: the engine computes them);
    `advantages` say how good each choice was. For cross-entropy with soft targets, position i has
    sum_k soft_weights[i][k] * -log p(soft_targets[i][k]) in place of its target's, times weights[i] all the same.
    """

    tokens: list[int]
    targets: list[int]
    weights: list[float]
    logprobs: list[float] = []
    advantages: list[float] = []
    soft_targets: list[list[int]] = []
    soft_weights: list[list[float]] = []


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The shape of an adapter to train. Names and meaning as in PEFT's LoraConfig; `("all-linear",)` is every target
    the model has. A starts uniform as PEFT's (kaiming, a = sqrt(5)), B at zero; `seed` draws A and the dropout masks.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    dropout: float = 0.0
    seed: int = 0


class OptimParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One update by the optimizer `kind` (`finetune/optimizer.py` has the formulas): adamw, adamw8bit, sgd, lion,
    adafactor or muon. A run keeps its kind, because of its state. `max_grad_norm` 0 does not clip.

    beta1, beta2: adamw, adamw8bit, lion. eps: adamw, adamw8bit. momentum: sgd (0 by default), muon (0.95).
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    kind: str = "adamw"
    momentum: float | None = None


class Pass(msgspec.Struct, frozen=True, tag=True):
    """Forward over some examples, and backward if it `learns`: gradients add up until the next Update.

    `loss` and `loss_params`: see `finetune/losses.py`. dpo takes examples in pairs, the preferred one first.
    `wants_logprobs`: the report has the log-probability of every position's target, also where the weight is 0.
    `frozen`: with the adapter that the run began from, or the base model where it began afresh; then it cannot learn.
    """

    run_id: str
    examples: list[Example]
    learns: bool = True
    loss: str = "cross_entropy"
    loss_params: dict[str, float] = {}
    wants_logprobs: bool = False
    frozen: bool = False

    @property
    def group_size(self) -> int:
        """How many examples in a row belong together: their gradients depend on each other's losses."""
        return 2 if self.loss == "dpo" else 1

    def num_counted(self, index: int) -> int:
        """Positions of an example that the head must look at."""
        example = self.examples[index]
        return len(example.tokens) if self.wants_logprobs else sum(weight != 0 for weight in example.weights)


class Update(msgspec.Struct, frozen=True, tag=True):
    """One optimiser step with the gradients added up so far, which are zero afterwards."""

    run_id: str
    params: OptimParams


class Probe(msgspec.Struct, frozen=True, tag=True):
    """One step without gradients (MeZO, `finetune/zeroth.py`): the loss of the examples at both ends of a line through
    the weights, `radius` away in a direction drawn from `seed`, and a step along it. Of `params` the learning rate,
    the weight decay and `max_grad_norm` count, here the largest slope. What passes have added up stays as it is.

    The radius is the paper's for LoRA factors. With its 1e-3 for whole models, a loss computed in bfloat16 differs by
    less than its rounding between the two ends."""

    run_id: str
    examples: list[Example]
    params: OptimParams
    seed: int
    radius: float = 1e-2
    loss: str = "cross_entropy"
    loss_params: dict[str, float] = {}

    def side(self) -> Pass:
        """The forward pass at either end."""
        return Pass(self.run_id, self.examples, False, self.loss, self.loss_params)


class Nudge(msgspec.Struct, frozen=True):
    """A part of a Probe: move the factors this far from where they were before it."""

    run_id: str
    seed: int
    distance: float


class Save(msgspec.Struct, frozen=True, tag=True):
    """Write a run's adapter, and its optimiser's state with it, to a new directory."""

    run_id: str
    path: str
    with_optimizer: bool = True


class Restore(msgspec.Struct, frozen=True, tag=True):
    """Put what a Save wrote into an open run of the same shape. Without its optimizer's state, that starts afresh;
    gradients added up so far are gone."""

    run_id: str
    path: str
    with_optimizer: bool = True


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Let requests use the run's adapter as it is now: a new version of the adapter `name`, which never changes."""

    run_id: str
    name: str


FileOp = Save | Restore
# What goes over the factors piece by piece.
FactorOp = Update | Probe | Nudge
TrainOp = Pass | Update | Probe | Save | Restore | Publish

# ---------------------------------------------------------------- what one step does


class Segment(msgspec.Struct, frozen=True, gc=False):
    """One sequence's slice of the flat batch: `length` tokens from position `start`.

    `samples`: the logits of the last token are wanted (the slice reaches the end of what is known).
    There is no phase: a decode is a segment of one token, a prefill chunk one of many, a training window one of a row
    below 0, whose activations are kept.
    """

    row: int
    start: int
    length: int
    samples: bool

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of training that runs between two forwards of serving.

    kind: "forward" or "backward" (one layer, tokens start:stop of a microbatch), "loss" (of its tokens that count,
    numbers start:stop) or "update" (parameters start:stop; `batch` is the run's version then).
    """

    kind: str
    batch: int
    layer: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does, in integers: replaying a list of plans replays the engine.

    `preempt`: rows that lose their blocks and return to the queue. `admit`: rows that leave the queue.
    A plan never has both. `predicted_s` is the cost model's estimate of the forward in seconds, `slices_s` of what
    training does after it. `evicts_training`: the forwarding microbatch gives up its KV blocks.
    """

    segments: tuple[Segment, ...] = ()
    admit: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()
    predicted_s: float = 0.0
    slices: tuple[Slice, ...] = ()
    slices_s: float = 0.0
    evicts_training: bool = False

    @property
    def num_tokens(self) -> int:
        return sum([s.length for s in self.segments])

    @property
    def requests(self) -> tuple[Segment, ...]:
        """The segments of requests' rows, without those of training."""
        return tuple([s for s in self.segments if s.row >= 0])


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The best alternatives at one position, best first; `rank` is the place of the chosen token (1 is the best)."""

    logprob: float
    rank: int
    token_ids: list[int]
    logprobs: list[float]


@dataclass(slots=True)
class StepResult:
    """What the device says: for each sampling row its next token, and log-probabilities where they were asked for.

    `prompt_logprobs[row]` holds one entry per prompt token of this step's segment that has a successor in the prompt.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TopLogprobs]] = field(default_factory=dict)
    seconds: float = 0.0


# ---------------------------------------------------------------- what a user gets


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """News of one choice of one request. The last event of a choice has `finish_reason` stop, length or cancelled.

    `token_id` is None where the event carries no token (cancelled; prompt log-probabilities of max_tokens=0).
    `stop_token` says that token_id ended the text and is not part of it.
    `cached_tokens`, `prompt_logprobs` and `queue_s` (seconds from arrival to admission) come with a choice's first
    event.
    """

    request_id: str
    index: int = 0
    token_id: int | None = None
    logprob: TopLogprobs | None = None
    finish_reason: str | None = None
    stop_token: bool = False
    cached_tokens: int = 0
    prompt_logprobs: list[TopLogprobs] | None = None
    queue_s: float | None = None


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's counters and gauges after a step. Counters only grow. `train_parts_s`: seconds by kind of slice."""

    num_running: int = 0
    num_waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    step_s: float = 0.0
    predicted_wait_s: float = 0.0
    running_adapters: list[str] = []
    waiting_adapters: list[str] = []
    num_runs: int = 0
    num_spilled: int = 0
    run_bytes: int = 0
    train_tokens: int = 0
    train_s: float = 0.0
    train_parts_s: dict[str, float] = {}
    tpot_p95_s: float = 0.0
    ttft_p95_s: float = 0.0


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of itself once it is ready; start-up lines, /v1/models, /metrics and doctor read it."""

    model: str
    architecture: str
    num_parameters: int
    weight_bytes: int
    load_s: float
    device: str
    isa: str
    num_threads: int
    dtype: str
    block_size: int
    num_blocks: int
    kv_bytes: int
    max_model_len: int
    vocab_size: int
    batch_invariant: bool = False
    max_num_seqs: int = 0
    hidden_size: int = 0
    slo_tpot_s: float = 0.0
    slo_ttft_s: float = 0.0
    eos_token_ids: list[int] = []
    kernels: str = ""
    calibration: str = ""
    adapter_names: list[str] = []


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """A published adapter version. `version` is never reused; 0 is the base model."""

    name: str
    version: int
    rank: int
    path: str
    base_model: str = ""


class RunReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A training run as the engine opened it. `step` counts the optimiser steps already in its weights; `bytes_needed`
    is what it holds while it trains, beside the model's weights."""

    run_id: str
    num_parameters: int
    step: int = 0
    bytes_needed: int = 0


class PassReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one forward_backward or forward over some examples found, summed over their positions with a weight.

    `loss` is the loss, always a sum, never a mean; `num_tokens` the positions, `num_correct` those whose target was the
    likeliest token; `nll` the sum of -log p without weights, so that nll / num_tokens is the mean loss per trained
    token. `metrics` are sums too; which there are is the loss's (`finetune/losses.py`).

    `logprobs`, where asked for: one list per example, in it one number per position, whatever its weight; for an
    example with soft targets one per soft target, those of position 0 first.
    """

    loss: float
    nll: float
    num_tokens: int
    num_correct: int
    seconds: float = 0.0
    logprobs: list[list[float]] = []
    metrics: dict[str, float] = {}


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One optimiser step: its number in the run, and the gradient's norm before clipping."""

    step: int
    grad_norm: float


class SizeReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bytes that a training run would hold."""

    bytes_needed: int


class PublishReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The adapter version that a run was published as, and how long the engine took."""

    adapter: Adapter
    seconds: float = 0.0


TrainReport = RunReport | PassReport | UpdateReport | SizeReport | PublishReport
