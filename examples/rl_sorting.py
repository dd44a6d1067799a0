"""Reinforcement learning on the embedded model: it sorts three numbers in two of five tries, and learns to do it.

Eight answers to each question are sampled, the right ones are rewarded, and what was better than its group's mean
becomes likelier. Sampling and learning share one engine: while an update is computed, the next answers are sampled with
the newest version there is. `--mode turns` does the same work with the phases taking turns, as two engines would have
to; `--mode both` measures one after the other. Writes figures as JSON and, where matplotlib is installed, a plot.
Exit code 0 where the reward's mean over the last updates reaches the goal, 1 where not.

    python examples/rl_sorting.py --mode both --out rl_sorting.json --plot rl_sorting.png
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
from tandem.work import Example, LoraConfig, OptimParams, Request, SamplingParams

GROUP, GROUPS = 8, 8  # answers to a question, questions in an update
MAX_TOKENS = 14
LORA = LoraConfig(rank=16, alpha=32.0)
RATE = 1e-3
GOAL, SMOOTH = 0.85, 10  # of the mean over so many updates
NAME = "policy"


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    reward: float


@dataclass
class Log:
    """What a run found: an entry for each update."""

    mode: str
    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    update_s: float = 0.0

    @property
    def smooth(self) -> float:
        return statistics.fmean(self.rewards[-SMOOTH:]) if len(self.rewards) >= SMOOTH else 0.0

    def figures(self) -> dict[str, Any]:
        first = statistics.fmean(self.rewards[:3])
        return {
            "mode": self.mode, "updates": len(self.rewards), "seconds": round(self.seconds[-1], 1),
            "reward_before": round(first, 3), "reward_after": round(self.smooth, 3),
            "updates_per_s": round(len(self.rewards) / self.seconds[-1], 3),
            "trained_tokens_per_s": round(self.tokens / self.seconds[-1], 1),
            "rewards": [round(r, 4) for r in self.rewards], "at_s": [round(s, 2) for s in self.seconds],
        }  # fmt: skip


class Policy:
    """The engine, and one adapter in it that samples and learns."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, run_id: str, seed: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.run_id = run_id
        self.rng = Random(seed)
        self.numbers = itertools.count()

    async def sample(self) -> tuple[list[int], list[Answer]]:
        """One question's tokens, and its answers with their rewards."""
        question = self.rng.sample(range(10, 100), 3)
        text = "Sort these numbers: " + ", ".join(map(str, question))
        prompt = self.tokenizer.render([{"role": "user", "content": text}])
        right = ", ".join(map(str, sorted(question)))
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, logprobs=0, n=GROUP, seed=self.rng.getrandbits(32)
        )
        request = Request(
            request_id=f"{self.run_id}-{next(self.numbers)}", prompt=prompt, sampling=sampling, adapter=NAME
        )
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

    def learn(self, groups: Sequence[tuple[list[int], list[Answer]]]) -> tuple[asyncio.Future[Any], int]:
        """Gradients, the step and the new version are sent at once; done when the last has an answer."""
        examples = []
        for prompt, answers in groups:
            rewards = [answer.reward for answer in answers]
            mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
            examples += [example(prompt, a, (a.reward - mean) / spread) for a in answers if spread]
        if examples:
            self.engine.forward_backward(self.run_id, examples, "ppo")
            self.engine.optim_step(self.run_id, OptimParams(learning_rate=RATE, beta2=0.99, max_grad_norm=1.0))
        return self.engine.publish(self.run_id, NAME), sum(len(e.tokens) for e in examples)


def example(prompt: list[int], answer: Answer, advantage: float) -> Example:
    """Every token of the answer is as good as the whole was; the prompt's are not judged."""
    ids, unjudged, judged = prompt + answer.tokens, len(prompt) - 1, len(answer.tokens)
    return Example(
        ids[:-1], ids[1:], [0.0] * unjudged + [1.0] * judged,
        logprobs=[0.0] * unjudged + answer.logprobs, advantages=[0.0] * unjudged + [advantage] * judged,
    )  # fmt: skip


async def in_turns(policy: Policy, log: Log, until: Until) -> None:
    """Sample with the newest version, learn, wait; again."""
    while not until.reached(log):
        groups = await asyncio.gather(*(policy.sample() for _ in range(GROUPS)))
        published, num_tokens = policy.learn(groups)
        await published
        until.note(log, groups, num_tokens)


