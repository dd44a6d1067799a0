"""Tensors that go to a file and come back bit for bit, or not at all."""

from __future__ import annotations

import os
import resource
import signal

import pytest
import torch

from tandem.finetune import spill
from tandem.finetune.run import Run
from tandem.work import LoraConfig, OptimParams

CPU = torch.device("cpu")


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def odd_tensors():
    return {
        "specials": torch.tensor([float("nan"), -0.0, float("inf"), 1e-42, 3.5]),
        "minus zero": torch.tensor([-0.0, -0.0]),
        "bf16": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "zeros": torch.zeros(5, 5),
        "transposed": torch.arange(12.0).view(3, 4).T,
        "nothing": torch.empty(0),
    }


def test_every_bit_comes_back(tmp_path):
    tensors = odd_tensors()
    found = spill.read(spill.write(tensors, tmp_path / "f"), CPU)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert bits(found[name]) == bits(tensor), name


def test_zeros_take_no_room(tmp_path):
    spill.write({"weights": torch.ones(10), "moments": torch.zeros(10**6)}, tmp_path / "f")
    assert (tmp_path / "f").stat().st_size == 40


def test_what_is_zeroed_comes_back_as_zeros(tmp_path):
    spilled = spill.write({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "f").zeroed("a")
    found = spill.read(spilled, CPU)
    assert found["a"].tolist() == [0, 0, 0] and found["b"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "sgd", "lion", "adafactor", "muon"])
def test_a_run_goes_on_with_every_optimizer(tmp_path, kind):
    """Two steps, to disk and back with a gradient half added up, two more: as if it had stayed."""

    def steps(run, seeds):
        for seed in seeds:
            run.gradients_P.add_(torch.randn(run.num_parameters, generator=torch.Generator().manual_seed(seed)))
            params = OptimParams(learning_rate=1e-2, kind=kind, weight_decay=0.1)
            norm = run.optimizer.norm(run.gradients_P, params)
            run.optimizer.update(run.weights_P, run.gradients_P, 0, run.num_parameters, params, norm)
            run.optimizer.step += 1

    lora, shapes = LoraConfig(rank=3, seed=1), {"q_proj": (24, 40), "up_proj": (24, 20)}
    stays, moves = (Run(lora, 2, shapes, CPU) for _ in range(2))
    for run in (stays, moves):
        steps(run, (1, 2))
        run.gradients_P.add_(0.25)
    spilled = spill.write(moves.tensors(), tmp_path / "f")
    moves.leave()
    assert not moves.is_here and moves.weights_P.numel() == 0 and not moves.optimizer.state
    moves.take(spill.read(spilled, CPU))
    for run in (stays, moves):
        steps(run, (3, 4))
    assert stays.tensors().keys() == moves.tensors().keys()
    assert all(bits(tensor) == bits(moves.tensors()[name]) for name, tensor in stays.tensors().items())


def test_a_run_that_begins_later_is_the_same():
    lora, shapes = LoraConfig(rank=3, seed=5), {"q_proj": (24, 40)}
    now, later = Run(lora, 2, shapes, CPU), Run(lora, 2, shapes, CPU, is_here=False)
    assert not later.is_here and later.num_parameters == now.num_parameters
    later.take(later.fresh())
    assert torch.equal(now.weights_P, later.weights_P) and torch.equal(now.gradients_P, later.gradients_P)


@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_damage_is_noticed(tmp_path, damage):
    path = tmp_path / "f"
    spilled = spill.write({"a": torch.ones(1000), "b": torch.arange(1000.0)}, path)
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        os.truncate(path, len(raw) - 1)
    else:
        raw[5000] ^= 1
        path.write_bytes(raw)
    with pytest.raises(OSError):
        spill.read(spilled, CPU)


def test_a_full_disk_leaves_no_file(tmp_path):
    """A limit on the size of files is a disk that fills half-way."""
    with pytest.raises(OSError):
        spill.write({"a": torch.ones(3)}, tmp_path / "no" / "such" / "directory")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(OSError):
            spill.write({"a": torch.ones(1000), "b": torch.ones(100_000)}, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
