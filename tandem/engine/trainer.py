"""The training side of one device: runs being trained, microbatches on their way, slices executed. Decides nothing.

Which slice is next is in the plan (`scheduler/`); how a slice works is `model/gradients.py`. Here they meet the runs'
factors, the losses and the optimiser.

Shape letters: N tokens of a microbatch, M of them that count in the loss, D hidden size, R rank, I and O features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from tandem.config import TrainingConfig
from tandem.errors import BudgetError, InvalidRequest
from tandem.finetune import checkpoint, zeroth
from tandem.finetune.losses import Objective, Part, Totals
from tandem.finetune.run import LayerPairs, Run
from tandem.memory import arena
from tandem.model.adapter import AdapterWeights, module_name, read_adapter
from tandem.model.decoder import Decoder, Record
from tandem.model.gradients import (
    KEPT,
    Buffers,
    DenseLayer,
    LayerFactors,
    Microbatch,
    TrainSequence,
    hash_64,
    layer_factors,
    logits,
)  # fmt: skip
from tandem.model.spec import targets
from tandem.scheduler.progress import Batch, Queued
from tandem.scheduler.training import LARGEST_WINDOW
from tandem.work import LoraConfig, Nudge, Pass, PassReport, Probe, Segment, Slice, Update, UpdateReport

# What training keeps between forward and backward when nobody says: this share of the free memory, at most so much.
FREE_SHARE = 0.25
MOST_KEPT_BYTES = 6 * 2**30
# The same on every machine, so that the same job gives the same bits.
DETERMINISTIC_KEPT_BYTES = 2**30
LARGEST_SCALING = 1e3


@dataclass(slots=True)
class Slot:
    """A run on the device: `layers` are its factors in the model's dtype, the scaling in b, as serving wants them.
    `is_shared`: a published version has these very tensors, so the next change makes new ones."""

    run: Run
    layers: list[dict[str, tuple[Tensor, Tensor]]]
    factors: LayerFactors
    init_from: str | None = None
    reference: LayerFactors | None = None  # the factors of `init_from`, once somebody has asked for them
    grad_norm: float = 0.0
    anchor_P: Tensor | None = None  # the weights before the probe under way
    is_shared: bool = False


@dataclass(slots=True)
class _Flight:
    """A microbatch with its losses."""

    micro: Microbatch
    objective: Objective
    rows: dict[int, tuple[int, Sequence[int]]] = field(default_factory=dict)  # row -> (its first token, token ids)


class Trainer:
    """Raises InvalidRequest, ModelError and BudgetError for runs that cannot be opened; Diverged from an update."""

    def __init__(
        self, decoder: Decoder, device: torch.device, config: TrainingConfig, base_model: str, max_rank: int
    ) -> None:
        self.decoder = decoder
        self.device = device
        self.config = config
        self.base_model = base_model
        self.max_rank = max_rank
        self.targets = targets(decoder.spec)
        self.slots: dict[int, Slot] = {}
        self.dense = DenseLayer(decoder)
        self._flights: dict[int, _Flight] = {}
        self._totals: dict[int, Totals] = {}
        self._references: dict[int, Mapping[int, list[float]]] = {}
        self._sides: dict[int, list[Totals]] = {}  # of probes, the farther one first
        self._kept_bytes = config.train_memory_bytes or self._default_kept_bytes()
        self._buffers = Buffers(self.batch_tokens(), decoder.dtype, device)

    def _default_kept_bytes(self) -> int:
        if self.config.deterministic:
            return DETERMINISTIC_KEPT_BYTES
        return min(int(arena.available_bytes(self.device, 1.0) * FREE_SHARE), MOST_KEPT_BYTES)

    # ------------------------------------------------------------ runs

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, int]]:
        """(in, out) features of the targets that `lora` names, in the model's order. Raises InvalidRequest."""
        if not 1 <= lora.rank <= self.max_rank:
            raise InvalidRequest(f"rank must be 1 to {self.max_rank} (--max-lora-rank), not {lora.rank}", "rank")
        if not 0.0 <= lora.dropout < 1.0:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {lora.dropout}", "dropout")
        if not 0.0 < abs(lora.alpha) < LARGEST_SCALING * self.max_rank:
            raise InvalidRequest(
                f"alpha must not be 0, nor beyond {LARGEST_SCALING * self.max_rank:g}, but is {lora.alpha}", "alpha"
            )
        named = set(lora.target_modules)
        if "all-linear" in named:
            named = named - {"all-linear"} | self.targets.keys()
        if unknown := sorted(named - self.targets.keys()):
            raise InvalidRequest(
                f"target module {unknown[0]!r} does not exist in this model: use all-linear or some of "
                f"{', '.join(self.targets)}",
                "target_modules",
            )
        if not named:
            raise InvalidRequest("target_modules is empty: use all-linear", "target_modules")
        return {name: (t.in_features, t.out_features) for name, t in self.targets.items() if name in named}

    def estimate(self, lora: LoraConfig, longest: int) -> int:
        """Bytes that a run whose longest example has `longest` tokens holds while it trains: the least it can do
        with."""
        spec, size = self.decoder.spec, self.decoder.dtype.itemsize
        parameters = len(spec.layers) * lora.rank * sum(i + o for i, o in self.shapes(lora).values())
        window = min(longest, self.config.train_window or LARGEST_WINDOW)
        inner = spec.intermediate_size
        layer = spec.num_parameters // max(1, len(spec.layers))
        return (
            parameters * (16 + 2 * size)
            + longest * self._input_bytes()
            + longest * 4 * (spec.hidden_size + 2 * spec.kv_size)
            + window * (8 * inner + 16 * spec.hidden_size) * max(size, 2)
            + layer * size
        )

    def check(self, lora: LoraConfig, longest: int) -> int:
        """`estimate`, or BudgetError where less is free."""
        arena.return_free_memory()
        needed, free = self.estimate(lora, longest), arena.available_bytes(self.device, 1.0) + self._buffers.nbytes
        if needed > free:
            raise BudgetError(
                f"training with sequences of {longest} tokens at rank {lora.rank} needs {needed / 1e9:.2f} GB and "
                f"{free / 1e9:.2f} GB are free: lower max_seq_len or rank, or free some memory"
            )
        return needed

    def open(
        self, version: int, lora: LoraConfig, init_from: str | None = None, resume_from: str | None = None
    ) -> Run:
        """Make or load a run. Raises InvalidRequest, ModelError."""
        shapes = self.shapes(lora)
        run = Run(lora, len(self.decoder.spec.layers), shapes, self.device)
        if resume_from is not None:
            checkpoint.restore(run, resume_from)
        elif init_from is not None:
            run.set_weights(self._unscaled(run, init_from))
        working = [
            {name: (torch.empty_like(a, dtype=self.decoder.dtype), torch.empty_like(b, dtype=self.decoder.dtype))
             for name, (a, b) in layer.items()}
            for layer in run.weights
        ]  # fmt: skip
        factors = layer_factors(working, run.gradients, self.targets, run.scaling)
        self.slots[version] = Slot(run, working, factors, init_from)
        self._refresh(version)
        return run

    def prepare_reference(self, version: int) -> None:
        """Have at hand what a frozen pass uses: the adapter that the run began from. Raises ModelError."""
        slot = self.slots[version]
        if slot.reference is not None:
            return
        if slot.init_from is None:
            slot.reference = [{} for _ in slot.layers]
            return
        dtype, scaling = self.decoder.dtype, slot.run.scaling
        layers = [
            {name: (a.to(dtype), (b * scaling).to(dtype)) for name, (a, b) in layer.items()}
            for layer in self._unscaled(slot.run, slot.init_from)
        ]
        slot.reference = layer_factors(layers, layers, self.targets, scaling)  # it never learns: no gradients

    def _unscaled(self, run: Run, path: str) -> LayerPairs:
        """A PEFT directory's factors in float32, if they have the run's shape. Raises ModelError, InvalidRequest."""
        weights = read_adapter(path, self.decoder.spec, torch.float32, self.device, self.max_rank, scaled=False)
        for layer in weights.layers:
            found = {name: (a.shape[0], a.shape[1], b.shape[1]) for name, (a, b) in layer.items()}
            if found != {name: (run.lora.rank, i, o) for name, (i, o) in run.shapes.items()}:
                raise InvalidRequest(
                    f"the adapter {path} has rank {weights.rank} and modules {', '.join(layer) or 'none'} in a layer; "
                    f"training goes on from it only with the same rank and target modules in every layer",
                    "model",
                )
        return weights.layers

    def close(self, version: int) -> None:
        del self.slots[version]
        if not self.slots:
            self.dense.drop()
            self._buffers.drop()
        arena.return_free_memory()

    def weights(self, version: int) -> AdapterWeights:
        """A run's factors as the serving pool takes them; they change with every update."""
        slot = self.slots[version]
        return AdapterWeights(slot.run.lora.rank, tuple(slot.layers))

    def _refresh(self, version: int) -> None:
        slot = self.slots[version]
        if slot.is_shared:
            for shared in slot.layers:
                shared.update({name: (torch.empty_like(a), torch.empty_like(b)) for name, (a, b) in shared.items()})
            slot.factors = layer_factors(slot.layers, slot.run.gradients, self.targets, slot.run.scaling)
            slot.is_shared = False
        for mine, layer in zip(slot.layers, slot.run.weights, strict=True):
            for name, (a_RI, b_RO) in layer.items():
                mine[name][0].copy_(a_RI)
                mine[name][1].copy_(b_RO * slot.run.scaling)

    def snapshot(self, version: int) -> AdapterWeights:
        """The same as they are now, whatever becomes of the run. Copies nothing: the next update does."""
        slot = self.slots[version]
        slot.is_shared = True
        return AdapterWeights(slot.run.lora.rank, tuple(dict(layer) for layer in slot.layers), self.base_model)

    def save(self, version: int, path: str, with_optimizer: bool = True) -> None:
        """Write a run to a new directory; its weights must not change meanwhile. Raises TandemError."""
        checkpoint.save(self.slots[version].run, path, module_name, self.base_model, with_optimizer)

    def load(self, version: int, path: str, with_optimizer: bool) -> None:
        """Put what `save` wrote into a run that has nothing under way. Raises ModelError, InvalidRequest; the run is as
        it was then."""
        run = self.slots[version].run
        if with_optimizer:
            checkpoint.restore(run, path)
        else:
            run.set_weights(self._unscaled(run, path))
            run.renew_optimizer()
        run.gradients_P.zero_()
        self._refresh(version)

    # ------------------------------------------------------------ microbatches

    def begin(self, batch: Batch) -> None:
        """Make room for a microbatch; its first layer's input is computed."""
        sequences: list[TrainSequence] = []
        ids: list[int] = []
        parts: list[Part] = []
        rows: dict[int, tuple[int, Sequence[int]]] = {}
        for row in batch.rows:
            op, start = row.queued.op, len(ids)
            assert isinstance(op, Pass)
            example = op.examples[row.index]
            slot = self.slots[row.run.version]
            key = hash_64(slot.run.lora.seed, slot.run.num_passes)
            slot.run.num_passes += op.learns
            dropout = slot.run.lora.dropout if op.learns else 0.0
            factors = slot.reference if op.frozen else slot.factors
            assert factors is not None
            sequences.append(TrainSequence(start, start + row.length, factors, dropout, key))
            rows[row.row] = (start, example.tokens)
            ids += example.tokens
            parts.append(Part(row.queued.op_id, op, row.index, start, start + row.length))
        with torch.no_grad():
            micro = Microbatch(
                self.decoder, self.dense, sequences, self._tensor(ids), self._kept_layers(len(ids)), batch.learns,
                self._buffers,
            )  # fmt: skip
        self._flights[batch.batch_id] = _Flight(micro, Objective(parts, self.device), rows)
        for op_id in {row.queued.op_id for row in batch.rows}:
            self._totals.setdefault(op_id, Totals())

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _input_bytes(self) -> int:
        """Bytes a token of the layers' inputs, the least that is kept."""
        return (len(self.decoder.spec.layers) + 1) * self.decoder.spec.hidden_size * self.decoder.dtype.itemsize

    def _kept_layers(self, num_tokens: int) -> int:
        """How many layers also keep their linears' outputs: two microbatches are on their way at once."""
        layer = self.decoder.weights.layers[0]
        per_layer = sum(getattr(layer, name).out_features for name in KEPT) * self.decoder.dtype.itemsize
        allowed = self._kept_bytes / 2
        if not self.config.deterministic:
            free = arena.available_bytes(self.device, 1.0) + self._buffers.nbytes
            allowed = min(allowed, free / 2)
        left = allowed / max(num_tokens, self._buffers.num_rows) - self._input_bytes()
        return max(0, min(len(self.decoder.spec.layers), int(left / per_layer)))

    def batch_tokens(self) -> int:
        """Tokens of a microbatch that the memory budget allows, at most as many as asked for."""
        fits = int(self._kept_bytes / 2 / self._input_bytes())
        return max(1, min(self.config.train_batch_tokens, fits))

    def end(self, batch_id: int) -> None:
        if (flight := self._flights.pop(batch_id, None)) is not None:  # None: there was no memory to begin it
            flight.micro.release()

    def tokens(self, batch_id: int, row: int) -> Sequence[int]:
        """Token ids of a training row."""
        return self._flights[batch_id].rows[row][1]

    def recorder(self, batch_id: int, segments: Sequence[Segment], starts: Mapping[int, int]) -> Record:
        """Keeps what a shared forward pass computes for the training rows among its segments; `starts[row]` is a row's
        first place in the flat batch."""
        flight = self._flights[batch_id]
        spans = [
            (starts[s.row], s.length, flight.rows[s.row][0] + s.start) for s in segments if s.row < 0
        ]  # fmt: skip

        def record(layer: int, name: str, tensor: Tensor) -> None:
            for at, length, start in spans:
                flight.micro.take(layer, name, start, tensor[at : at + length])

        return record

    # ------------------------------------------------------------ slices

    def run(self, piece: Slice, due: Queued | None) -> float:
        """Execute one slice; returns the seconds it took. `due` is an update's operation. Raises Diverged."""
        start = time.perf_counter()
        if piece.kind == "update":
            assert due is not None
            self._move(piece, due)
        else:
            flight = self._flights[piece.batch]
            if piece.kind == "forward":
                flight.micro.forward(piece.layer, piece.start, piece.stop)
            elif piece.kind == "backward":
                flight.micro.backward(piece.layer, piece.start, piece.stop)
            else:
                self._loss(flight, piece.start, piece.stop)
        return time.perf_counter() - start

    def _loss(self, flight: _Flight, start: int, stop: int) -> None:
        micro, objective = flight.micro, flight.objective
        hidden_ND = micro.input(micro.num_layers)
        rows_M = objective.rows_M[start:stop]
        x_MD = hidden_ND[rows_M]
        grad_MD = torch.empty_like(x_MD) if micro.learns else None
        objective.score(
            start, stop, x_MD, lambda x: logits(self.decoder, self.dense, x), self.decoder.spec.vocab_size, grad_MD
        )
        if grad_MD is not None:
            if micro.grad_ND is None:
                micro.grad_ND = torch.zeros_like(hidden_ND)
            micro.grad_ND[rows_M] = grad_MD
        if stop == len(objective.rows_M):
            objective.finish(self._totals, self._references, micro.grad_ND)

    def _move(self, piece: Slice, due: Queued) -> None:
        slot = self.slots[piece.batch]
        run, op = slot.run, due.op
        first, last = piece.start == 0, piece.stop == run.num_parameters
        if isinstance(op, Update):
            if first:
                slot.grad_norm = run.optimizer.norm(run.gradients_P, op.params)
            run.optimizer.update(run.weights_P, run.gradients_P, piece.start, piece.stop, op.params, slot.grad_norm)
        else:
            assert isinstance(op, Probe | Nudge)
            if slot.anchor_P is None:
                slot.anchor_P = run.weights_P.clone()
            where = run.weights_P, slot.anchor_P, run.optimizer.matrices, piece.start, piece.stop, op.seed
            if isinstance(op, Nudge):
                zeroth.nudge(*where, op.distance)
            else:
                if first:
                    higher, lower = self._sides[due.op_id]
                    slot.grad_norm = zeroth.slope_of(higher.loss, lower.loss, op.radius, op.params)
                zeroth.step(*where, slot.grad_norm, op.params)
        if last:
            if not isinstance(op, Nudge):
                run.optimizer.step += 1
                slot.anchor_P = None
            self._refresh(piece.batch)

    def discard(self, version: int) -> None:
        """Forget what passes have added up, and a probe that is half done."""
        slot = self.slots[version]
        slot.run.gradients_P.zero_()
        self.undo_probe(version)

    def undo_probe(self, version: int) -> None:
        """Go back to the weights before the probe that is under way, if there is one."""
        slot = self.slots[version]
        if slot.anchor_P is not None:
            slot.run.weights_P.copy_(slot.anchor_P)
            slot.anchor_P = None
            self._refresh(version)

    def pass_report(self, op_id: int, seconds: float) -> PassReport:
        """What a finished pass found."""
        self._references.pop(op_id, None)
        return self._totals.pop(op_id, Totals()).report(seconds)

    def help(self, helper: Queued, needed_by: int) -> None:
        """An operation that another needs is done: a frozen pass by whose log-probabilities dpo judges, or one side of
        a probe."""
        if isinstance(helper.op, Pass):
            found = self._totals.pop(helper.op_id, Totals())
            if helper.op.frozen:
                self._references[needed_by] = found.logprobs
            else:
                self._sides.setdefault(needed_by, []).append(found)

    def probe_report(self, op_id: int, version: int, seconds: float) -> PassReport:
        """What a finished probe found: means of both sides, and the slope between them."""
        higher, lower = self._sides.pop(op_id)
        report = higher.report(seconds)
        return msgspec.structs.replace(
            report, loss=(higher.loss + lower.loss) / 2, nll=(higher.nll + lower.nll) / 2,
            metrics={"slope": self.slots[version].grad_norm},
        )  # fmt: skip

    def forget_op(self, op_id: int) -> None:
        self._totals.pop(op_id, None)
        self._references.pop(op_id, None)
        self._sides.pop(op_id, None)

    def update_report(self, version: int) -> UpdateReport:
        slot = self.slots[version]
        return UpdateReport(step=slot.run.optimizer.step, grad_norm=slot.grad_norm)
