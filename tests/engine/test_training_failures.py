"""What torch cannot do ends training operations, never the engine; requests go on and nothing leaks."""

import random

import pytest

from tandem.errors import BudgetError
from tandem.work import Example, LoraConfig, OptimParams, Pass, Request, SamplingParams, Update


def examples(*lengths):
    rng = random.Random(0)
    texts = [[rng.randrange(3, 260) for _ in range(n)] for n in lengths]
    return [Example(t, t[1:] + [3], [0.1] * len(t)) for t in texts]


@pytest.mark.parametrize("kind", ["begin", "forward", "loss", "backward"])
def test_no_memory_for_training_is_no_end(make_engine, monkeypatch, kind):
    engine = make_engine("llama", share_forward=False)
    trainer = engine.worker.trainer
    for run_id in ("a", "b"):
        engine.open_run(run_id, LoraConfig(rank=2))
    before = {key: tuple(t.clone() for t in pair) for key, pair in engine.weights("a").items()}

    def refuse(*args):
        if kind == "begin" or args[0].kind == kind:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(*args)

    run = trainer.run
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "begin" if kind == "begin" else "run", refuse)
        ids = [engine.enqueue(Pass("a", examples(20, 30))), engine.enqueue(Update("a", OptimParams(learning_rate=1.0)))]
        engine.submit(Request(request_id="r", prompt=[5, 6, 7], sampling=SamplingParams(max_tokens=5, ignore_eos=True)))
        events, reports = [], {}
        for _ in range(50):
            events += engine.step() if engine.has_work else []
            reports |= dict(engine.take_reports())
    assert sum(e.token_id is not None for e in events) == 5 and events[-1].finish_reason == "length"
    assert reports.keys() == set(ids) and all(isinstance(r, BudgetError) for r in reports.values())
    assert all((a == b).all() for key, pair in engine.weights("a").items() for a, b in zip(pair, before[key]))
    assert not any(bool(g.any()) for pair in engine.gradients("a").values() for g in pair)
    assert engine.forward_backward("a", examples(20, 30)).num_tokens == 50
    assert engine.forward_backward("b", examples(10)).num_tokens == 10
    engine.close_run("a")
    engine.close_run("b")
    engine.take_reports()
