"""The training side of one device: runs being trained, microbatches on their way, slices executed. Decides nothing.

Which slice is next is in the plan (`scheduler/`); how a slice works is `model/gradients.py`. Here they meet the runs'
factors, the losses and the optimiser.

Shape letters: N tokens of a microbatch, M of them that count in the loss, D hidden size, R rank, I and O features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch
from torch import Tensor

from tandem.config import TrainingConfig
from tandem.errors import BudgetError, InvalidRequest
from tandem.finetune import checkpoint, spill, zeroth
from tandem.finetune.losses import Head, Objective, Part, Totals
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
    raw_logits,
)  # fmt: skip
from tandem.model.kept import Kept
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
# Of what training may keep: the part for what requests have computed before it, and microbatches it should be enough
# for. More of them than so many would only take memory.
REUSE_SHARE = 0.25
REUSED_BATCHES, MOST_REUSED_BATCHES = 4, 16
# The state of open runs, when nobody says how much of it may be in memory.
RESIDENT_SHARE = 0.4
# Bytes of a parameter's float32 weight, gradient and optimizer's moments, of which adamw has the most.
STATE_BYTES = 16
REFERENCE = "reference"


# Per layer, by target: (a_RI, b_RO) in the model's dtype, the scaling in b.
Layers = list[dict[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A run's tensors on their way into memory."""

    tensors: Mapping[str, Tensor]
    layers: Layers
    reference_layers: Layers | None


@dataclass(slots=True)
class Slot:
    """A run on the device: `layers` are its factors in the model's dtype, the scaling in b, as serving wants them.
    `is_shared`: a published version has these very tensors, so the next change makes new ones. A run that is elsewhere
    has neither layers nor factors; `spilled` says where its tensors are, None: it has not begun yet."""

    run: Run
    layers: Layers
    factors: LayerFactors
    init_from: str | None = None
    reference: LayerFactors | None = None  # the factors of `init_from`, once somebody has asked for them
    reference_layers: Layers | None = None  # what those consist of
    spilled: spill.Spilled | None = None
    grad_norm: float = 0.0
    anchor_P: Tensor | None = None  # the weights before the probe under way
    is_shared: bool = False

    @property
    def has_reference(self) -> bool:
        """The reference is here, or where the run is."""
        elsewhere = self.spilled.entries if self.spilled is not None else ()
        return self.reference is not None or any(name.startswith(REFERENCE) for name in elsewhere)