async def overlapped(policy: Policy, log: Log, until: Until) -> None:
    """Answers are always being sampled; an update takes the groups that are complete, whose answers may be a version
    old: that is what the ratio in the loss is for."""
    sampling = {asyncio.create_task(policy.sample()) for _ in range(GROUPS)}
    complete: list[tuple[list[int], list[Answer]]] = []
    published: asyncio.Future[Any] | None = None
    learning: tuple[list[Any], int] = ([], 0)
    while not until.reached(log):
        waiting = {*sampling, *([published] if published else [])}
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done & sampling:
            complete.append(task.result())
        sampling -= done
        if published is not None and published.done():
            published.result()
            until.note(log, *learning)
            published = None
        if published is None and len(complete) >= GROUPS:
            groups, complete = complete[:GROUPS], complete[GROUPS:]
            published, num_tokens = policy.learn(groups)
            learning = (groups, num_tokens)
        # Not further ahead than one update: older answers teach less.
        while len(sampling) + len(complete) < (2 if published is None else 1) * GROUPS:
            sampling.add(asyncio.create_task(policy.sample()))
    for task in sampling:
        task.cancel()
    await asyncio.gather(*sampling, return_exceptions=True)


class Until:
    """When a run is over: at the goal, or after so many updates."""

    def __init__(self, goal: float, updates: int) -> None:
        self.goal, self.updates = goal, updates
        self.start = time.monotonic()

    def reached(self, log: Log) -> bool:
        return log.smooth >= self.goal or len(log.rewards) >= self.updates

    def note(self, log: Log, groups: Sequence[tuple[list[int], list[Answer]]], num_tokens: int) -> None:
        log.rewards.append(statistics.fmean(answer.reward for _, answers in groups for answer in answers))
        log.seconds.append(time.monotonic() - self.start)
        log.tokens += num_tokens
        if len(log.rewards) % 10 == 0:
            done = f"{log.mode}: update {len(log.rewards)}, {log.seconds[-1]:.0f} s"
            print(f"{done}, reward {log.smooth:.2f}", flush=True)


async def run(mode: str, args: argparse.Namespace) -> Log:
    config = EngineConfig(
        model=ModelConfig(model=str(DEMO_MODEL), num_threads=args.threads),
        scheduler=SchedulerConfig(max_num_seqs=2 * GROUP * GROUPS),
        # Nobody waits for single tokens here: training may take what sampling leaves.
        training=TrainingConfig(slo_tpot_ms=1000.0),
    )
    engine = await EngineClient.start(config)
    try:
        policy = Policy(engine, Tokenizer.load(str(DEMO_MODEL)), f"rl-{mode}", args.seed)
        await engine.open_run(policy.run_id, LORA)
        await engine.publish(policy.run_id, NAME)
        log, until = Log(mode), Until(args.goal, args.updates)
        await (overlapped if mode == "overlapped" else in_turns)(policy, log, until)
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
    for i, log in enumerate(logs):
        axis.plot(log.seconds, log.rewards, ".", markersize=3, alpha=0.4, color=f"C{i}")
        smooth = [statistics.fmean(log.rewards[max(0, k - SMOOTH + 1) : k + 1]) for k in range(len(log.rewards))]
        axis.plot(log.seconds, smooth, color=f"C{i}", label=log.mode)
    axis.axhline(GOAL, linestyle="--", color="grey")
    axis.set(xlabel="seconds", ylabel="share of right answers", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=["overlapped", "turns", "both"], default="overlapped")
    parser.add_argument("--updates", type=int, default=600, help="at most so many")
    parser.add_argument("--goal", type=float, default=GOAL)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--plot", help="PNG file")
    args = parser.parse_args()
    modes = ["overlapped", "turns"] if args.mode == "both" else [args.mode]
    logs = [asyncio.run(run(mode, args)) for mode in modes]
    for log in logs:
        print(json.dumps({name: value for name, value in log.figures().items() if name not in ("rewards", "at_s")}))
    if len(logs) == 2:
        by_update = [log.seconds[-1] / len(log.rewards) for log in logs]
        print(f"overlapped is {by_update[1] / by_update[0]:.2f} times as fast per update")
    if args.out:
        with open(args.out, "w") as file:
            json.dump([log.figures() for log in logs], file)
    if args.plot:
        plot(logs, args.plot)
    return 0 if all(log.smooth >= args.goal for log in logs) else 1


if __name__ == "__main__":
    sys.exit(main())
