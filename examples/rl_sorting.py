"""Reinforcement learning on the embedded model: it sorts three numbers in two of five tries, and learns to do it.

Eight answers to each question are sampled, the right ones are rewarded, and what was better than its group's mean
becomes likelier. Sampling and learning share one engine: a group's gradient is computed as soon as its last answer is
there, while others are still being sampled, and from what sampling has computed: its forward pass is training's too.
Every answer is of the version that learns from it. `--mode turns` does the same with the phases taking turns and a
forward pass of training's own, as two engines would have to; `--mode both` measures them alternately. Writes figures as
JSON and, where matplotlib is installed, a plot. Exit code 0 where the reward's mean over the last updates reaches the
goal in every run, 1 where not; `--goal 0` makes all `--updates`, to compare times.

    python examples/rl_sorting.py --mode both --seeds 1 2 3 --out rl_sorting.json --plot rl_sorting.png
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tandem.config import DEMO_MODEL, EngineConfig, ModelConfig, SchedulerConfig, TrainingConfig
from tandem.engine.client import EngineClient
from tandem.tokenizer import Tokenizer
from tandem.work import EngineStats, Example, LoraConfig, OptimParams, PassReport, Request, SamplingParams

GROUP, GROUPS = 8, 8  # answers to a question, questions in an update
MAX_TOKENS = 14
LORA = LoraConfig(rank=16, alpha=32.0)
RATE = 1e-3
GOAL, SMOOTH = 0.85, 10  # of the mean over so many updates
WARM_UP = 3  # updates
NAME = "policy"


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    reward: float


Group = tuple[list[int], list[Answer]]  # a question's tokens, and what was said


@dataclass
class Log:
    """What a run found: an entry for each update. `parts_s`: where the engine's time went."""

    mode: str
    seed: int
    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    reused_tokens: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def smooth(self) -> float:
        return statistics.fmean(self.rewards[-SMOOTH:]) if len(self.rewards) >= SMOOTH else 0.0

    @property
    def update_s(self) -> float:
        """Of a typical update: the first ones warm up, and a busy machine has long ones."""
        ends = self.seconds[WARM_UP:] if len(self.seconds) > WARM_UP + 1 else [0.0, *self.seconds]
        return statistics.median(end - start for start, end in itertools.pairwise(ends))

    def figures(self) -> dict[str, Any]:
        first, wall_s = statistics.fmean(self.rewards[:3]), self.seconds[-1]
        return {
            "mode": self.mode, "seed": self.seed, "updates": len(self.rewards), "seconds": round(wall_s, 1),
            "reward_before": round(first, 3), "reward_after": round(self.smooth, 3),
            "update_s": round(self.update_s, 4), "trained_tokens_per_s": round(self.tokens / wall_s, 1),
            "reused": round(self.reused_tokens / max(1, self.tokens), 3),
            "shares": {name: round(part_s / wall_s, 3) for name, part_s in self.parts_s.items()},
            "rewards": [round(r, 4) for r in self.rewards], "at_s": [round(s, 2) for s in self.seconds],
        }  # fmt: skip


class Policy:
    """The engine, and one adapter in it that samples and learns."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, run_id: str, seed: int, reuses: bool) -> None:
        """`reuses`: training takes over what sampling computed."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.run_id = run_id
        self.reuses = reuses
        self.rng = Random(seed)
        self.numbers = itertools.count()

    async def sample(self) -> Group:
        """One question's tokens, and its answers with their rewards."""
        question = self.rng.sample(range(10, 100), 3)
        text = "Sort these numbers: " + ", ".join(map(str, question))
        prompt = self.tokenizer.render([{"role": "user", "content": text}])
        right = ", ".join(map(str, sorted(question)))
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, logprobs=0, n=GROUP, seed=self.rng.getrandbits(32)
        )
        request = Request(
            request_id=f"{self.run_id}-{next(self.numbers)}", prompt=prompt, sampling=sampling, adapter=NAME,
            keep_for_training=self.reuses,
        )  # fmt: skip
        tokens: list[list[int]] = [[] for _ in range(GROUP)]
        logprobs: list[list[float]] = [[] for _ in range(GROUP)]
        async for events in self.engine.submit(request):
            for event in events:
                if event.token_id is not None and event.logprob is not None:
                    tokens[event.index].append(event.token_id)
                    logprobs[event.index].append(event.logprob.logprob)
        return prompt, [
            Answer(ids, found, float(self.tokenizer.decode(ids).strip() == right))
            for ids, found in zip(tokens, logprobs, strict=True)
        ]

    def learn(self, groups: Sequence[Group]) -> list[asyncio.Future[Any]]:
        """Add to the gradients; nothing to do for a group in which all answers are equally good."""
        examples = []
        for prompt, answers in groups:
            rewards = [answer.reward for answer in answers]
            mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
            examples += [example(prompt, a, (a.reward - mean) / spread) for a in answers if spread]
        return [self.engine.forward_backward(self.run_id, examples, "ppo")] if examples else []

    async def update(self, passes: Sequence[asyncio.Future[Any]]) -> list[Any]:
        """The optimizer's step and the new version, asked for at once. Returns what the passes found."""
        if passes:
            self.engine.optim_step(self.run_id, OptimParams(learning_rate=RATE, beta2=0.99, max_grad_norm=1.0))
        await self.engine.publish(self.run_id, NAME)
        return [await each for each in passes]