@dataclass(slots=True)
class _Flight:
    """A microbatch with its losses."""

    micro: Microbatch
    objective: Objective
    rows: dict[int, tuple[int, Sequence[int]]] = field(default_factory=dict)  # row -> (its first token, token ids)
    places_E: Tensor | None = None  # of all examples' tokens, where some are shared


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
        self._head = Head(
            partial(raw_logits, decoder, self.dense), decoder.kernels.cross_entropy_, decoder.spec.final_softcap,
            decoder.spec.vocab_size,
        )  # fmt: skip
        self._flights: dict[int, _Flight] = {}
        self._totals: dict[int, Totals] = {}
        self._references: dict[int, Mapping[int, list[float]]] = {}
        self._sides: dict[int, list[Totals]] = {}  # of probes, the farther one first
        self._kept_bytes = config.train_memory_bytes or self._default_kept_bytes()
        free_bytes = arena.available_bytes(device, 1.0)
        self.resident_bytes = config.train_resident_bytes or int(free_bytes * RESIDENT_SHARE)
        self._buffers = Buffers(self.batch_tokens(), decoder.dtype, device)
        self.kept, self._reused_layers = self._make_kept()

    def _default_kept_bytes(self) -> int:
        if self.config.deterministic:
            return DETERMINISTIC_KEPT_BYTES
        return min(int(arena.available_bytes(self.device, 1.0) * FREE_SHARE), MOST_KEPT_BYTES)

    def _make_kept(self) -> tuple[Kept, int]:
        """Room for what requests computed, and how many layers' outputs are kept there too. None where the budget is
        too small for both, or where nothing may depend on what was served."""
        spec, tokens = self.decoder.spec, self.batch_tokens()
        layers, outputs = len(spec.layers), self.decoder.weights.layers[0]
        spare = self._kept_bytes - 2 * tokens * self._input_bytes()
        budget = 0 if self.config.deterministic else int(spare * REUSE_SHARE)
        kept_layers = self._layers_within(budget / (REUSED_BATCHES * tokens) - self._input_bytes())
        token_bytes = self._input_bytes() + kept_layers * self._output_bytes()
        capacity = min(budget // token_bytes, MOST_REUSED_BATCHES * tokens)
        widths = {(layer, "input"): spec.hidden_size for layer in range(1, layers + 1)}
        for layer in range(layers - kept_layers, layers):
            widths |= {(layer, name): getattr(outputs, name).out_features for name in KEPT}
        return Kept(widths, max(0, capacity), self.decoder.dtype, self.device), kept_layers

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
        parameters = self._num_parameters(lora)
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

    def _num_parameters(self, lora: LoraConfig) -> int:
        return len(self.decoder.spec.layers) * lora.rank * sum(i + o for i, o in self.shapes(lora).values())

    def state_bytes(self, lora: LoraConfig, has_reference: bool = False) -> int:
        """Bytes of a run's state in memory at most: float32 weights, gradients and optimizer's moments, the factors in
        the model's dtype, and those of the adapter it began from, which dpo compares with. Raises InvalidRequest."""
        return self._num_parameters(lora) * (STATE_BYTES + self.decoder.dtype.itemsize * (1 + has_reference))

    def check(self, lora: LoraConfig, longest: int, spare_bytes: int = 0) -> int:
        """`estimate`, or BudgetError where less is free. `spare_bytes` more are once other runs have left."""
        arena.return_free_memory()
        needed, free = self.estimate(lora, longest), arena.available_bytes(self.device, 1.0) + self._buffers.nbytes
        free += spare_bytes
        if needed > free:
            raise BudgetError(
                f"training with sequences of {longest} tokens at rank {lora.rank} needs {needed / 1e9:.2f} GB and "
                f"{free / 1e9:.2f} GB are free: lower max_seq_len or rank, or free some memory"
            )
        return needed

    def open(
        self,
        version: int,
        lora: LoraConfig,
        init_from: str | None = None,
        resume_from: str | None = None,
        is_here: bool = True,
    ) -> Run:
        """Make or load a run; one that is not to be here yet begins afresh, when it comes. Raises InvalidRequest,
        ModelError."""
        shapes = self.shapes(lora)
        run = Run(lora, len(self.decoder.spec.layers), shapes, self.device, is_here)
        if not is_here:
            assert init_from is None and resume_from is None
            self.slots[version] = Slot(run, [{} for _ in self.decoder.spec.layers], [])
            return run
        if resume_from is not None:
            checkpoint.restore(run, resume_from)
        elif init_from is not None:
            run.set_weights(self._unscaled(run, init_from))
        layers = self._working(run.weights, run.scaling)
        factors = layer_factors(layers, run.gradients, self.targets, run.scaling)
        self.slots[version] = Slot(run, layers, factors, init_from)
        return run

    def _working(self, layers: LayerPairs, scaling: float) -> Layers:
        """Factors as serving wants them, and training's forward pass: in the model's dtype, the scaling in b."""
        dtype = self.decoder.dtype
        return [
            {name: (a.to(dtype, copy=True), (b * scaling).to(dtype)) for name, (a, b) in layer.items()}
            for layer in layers
        ]

    # ------------------------------------------------------------ out of memory and back

    def is_between(self, version: int) -> bool:
        """A probe is half done."""
        return self.slots[version].anchor_P is not None

    def tensors(self, version: int) -> dict[str, Tensor]:
        """All that `leave` lets go of and `fetched` has to find again."""
        slot = self.slots[version]
        found = slot.run.tensors()
        for index, layer in enumerate(slot.reference_layers or []):
            for name, pair in layer.items():
                found |= {f"{REFERENCE} {index} {name} {side}": t for side, t in zip("ab", pair, strict=True)}
        return found

    def leave(self, version: int, spilled: spill.Spilled) -> None:
        """A run's tensors are there: let go of those here. A published version keeps its own."""
        slot = self.slots[version]
        slot.run.leave()
        for layer in slot.layers:
            layer.clear()
        slot.factors, slot.is_shared, slot.spilled = [], False, spilled
        if slot.reference_layers is not None:
            slot.reference = slot.reference_layers = None

    def fetched(self, slot: Slot) -> Arrival:
        """Bring a run's tensors in, on any thread; nothing of the slot changes. Raises OSError."""
        run = slot.run
        if slot.spilled is None:
            tensors = run.fresh()
        else:
            tensors = spill.read(slot.spilled, self.device)
        reference: Layers = [{} for _ in slot.layers]
        for key in [k for k in tensors if k.startswith(REFERENCE)]:
            _, index, name, side = key.split()
            if side == "a":
                b_RO = tensors.pop(key.removesuffix("a") + "b")
                reference[int(index)][name] = (tensors.pop(key), b_RO)
        layers = self._working(run.factors_of(tensors), run.scaling)
        return Arrival(tensors, layers, reference if any(reference) else None)

    def arrive(self, version: int, arrival: Arrival) -> None:
        """The reverse of `leave`."""
        slot = self.slots[version]
        slot.run.take(arrival.tensors)
        for mine, layer in zip(slot.layers, arrival.layers, strict=True):
            mine.update(layer)
        slot.factors = layer_factors(slot.layers, slot.run.gradients, self.targets, slot.run.scaling)
        slot.spilled = None
        if arrival.reference_layers is not None:
            self._set_reference(slot, arrival.reference_layers)

    def _set_reference(self, slot: Slot, layers: Layers) -> None:
        # It never learns: no gradients.
        slot.reference, slot.reference_layers = layer_factors(layers, layers, self.targets, slot.run.scaling), layers

    # ------------------------------------------------------------ what runs are made of

    def prepare_reference(self, version: int) -> None:
        """Have at hand what a frozen pass uses: the adapter that the run began from. Raises ModelError."""
        slot = self.slots[version]
        if slot.has_reference:
            return
        if slot.init_from is None:
            slot.reference = [{} for _ in slot.layers]
            return
        self._set_reference(slot, self._working(self._unscaled(slot.run, slot.init_from), slot.run.scaling))

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
        self.kept.change(version)
        if not self.slots:
            self.kept.drop()
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
        self.kept.change(version)
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

    def known(self, batch: Batch) -> dict[int, list[int]]:
        """Rows of a microbatch that requests have computed before, with this very adapter, and where that is kept."""
        found = {}
        for row in batch.rows:
            op = row.queued.op
            assert isinstance(op, Pass)
            masks = op.learns and self.slots[row.run.version].run.lora.dropout > 0
            if not (masks or op.frozen or op.group_size > 1):
                places = self.kept.find(row.run.version, op.examples[row.index].tokens)
                if places is not None:
                    found[row.row] = places[row.num_shared :]
        return {} if batch.is_shared and len(found) < len(batch.rows) else found

    def begin(self, batch: Batch, known: Mapping[int, list[int]]) -> None:
        """Make room for a microbatch; its first layer's input is computed. The `known` rows, which come first, need no
        way up."""
        sequences: list[TrainSequence] = []
        ids: list[int] = []
        parts: list[Part] = []
        rows: dict[int, tuple[int, Sequence[int]]] = {}
        places: list[int] = []
        for row in batch.rows:
            op, start, read = row.queued.op, len(ids), len(places)
            assert isinstance(op, Pass)
            example = op.examples[row.index]
            slot = self.slots[row.run.version]
            key = hash_64(slot.run.lora.seed, slot.run.num_passes)
            slot.run.num_passes += op.learns
            dropout = slot.run.lora.dropout if op.learns else 0.0
            factors = slot.reference if op.frozen else slot.factors
            assert factors is not None
            sequence = TrainSequence(start, start + row.length, factors, dropout, key, row.past)
            sequences.append(sequence)
            rows[row.row] = (start, example.tokens)
            ids += example.tokens[row.num_shared :]
            places += sequence.rows(sequence.stop)
            parts.append(Part(row.queued.op_id, op, row.index, read, len(places)))
        kept_layers = self._kept_layers(len(ids))
        if known:
            kept_layers = min(kept_layers, self._reused_layers)
        with torch.no_grad():
            micro = Microbatch(
                self.decoder, self.dense, sequences, self._tensor(ids), kept_layers, batch.learns, self._buffers
            )
        places_E = self._tensor(places) if batch.is_shared else None
        self._flights[batch.batch_id] = _Flight(micro, Objective(parts, self.device), rows, places_E)
        for op_id in {row.queued.op_id for row in batch.rows}:
            self._totals.setdefault(op_id, Totals())
        if known:
            places_N = self._tensor([place for row in batch.rows for place in known.get(row.row, ())])
            micro.fill(len(places_N), lambda layer, name, rows: self.kept.read(layer, name, places_N, rows))
            for row in batch.rows[: len(known)]:
                metrics = self._totals[row.queued.op_id].metrics
                metrics["reused_tokens"] = metrics.get("reused_tokens", 0.0) + row.num_shared + row.length

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _input_bytes(self) -> int:
        """Bytes a token of the layers' inputs, the least that is kept."""
        return (len(self.decoder.spec.layers) + 1) * self.decoder.spec.hidden_size * self.decoder.dtype.itemsize

    def _output_bytes(self) -> int:
        """Bytes a token and layer of the linears' outputs."""
        layer = self.decoder.weights.layers[0]
        return sum(getattr(layer, name).out_features for name in KEPT) * self.decoder.dtype.itemsize

    def _layers_within(self, token_bytes: float) -> int:
        """How many layers' outputs fit into so many bytes a token."""
        return max(0, min(len(self.decoder.spec.layers), int(token_bytes / self._output_bytes())))

    def _kept_layers(self, num_tokens: int) -> int:
        """How many layers also keep their linears' outputs: two microbatches are on their way at once."""
        allowed = (self._kept_bytes - self.kept.nbytes) / 2
        if not self.config.deterministic:
            free = arena.available_bytes(self.device, 1.0) + self._buffers.nbytes
            allowed = min(allowed, free / 2)
        return self._layers_within(allowed / max(num_tokens, self._buffers.num_rows) - self._input_bytes())

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
        micro, objective, places_E = flight.micro, flight.objective, flight.places_E
        hidden_ND = micro.input(micro.num_layers)
        rows_M = objective.rows_M[start:stop]
        if places_E is not None:
            rows_M = places_E[rows_M]
        x_MD = hidden_ND[rows_M]
        grad_MD = torch.empty_like(x_MD) if micro.learns else None
        objective.score(start, stop, x_MD, self._head, grad_MD)
        if grad_MD is not None:
            if micro.grad_ND is None:
                micro.grad_ND = torch.zeros_like(hidden_ND)
            micro.grad_ND[rows_M] = grad_MD
        if stop == len(objective.rows_M):
            self._finish(flight)

    def _finish(self, flight: _Flight) -> None:
        grad_ND, objective, places_E = flight.micro.grad_ND, flight.objective, flight.places_E
        if grad_ND is None or places_E is None:
            objective.finish(self._totals, self._references, grad_ND)
            return
        # A token with a weight is one example's only.
        grad_ED, graded_M = grad_ND[places_E], objective.rows_M[: objective.num_graded]
        objective.finish(self._totals, self._references, grad_ED)
        grad_ND[places_E[graded_M]] = grad_ED[graded_M]

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
        if slot.spilled is not None:
            slot.spilled = slot.spilled.zeroed("gradients")
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
