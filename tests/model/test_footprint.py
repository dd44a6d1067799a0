"""What training holds for backward, counted on tiny models against sizes worked out by hand."""

import pytest
import torch

from tandem.model import footprint
from tandem.model.spec import load_spec

LENGTH, WINDOW, RANK = 64, 16, 4


@pytest.fixture(scope="module")
def held(tiny_model):
    path = tiny_model("llama")
    found = footprint.measure(path, "float32", LENGTH, WINDOW, 8, RANK)
    return load_spec(path), {h.name: h for h in found}


def test_each_way_holds_less_than_the_one_before(held):
    _, ways = held
    assert list(ways) == ["plain", "pruned", "recomputed", "windowed"]
    totals = [h.total for h in ways.values()]
    assert all(a > b for a, b in zip(totals, totals[1:], strict=False)), totals


def test_recomputation_keeps_the_layers_inputs_only(held):
    spec, ways = held
    inputs = len(spec.layers) * LENGTH * spec.hidden_size * 4
    assert ways["recomputed"].layers == ways["windowed"].layers == inputs
    assert ways["plain"].in_flight == ways["pruned"].in_flight == 0
    # What is recomputed for one layer is what the graph of all layers would hold.
    assert ways["pruned"].layers == inputs + len(spec.layers) * ways["recomputed"].in_flight


def test_a_layers_graph_holds_the_inputs_of_its_linears(held):
    """At the least: normed input twice, attention's output, gate and up, what they are multiplied to."""
    spec, ways = held
    least = LENGTH * 4 * (2 * spec.hidden_size + spec.q_size + 3 * spec.intermediate_size)
    assert least < ways["recomputed"].in_flight < 3 * least


def test_windows_share_keys_and_values(held):
    spec, ways = held
    shared = 2 * LENGTH * spec.kv_size * (4 + 4)
    assert shared < ways["windowed"].in_flight < shared + ways["recomputed"].in_flight


def test_the_loss_in_chunks_never_sees_all_logits(held):
    spec, ways = held
    logits = LENGTH * spec.vocab_size * 4
    assert ways["plain"].head >= logits and ways["pruned"].head >= logits
    assert ways["windowed"].head < logits / 2


def test_plain_is_what_autograd_saves(tiny_model):
    """Saved tensors as torch's own graph nodes show them, walked from the loss of the very same model."""
    model, num_layers = footprint._small(tiny_model("llama"), torch.float32)
    assert num_layers == 3 and model.config.num_hidden_layers == footprint.LAYERS
    ids = torch.arange(LENGTH) % 200
    layer, head = footprint._plain(model, ids, RANK)
    fixed = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    loss = model(input_ids=ids[None], labels=ids[None]).loss
    saved, nodes, seen = {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                found = getattr(node, name)
                for t in found if isinstance(found, tuple | list) else [found]:
                    if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in fixed:
                        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    # Two layers alike but for what they share (angles), the embedding's hook and the head.
    assert sum(saved.values()) == pytest.approx(2 * layer + head, rel=0.1)


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "phi3"])
def test_other_families_can_be_measured(tiny_model, family):
    found = footprint.measure(tiny_model(family), "bfloat16", 24, 8, 8, 2)
    assert found[0].total > found[3].total > 0
