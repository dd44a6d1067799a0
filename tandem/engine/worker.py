"""One device: its weights, its KV cache, its adapters' bytes; runs one StepPlan at a time. Decides nothing.

Shape letters: T flat tokens, M sampled rows, V vocabulary, R rank rows.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem import __version__, ops
from tandem.config import DEMO_MODEL, AdapterConfig, CacheConfig, ModelConfig, SchedulerConfig, TrainingConfig
from tandem.engine import batch as batches
from tandem.engine import sampler
from tandem.engine.sampler import Draw
from tandem.engine.trainer import Trainer
from tandem.errors import BudgetError, ConfigError
from tandem.hub import resolve_model
from tandem.memory import arena
from tandem.model.adapter import AdapterWeights, read_adapter
from tandem.model.decoder import Decoder, LayerStacks, LoraBatch, Record, stack_layers
from tandem.model.spec import load_spec, targets
from tandem.model.weights import load_weights, resident_bytes
from tandem.ops.cpu.build import sources_hash
from tandem.ops.kv_cache import FORMATS, QuantizedCache
from tandem.work import EngineReport, SamplingParams, Segment, StepPlan, StepResult, TopLogprobs

SCORED_ROWS = 64  # prompt tokens whose log-probabilities are computed at once
# Batch sizes at which matmuls were seen to change their order of summation.
PROBED_ROWS = (1, 4, 16, 33, 64, 140, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class RowInput:
    """What the device must know of a row in this step. `scores`: its prompt's log-probabilities are wanted. Training
    rows have no `draw`: nothing is sampled from them."""

    tokens: Sequence[int]
    blocks: Sequence[int]
    version: int
    draw: Draw | None = None
    scores: bool = False


class Worker:
    """Loads a model and executes steps. Raises ModelError or ConfigError where the model cannot run here."""

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        adapters: AdapterConfig,
        training: TrainingConfig,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        start = time.perf_counter()
        if model.num_threads:
            torch.set_num_threads(model.num_threads)
        self.device = _device(model.device)
        # Without batch-invariant kernels sums depend on the number of threads, and what is deterministic must not.
        self.may_choose_threads = not (model.num_threads or training.deterministic or self.device.type != "cpu")
        self.quantization = model.quantization
        path = DEMO_MODEL if model.model == "demo" else resolve_model(model.model, model.revision)
        self.spec = load_spec(path, model.max_model_len)
        self.dtype = _dtype(model.dtype, self.spec.dtype)
        self.kernels = ops.load(self.device.type, self.dtype, model.cpu_isa, model.quantization)
        self._afford(
            resident_bytes(self.spec, self.dtype, model.quantization), "the model",
            "free some memory, use a smaller model or --quantization int8 or int4",
        )  # fmt: skip
        weights = load_weights(
            path, self.spec, dtype=self.dtype, device=self.device, kernels=self.kernels, progress=on_progress
        )
        self.decoder = Decoder(self.spec, weights, self.kernels)
        is_plain = self.spec.final_softcap is None
        kernels = self.kernels
        self.head = sampler.Head(kernels.argmax, kernels.draw, kernels.draw_filtered, self.decoder.finished, is_plain)
        self.load_s = time.perf_counter() - start
        self.name = model.model
        self.weight_bytes = weights.nbytes
        self.max_lora_rank = adapters.max_lora_rank
        self.block_size = cache.block_size
        self.kv_bits = FORMATS.get(cache.kv_cache_dtype, 0)
        self.num_blocks, self.max_model_len = self._plan_cache(cache, scheduler, model.max_model_len)
        self.kv = self._allocate_kv()
        self.caches = self._layer_caches()
        self.targets = targets(self.spec)
        shapes = {name: (t.in_features, t.out_features) for name, t in self.targets.items()}
        self.pool = arena.AdapterPool(len(self.spec.layers), shapes, self.dtype, self.device)
        self.resident: dict[int, AdapterWeights] = {}
        self._stacks: tuple[tuple[int, int], LayerStacks] = ((-1, 0), [])
        self._tables = batches.Tables()
        self.batch_invariant = self._batch_invariant()
        self.trainer = Trainer(self.decoder, self.device, training, str(model.model), adapters.max_lora_rank)

    def _plan_cache(self, cache: CacheConfig, scheduler: SchedulerConfig, asked_len: int | None) -> tuple[int, int]:
        """Number of blocks and the longest context. A length nobody asked for shrinks to what the memory holds."""
        spec = self.spec
        size = arena.block_bytes(
            len(spec.layers), cache.block_size, spec.num_kv_heads, spec.head_dim, self.dtype, self.kv_bits
        )
        longest = asked_len or spec.max_position
        enough = scheduler.max_num_seqs * -(-longest // cache.block_size) + 1
        if cache.num_blocks is not None:
            num_blocks = cache.num_blocks
        else:
            allowed = cache.kv_cache_memory_bytes
            if allowed is None:
                allowed = arena.default_kv_bytes(self.device, cache.gpu_memory_utilization)
            num_blocks = min(allowed // size, enough)
        fits = (num_blocks - 1) * cache.block_size
        if num_blocks < 2 or (asked_len and fits < asked_len):
            raise ConfigError(
                f"the KV cache holds {max(fits, 0)} tokens but the context is {longest}: raise "
                f"--kv-cache-memory-bytes ({size} bytes a block of {cache.block_size} tokens) or lower --max-model-len"
            )
        return num_blocks, min(longest, fits)

    def _allocate_kv(self) -> Tensor:
        spec = self.spec
        shape = (len(spec.layers), self.num_blocks, self.block_size, spec.num_kv_heads, spec.head_dim)
        needed = self.num_blocks * arena.block_bytes(shape[0], *shape[2:], self.dtype, self.kv_bits)
        self._afford(needed, "the KV cache", "lower --num-blocks or --kv-cache-memory-bytes")
        return arena.allocate_kv(*shape, self.dtype, self.device, self.kv_bits)

    def _layer_caches(self) -> list[Tensor | QuantizedCache]:
        if not self.kv_bits:
            return list(self.kv.unbind(0))
        head_dim = self.spec.head_dim
        return [QuantizedCache(layer, self.kv_bits, self.block_size, head_dim) for layer in self.kv[:, 0].unbind(0)]

    @property
    def keeps_keys_exact(self) -> bool:
        """Whether keys and values in the cache are what the model computed: training reads no others."""
        return not self.kv_bits

    def _afford(self, needed: int, what: str, remedy: str) -> None:
        free = arena.available_bytes(self.device, 1.0)
        if needed > free:
            raise BudgetError(f"{what} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: {remedy}")

    def report(self) -> EngineReport:
        """What start-up lines, /metrics and doctor say of this device."""
        return EngineReport(
            model=self.name,
            architecture=self.spec.architecture,
            num_parameters=self.spec.num_parameters,
            weight_bytes=self.weight_bytes,
            load_s=self.load_s,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            isa=_isa(self.device),
            num_threads=torch.get_num_threads(),
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            kv_bytes=self.kv.nbytes,
            max_model_len=self.max_model_len,
            vocab_size=self.spec.vocab_size,
            hidden_size=self.spec.hidden_size,
            batch_invariant=self.batch_invariant,
            eos_token_ids=list(self.spec.eos_token_ids),
            kernels=self.kernels.name,
        )

    # ------------------------------------------------------------ adapters

    def read_adapter(self, path: str) -> AdapterWeights:
        """Read and check a PEFT directory; touches no state, so any thread may call it."""
        return read_adapter(path, self.spec, self.dtype, self.device, self.max_lora_rank)

    def install(self, version: int, weights: AdapterWeights) -> None:
        self.resident[version] = weights

    def forget(self, version: int) -> None:
        del self.resident[version]

    def load_rows(self, version: int, low: int, high: int, capacity: int) -> None:
        """Copy a resident adapter into rank rows low..high of the stacked pool."""
        self.pool.grow(capacity)
        self.pool.write(low, high, self.resident[version].layers)

    # ------------------------------------------------------------ the step

    @torch.inference_mode()
    def step(
        self,
        plan: StepPlan,
        rows: Mapping[int, RowInput],
        copies: Sequence[tuple[int, int]] = (),
        rank_rows: Mapping[int, tuple[int, int]] | None = None,
        recorder: Callable[[Mapping[int, int]], Record | None] | None = None,
    ) -> StepResult:
        """Run one plan: block copies, one forward over all segments, sampling. `rank_rows`: version -> pool rows.
        `recorder` makes, of the rows' places in the flat batch, what keeps the activations training wants."""
        start = time.perf_counter()
        batch = batches.build(plan, rows, self.block_size, self.device, self.kernels.min_rows, self._tables)
        self._prepare_blocks(batch, copies)
        record = recorder(batch.starts) if recorder else None
        lora = self._lora(batch, rank_rows or {})
        hidden_TD = self.decoder.forward(batch.tokens_T, batch.layout, self.caches, lora, record)
        result = StepResult(prompt_logprobs=self._prompt_logprobs(plan, rows, batch, hidden_TD))
        if batch.sampling:
            raw_MV = self.decoder.raw_logits(hidden_TD[batch.sample_rows_M])
            draws = [draw for s in batch.sampling if (draw := rows[s.row].draw) is not None]
            tokens, reports = sampler.sample(raw_MV, draws, self.head)
            for segment, token, report in zip(batch.sampling, tokens, reports, strict=True):
                result.tokens[segment.row] = token
                if report is not None:
                    result.logprobs[segment.row] = report
        result.seconds = time.perf_counter() - start
        return result

    def _prepare_blocks(self, batch: batches.Batch, copies: Sequence[tuple[int, int]]) -> None:
        # A reused block may hold another sequence's NaN; masked slots are multiplied by zero, and 0 * NaN is NaN.
        if batch.fresh_blocks_N.numel():
            self.kv.index_fill_(2, batch.fresh_blocks_N, 0)
        if copies:
            source, destination = torch.tensor(copies, dtype=torch.int64, device=self.device).T
            self.kv[:, :, destination] = self.kv[:, :, source]

    def _lora(self, batch: batches.Batch, rank_rows: Mapping[int, tuple[int, int]]) -> LoraBatch | None:
        active = [(start, stop, *rank_rows[version]) for start, stop, version in batch.ranges if version]
        if not active:
            return None
        used = max(high for _, _, _, high in active)
        foreign_TR = torch.ones(batch.tokens_T.shape[0], used, dtype=torch.bool)
        for start, stop, low, high in active:
            foreign_TR[start:stop, low:high] = False
        if self._stacks[0] != (self.pool.generation, used):
            self._stacks = (self.pool.generation, used), stack_layers(self.pool.view(used), self.targets)
        return LoraBatch(foreign_TR.to(self.device), self._stacks[1])

    def _prompt_logprobs(
        self, plan: StepPlan, rows: Mapping[int, RowInput], batch: batches.Batch, hidden_TD: Tensor
    ) -> dict[int, list[TopLogprobs]]:
        found: dict[int, list[TopLogprobs]] = {}
        for segment in plan.segments:
            row = rows[segment.row]
            if not row.scores or row.draw is None:
                continue
            last = min(segment.stop, row.draw.num_prompt - 1)
            if segment.start >= last:
                continue
            first = batch.starts[segment.row] - segment.start
            entries = found.setdefault(segment.row, [])
            # In slices: float32 logits of a whole chunk would be hundreds of megabytes with a large vocabulary.
            for start in range(segment.start, last, SCORED_ROWS):
                stop = min(start + SCORED_ROWS, last)
                logits_MV = self.decoder.logits(hidden_TD[first + start : first + stop])
                wanted = [row.draw.params.prompt_logprobs or 0] * (stop - start)
                entries += sampler.top_logprobs(logits_MV, row.tokens[start + 1 : stop + 1], wanted)
        return found

    # ------------------------------------------------------------ measurements

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    def use_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def calibration_key(self) -> dict[str, str | int]:
        """What this device's step times depend on; see `calibration.py`."""
        return {
            "tandem": __version__,
            "torch": str(torch.__version__),
            "kernels": sources_hash(),
            "isa": f"{_isa(self.device)}, {self.kernels.name}",
            "model": hashlib.sha256(repr(self.spec).encode()).hexdigest()[:16],
            "dtype": str(self.dtype),
            "quantization": self.quantization,
            "kv cache": self.kv_bits or str(self.dtype),
            "block size": self.block_size,
        }

    def decode_s(self) -> float:
        """Seconds of a step of one token, the better of two."""
        plan, rows = self._synthetic(1, min(16, self.max_model_len), 0)
        return min(self.step(plan, rows).seconds for _ in range(2))

    def measure(self) -> list[tuple[int, int, int, int, float]]:
        """Time real steps on scratch blocks: (tokens, context read, query x key pairs, sampled rows, seconds)."""
        # (decodes, their context, tokens of a chunk, its start): the last two tell attention from the rest.
        shapes = [(1, 16, 0, 0), (4, 16, 0, 0), (16, 16, 0, 0), (1, 16, 28, 0), (1, 16, 60, 0), (1, 16, 252, 0)]
        shapes += [(4, 1024, 0, 0), (1, 16, 60, 2048)]
        found = []
        for singles, context, chunk, start in [shapes[0], *shapes]:
            context, start = min(context, self.max_model_len), min(start, max(0, self.max_model_len - chunk))
            chunk = min(chunk, self.max_model_len)
            plan, rows = self._synthetic(singles, context, chunk, start)
            seconds = min(self.step(plan, rows).seconds for _ in range(2))
            pairs = chunk * start + chunk * (chunk + 1) // 2 if chunk > 1 else 0
            found.append((singles + chunk, singles * context, pairs, singles, seconds))
        return found[1:]  # the first one warms up

    def clear_cache(self) -> None:
        """Forget what timing steps wrote; from here on all of the cache's memory is taken."""
        self.kv.zero_()

    def _synthetic(
        self, singles: int, context: int, chunk: int, chunk_start: int = 0
    ) -> tuple[StepPlan, dict[int, RowInput]]:
        """A plan of `singles` decodes at `context` tokens and one chunk, all on the same blocks: only for timing."""
        longest = max(context, chunk_start + chunk)
        blocks = [i % (self.num_blocks - 1) + 1 for i in range(-(-longest // self.block_size))]
        tokens = [0] * longest
        draw = Draw(SamplingParams(temperature=0.0), 0, 0, tokens, 1)
        segments = [Segment(i, context - 1, 1, True) for i in range(singles)]
        if chunk:
            segments.append(Segment(singles, chunk_start, chunk, False))
        rows = {s.row: RowInput(tokens, blocks, 0, draw) for s in segments}
        return StepPlan(tuple(segments)), rows

    @torch.inference_mode()
    def _batch_invariant(self) -> bool:
        """Whether this machine's matmuls give a row bitwise the same result whatever the number of rows.

        Decodes then do too: how far attention pads a row depends on its own context alone. How a prompt was cut into
        chunks may still show in the last bits.
        """
        weights = self.decoder.weights
        layer = weights.layers[0]
        generator = torch.Generator(self.device).manual_seed(0)
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down, weights.lm_head):
            x_TI = torch.randn(PROBED_ROWS[-1], weight.in_features, device=self.device, generator=generator)
            x_TI = x_TI.to(self.dtype)
            whole_TO = self.kernels.linear(x_TI, weight)
            for rows in [n for n in PROBED_ROWS[:-1] if n >= self.kernels.min_rows]:
                if not torch.equal(self.kernels.linear(x_TI[:rows], weight), whole_TO[:rows]):
                    return False
        return True


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device(name)


def _dtype(name: str, checkpoint: str) -> torch.dtype:
    """'auto' follows the checkpoint; float16 ones run in bfloat16."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if checkpoint == "float32" else torch.bfloat16


def _isa(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_" + "".join(map(str, torch.cuda.get_device_capability(device)))
    names = [torch.backends.cpu.get_cpu_capability()]
    probes = {"BF16": "_is_avx512_bf16_supported", "VNNI": "_is_vnni_supported", "AMX": "_is_amx_tile_supported"}
    names += [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
    return "+".join(names)