def example(prompt: list[int], answer: Answer, advantage: float) -> Example:
    """Every token of the answer is as good as the whole was; the prompt's are not judged."""
    ids, unjudged, judged = prompt + answer.tokens, len(prompt) - 1, len(answer.tokens)
    return Example(
        ids[:-1], ids[1:], [0.0] * unjudged + [1.0] * judged,
        logprobs=[0.0] * unjudged + answer.logprobs, advantages=[0.0] * unjudged + [advantage] * judged,
    )  # fmt: skip


async def in_turns(policy: Policy, log: Log, until: Until) -> None:
    """Sample, learn, publish; again."""
    while not until.reached(log):
        groups = await asyncio.gather(*(policy.sample() for _ in range(GROUPS)))
        until.note(log, groups, await policy.update(policy.learn(groups)))


async def overlapped(policy: Policy, log: Log, until: Until) -> None:
    """A group that is complete is learnt from while the others are still being sampled."""
    while not until.reached(log):
        groups, passes = [], []
        for sampled in asyncio.as_completed([policy.sample() for _ in range(GROUPS)]):
            groups.append(await sampled)
            passes += policy.learn(groups[-1:])
        until.note(log, groups, await policy.update(passes))


class Until:
    """When a run is over: at the goal if there is one, or after so many updates."""

    def __init__(self, goal: float, updates: int) -> None:
        self.goal, self.updates = goal, updates
        self.start = time.monotonic()

    def reached(self, log: Log) -> bool:
        return 0 < self.goal <= log.smooth or len(log.rewards) >= self.updates

    def note(self, log: Log, groups: Sequence[Group], reports: Sequence[PassReport]) -> None:
        log.rewards.append(statistics.fmean(answer.reward for _, answers in groups for answer in answers))
        log.seconds.append(time.monotonic() - self.start)
        for prompt, answers in groups:
            if len({answer.reward for answer in answers}) > 1:
                log.tokens += sum(len(prompt) + len(answer.tokens) - 1 for answer in answers)
        log.reused_tokens += sum(report.metrics.get("reused_tokens", 0.0) for report in reports)
        if len(log.rewards) % 10 == 0:
            done = f"{log.mode}, seed {log.seed}: update {len(log.rewards)}, {log.seconds[-1]:.0f} s"
            print(f"{done}, reward {log.smooth:.2f}", flush=True)


def split(stats: EngineStats, wall_s: float) -> dict[str, float]:
    """Seconds of the engine so far: sampling, training by kind of slice, and neither."""
    busy_s = stats.step_s + stats.train_s
    return {"sampling": stats.step_s, **stats.train_parts_s, "rest": wall_s - busy_s}


async def run(mode: str, seed: int, args: argparse.Namespace) -> Log:
    config = EngineConfig(
        model=ModelConfig(model=str(DEMO_MODEL), num_threads=args.threads),
        scheduler=SchedulerConfig(max_num_seqs=2 * GROUP * GROUPS),
        # Nobody waits for single tokens here: training may take what sampling leaves.
        training=TrainingConfig(slo_tpot_ms=1000.0, share_prefixes=mode == "overlapped"),
    )
    engine = await EngineClient.start(config)
    try:
        overlaps = mode == "overlapped"
        policy = Policy(engine, Tokenizer.load(str(DEMO_MODEL)), f"rl-{mode}", seed, reuses=overlaps)
        await engine.open_run(policy.run_id, LORA)
        await engine.publish(policy.run_id, NAME)
        log, until = Log(mode, seed), Until(args.goal, args.updates)
        before = split(engine.stats, 0.0)
        await (overlapped if overlaps else in_turns)(policy, log, until)
        after = split(engine.stats, log.seconds[-1])
        log.parts_s = {name: part_s - before.get(name, 0.0) for name, part_s in after.items()}
        return log
    finally:
        await engine.close()


def plot(logs: Sequence[Log], path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, mode in enumerate(dict.fromkeys(log.mode for log in logs)):
        for number, log in enumerate(log for log in logs if log.mode == mode):
            smooth = [statistics.fmean(log.rewards[max(0, k - SMOOTH + 1) : k + 1]) for k in range(len(log.rewards))]
            axis.plot(log.seconds, log.rewards, ".", markersize=3, alpha=0.2, color=f"C{i}")
            axis.plot(log.seconds, smooth, color=f"C{i}", label=mode if number == 0 else None)
    axis.axhline(GOAL, linestyle="--", color="grey")
    axis.set(xlabel="seconds", ylabel="share of right answers", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=["overlapped", "turns", "both"], default="overlapped")
    parser.add_argument("--updates", type=int, default=600, help="at most so many")
    parser.add_argument("--goal", type=float, default=GOAL, help="reward at which a run is over; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--plot", help="PNG file")
    args = parser.parse_args()
    modes = ["overlapped", "turns"] if args.mode == "both" else [args.mode]
    logs = [asyncio.run(run(mode, seed, args)) for seed in args.seeds for mode in modes]
    for log in logs:
        print(json.dumps({name: value for name, value in log.figures().items() if name not in ("rewards", "at_s")}))
    if len(modes) == 2:
        ratios = [turns.update_s / ours.update_s for ours, turns in zip(logs[::2], logs[1::2], strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"overlapped is {statistics.median(ratios):.2f} times as fast per update (by seed: {each})")
    if args.out:
        with open(args.out, "w") as file:
            json.dump([log.figures() for log in logs], file)
    if args.plot:
        plot(logs, args.plot)
    return 0 if all(log.smooth >= args.goal for log in logs) else 1


if __name__ == "__main__":
    sys.exit(main())
