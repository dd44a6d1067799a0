"""What is found is what was computed for these very tokens with this very adapter, whatever came and went before."""

from __future__ import annotations

import random

import torch

from tandem.model.kept import Computed, Kept, all_of

WIDTHS = {(0, "qkv"): 3, (1, "input"): 2}


def kept(capacity=1000):
    return Kept(WIDTHS, capacity, torch.float32, torch.device("cpu"))


def value(version, tokens):
    """What a token is computed to, given those before it."""
    return random.Random(f"{version} {list(tokens)}").random()


def compute(store, computed, extra=2):
    """A step over these tokens, `extra` other rows of the flat batch before them."""
    at, placed, values = extra, [], [0.0] * extra
    for version, row, tokens, start, length in computed:
        placed.append(Computed(row, version, tokens, start, length, at))
        values += [value(version, tokens[: i + 1]) for i in range(start, start + length)]
        at += length
    record = store.record(placed)
    if record is not None:
        for (layer, name), width in WIDTHS.items():
            record(layer, name, torch.tensor(values)[:, None].expand(-1, width) + layer)
        record(7, "nobody asked for this", torch.zeros(at, 9))


def found(store, run, version, tokens):
    """Whether these are there; what is there is right."""
    places = store.find(run, tokens)
    if places is None:
        return False
    for (layer, name), width in WIDTHS.items():
        out = torch.empty(len(tokens), width)
        store.read(layer, name, torch.tensor(places), out)
        expected = torch.tensor([value(version, tokens[: i + 1]) for i in range(len(tokens))])
        assert torch.equal(out, expected[:, None].expand(-1, width) + layer)
    return True


def test_forks_and_later_tokens():
    store = kept()
    store.publish(5, 1)
    prompt = [3, 4, 5]
    compute(store, [(1, 0, prompt, 0, 3)])
    compute(store, [(1, 0, [*prompt, 6], 3, 1), (1, 1, [*prompt, 7], 3, 1), (1, 2, [*prompt, 6], 3, 1)])
    compute(store, [(1, 0, [*prompt, 6, 8], 4, 1), (1, 1, [*prompt, 7, 8], 4, 1), (1, 2, [*prompt, 6, 8], 4, 1)])
    assert store.num_tokens == 7
    for tokens in (prompt, [*prompt, 6, 8], [*prompt, 7, 8]):
        assert found(store, 5, 1, tokens)
    for tokens in ([*prompt, 8], [4], [*prompt, 6, 7]):
        assert not found(store, 5, 1, tokens)
    assert not found(store, 6, 1, prompt)


def test_a_row_whose_beginning_is_not_here():
    store = kept()
    store.publish(5, 1)
    compute(store, [(1, 0, [3, 4, 5], 1, 2)])
    assert store.num_tokens == 0


def test_random_traffic_with_little_room():
    """Rows of several adapters grow, fork and end; adapters change; 60 places for all."""
    rng, store = random.Random(0), kept(60)
    versions, next_version, next_row, hits, misses = {}, 1, 0, 0, 0
    rows = {}
    for _ in range(3000):
        run = rng.randrange(3)
        act = rng.random()
        if act < 0.02:
            store.change(run)
        if run not in versions or act < 0.04:
            if act >= 0.02 and run in versions:
                store.change(run)
            versions[run] = next_version
            store.publish(run, next_version)
            next_version += 1
        if rng.random() < 0.3:
            start = rng.choice([0, 0, 0, 2])
            rows[next_row] = (versions[run], [rng.randrange(3) for _ in range(start + rng.randrange(1, 5))], start)
            next_row += 1
        for row in rng.sample(sorted(rows), max(0, len(rows) - 6)):
            del rows[row]
        compute(store, [(version, row, tokens, at, len(tokens) - at) for row, (version, tokens, at) in rows.items()])
        rows = {row: (version, [*tokens, rng.randrange(3)], len(tokens)) for row, (version, tokens, _) in rows.items()}
        assert store.num_tokens <= 60
        for version, tokens, at in rows.values():
            owner = next((r for r, v in versions.items() if v == version), None)
            if owner is not None and found(store, owner, version, tokens[:at]):
                hits += 1
            else:
                misses += 1
    assert hits > 1000 and misses > 100


def test_what_is_dropped_is_gone_and_room_comes_back():
    store = kept(8)
    for run in range(5):
        store.publish(run, run + 1)
        compute(store, [(run + 1, 0, list(range(8)), 0, 8)])
        assert found(store, run, run + 1, list(range(8))) and store.keeps(run + 1)
        store.change(run)
        assert not found(store, run, run + 1, [0]) and not store.keeps(run + 1)
    assert store.num_tokens == 0 and store.nbytes > 0
    store.drop()
    assert store.nbytes == 0


def test_no_room_at_all():
    store = kept(0)
    store.publish(1, 1)
    compute(store, [(1, 0, [3, 4], 0, 2)])
    assert not store.keeps(1) and not found(store, 1, 1, [3]) and store.nbytes == 0


def test_several_records_at_once():
    seen = []
    records = [lambda layer, name, tensor, i=i: seen.append((i, layer, name)) for i in range(2)]
    assert all_of([]) is None and all_of(records[:1]) is records[0]
    all_of(records)(3, "o", torch.zeros(1))
    assert seen == [(0, 3, "o"), (1, 3, "o")]
