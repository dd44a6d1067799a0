"""Tinker's real SDK over 127.0.0.1 on a tiny model: what a training loop does, and what comes of it."""

import sys
import warnings
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

sys.path.insert(0, str(Path(__file__).parent))
from tinker_server import TinkerServer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PROMPT = [5, 6, 7]
GREEDY = types.SamplingParams(max_tokens=5, temperature=0.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with TinkerServer(tmp_path_factory.mktemp("tinker")) as running:
        running.url = running.start()
        yield running


@pytest.fixture(scope="module", autouse=True)
def quiet():
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKER_TELEMETRY", "0")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def service(server):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-one", user_metadata={"by": "a test"})
        yield client
        client.close("success").result()


@pytest.fixture
def training(service, server):
    return service.create_lora_training_client(server.model, rank=8, seed=1).result()


def datum(tokens, targets, **inputs):
    inputs = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": np.asarray(targets, np.int64)} | inputs,
    )


def sentence(seed=0, length=12):
    tokens = [int(t) for t in np.random.default_rng(seed).integers(3, 259, length + 1)]
    return tokens[:-1], tokens[1:]


def step(client, batch, learning_rate=1e-2, loss="cross_entropy"):
    passed = client.forward_backward(batch, loss)
    updated = client.optim_step(types.AdamParams(learning_rate=learning_rate))
    return passed.result(), updated.result()


def logprobs_of(output):
    return np.concatenate([np.asarray(o["logprobs"].data) for o in output.loss_fn_outputs])


def greedy(client):
    return client.sample(types.ModelInput.from_ints(PROMPT), 1, GREEDY).result().sequences[0]


def test_losses_are_sums_over_the_tokens(training):
    tokens, targets = sentence()
    weights = np.linspace(-0.5, 1.0, len(tokens), dtype=np.float32)
    once = training.forward([datum(tokens, targets, weights=weights)], "cross_entropy").result()
    twice = training.forward([datum(tokens, targets, weights=weights)] * 2, "cross_entropy").result()
    wanted = -(logprobs_of(once) * weights).sum()
    assert once.metrics["loss:sum"] == pytest.approx(wanted, rel=1e-5)
    assert twice.metrics["loss:sum"] == pytest.approx(2 * wanted, rel=1e-5)
    assert len(twice.loss_fn_outputs) == 2 and all(len(o["logprobs"].data) == 12 for o in twice.loss_fn_outputs)
    assert all(key.count(":") == 1 for key in twice.metrics)


def test_without_weights_every_token_counts_once(training):
    tokens, targets = sentence()
    found = training.forward([datum(tokens, targets)], "cross_entropy").result()
    assert found.metrics["loss:sum"] == pytest.approx(-logprobs_of(found).sum(), rel=1e-5)


def test_training_lowers_the_loss_and_gradients_add_up(training, service, server):
    tokens, targets = sentence()
    losses = [step(training, [datum(tokens, targets)])[0].metrics["loss:sum"] for _ in range(5)]
    assert losses[-1] < losses[0] / 2

    def trained(batches):
        client = service.create_lora_training_client(server.model, rank=4, seed=3).result()
        for batch in batches:
            client.forward_backward(batch, "cross_entropy")
        norm = client.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm:mean"]
        return norm, logprobs_of(client.forward([datum(tokens, targets)], "cross_entropy").result())

    other = datum(*sentence(1))
    apart, together = trained([[datum(tokens, targets)], [other]]), trained([[datum(tokens, targets), other]])
    assert apart[0] == pytest.approx(together[0], rel=1e-4)
    assert apart[1] == pytest.approx(together[1], abs=1e-3)


def test_a_big_batch_arrives_in_pieces(training):
    """More datums than the SDK sends at once: it sends the first piece last."""
    batch = [datum(*sentence(i, 4)) for i in range(1100)]
    found = training.forward(batch, "cross_entropy").result()
    assert len(found.loss_fn_outputs) == 1100
    alone = training.forward(batch[1050:1051], "cross_entropy").result()
    assert found.loss_fn_outputs[1050]["logprobs"].data == pytest.approx(alone.loss_fn_outputs[0]["logprobs"].data)


def test_soft_targets_dense_and_sparse(training):
    tokens, targets = sentence()
    other = [(t + 1) % 250 + 3 for t in targets]
    both, weights = np.stack([targets, other], 1), np.full((12, 2), (0.75, 0.25), np.float32)
    weights[3] = 0.0
    hard = [logprobs_of(training.forward([datum(tokens, t)], "cross_entropy").result()) for t in (targets, other)]
    wanted = np.stack(hard, 1)
    sparse = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": torch.tensor(both), "weights": torch.tensor(weights)},
    )
    for each in (datum(tokens, both, weights=weights), sparse):
        found = training.forward_backward([each], "cross_entropy").result()
        output = found.loss_fn_outputs[0]["logprobs"]
        assert output.shape == [12, 2]
        assert np.asarray(output.data).reshape(12, 2) == pytest.approx(wanted, abs=1e-4)
        assert found.metrics["loss:sum"] == pytest.approx(-(wanted * weights).sum(), rel=1e-4)


def test_sampling_and_training_agree_on_log_probabilities(training):
    """The figure RL depends on: what the sampler says of its tokens is what the training forward says of them."""
    step(training, [datum(*sentence())])
    sampling = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=24, temperature=1.0, seed=7)
    response = sampling.sample(types.ModelInput.from_ints(PROMPT), 4, params).result()
    assert len({tuple(s.tokens) for s in response.sequences}) == 4
    for sequence in response.sequences:
        tokens = PROMPT + sequence.tokens
        output = training.forward([datum(tokens[:-1], tokens[1:])], "cross_entropy").result()
        assert np.abs(logprobs_of(output)[2:] - sequence.logprobs).max() < 1e-5
        scored = sampling.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        assert scored[0] is None and np.abs(np.asarray(scored[1:]) - logprobs_of(output)).max() < 1e-5


def test_snapshots_keep_their_weights(training):
    before = greedy(training.save_weights_and_get_sampling_client().result())
    first = training.save_weights_and_get_sampling_client().result()
    inflight = training.save_weights_and_get_sampling_client(kind="inflight").result()
    for _ in range(3):
        step(training, [datum(*sentence())])
    second = training.save_weights_and_get_sampling_client().result()
    newer = training.save_weights_and_get_sampling_client(kind="inflight").result()
    assert greedy(first).tokens == before.tokens
    assert greedy(first).logprobs == pytest.approx(before.logprobs, abs=1e-6)
    assert greedy(second).logprobs != pytest.approx(before.logprobs, abs=1e-3)
    assert greedy(inflight).logprobs == greedy(newer).logprobs == pytest.approx(greedy(second).logprobs, abs=1e-6)


def test_samples_are_reproducible_and_independent(service, server):
    sampling = service.create_sampling_client(base_model=server.model).result()
    prompt = types.ModelInput.from_ints(PROMPT)

    def draw(n, seed=3):
        params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=seed)
        response = sampling.sample(prompt, n, params).result()
        return [s.tokens for s in response.sequences]

    many = draw(20)
    assert many == draw(20) and many[:5] == draw(5) and len({tuple(t) for t in many}) == 20
    assert draw(3, seed=4) != many[:3]


def test_candidates_and_part_of_the_prompt(service, server):
    sampling = service.create_sampling_client(base_model=server.model).result()
    prompt = types.ModelInput.from_ints([5, 6, 7, 8, 9])
    response = sampling.sample(
        prompt, 1, types.SamplingParams(max_tokens=3, temperature=0.0), include_prompt_logprobs=True,
        topk_prompt_logprobs=3, topk_sample_logprobs=2, prompt_logprobs_last_n=2,
    ).result()  # fmt: skip
    assert [p is None for p in response.prompt_logprobs] == [True, True, True, False, False]
    top = response.topk_prompt_logprobs
    assert top[:3] == [None] * 3 and all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in top[3:])
    sequence = response.sequences[0]
    assert [row[0][0] for row in sequence.topk_logprobs] == sequence.tokens
    assert [row[0][1] for row in sequence.topk_logprobs] == pytest.approx(sequence.logprobs)
    whole = sampling.compute_logprobs(prompt).result()
    assert whole[3:] == pytest.approx(response.prompt_logprobs[3:], abs=1e-6)


def test_stops(service, server):
    sampling = service.create_sampling_client(base_model=server.model).result()
    prompt = types.ModelInput.from_ints(PROMPT)

    def run(**params):
        return sampling.sample(prompt, 1, types.SamplingParams(temperature=0.0, **params)).result().sequences[0]

    free = run(max_tokens=8, stop=[])
    assert free.stop_reason == "length" and len(free.tokens) == 8
    by_token = run(max_tokens=8, stop=[free.tokens[2]])
    assert by_token.stop_reason == "stop" and by_token.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    text = sampling.get_tokenizer().decode(free.tokens)
    by_text = run(max_tokens=8, stop=[text[:1]])
    assert by_text.stop_reason == "stop" and by_text.tokens == free.tokens[: len(by_text.tokens)]
    assert text[:1] in sampling.get_tokenizer().decode(by_text.tokens)


def test_save_and_load_with_and_without_the_optimizer(training, service):
    batch = [datum(*sentence())]
    for _ in range(2):
        step(training, batch)
    path = training.save_state("two").result().path
    assert path == f"tinker://{training.model_id}/weights/two"

    def follow(client):
        step(client, batch, 1e-3)
        return logprobs_of(client.forward(batch, "cross_entropy").result())

    wanted = follow(training)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().lora_rank == 8
    assert follow(resumed) == pytest.approx(wanted, abs=1e-5)
    fresh = follow(service.create_training_client_from_state(path).result())
    assert fresh != pytest.approx(wanted, abs=1e-4)  # Adam starts afresh: the first step is as long as its rate
    training.load_state_with_optimizer(path).result()
    assert follow(training) == pytest.approx(wanted, abs=1e-5)
    training.load_state(path).result()
    assert follow(training) == pytest.approx(fresh, abs=1e-5)


def test_saved_sampler_weights_survive_a_restart(training, server):
    step(training, [datum(*sentence())])
    path = training.save_weights_for_sampler("kept", user_metadata={"why": "test"}).result().path
    wanted = greedy(training.save_weights_and_get_sampling_client().result())
    later = tinker.ServiceClient(base_url=server.start(), api_key="tml-one")  # another app on the same directory
    found = tinker.RestClient(base_url=later._base_url, api_key="tml-one").list_checkpoints(training.model_id).result()
    assert [(c.tinker_path, c.checkpoint_type, c.user_metadata) for c in found.checkpoints] == [
        (path, "sampler", {"why": "test"})
    ]
    again = greedy(later.create_sampling_client(model_path=path).result())
    assert again.tokens == wanted.tokens and again.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    later.close("success").result()


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_follow_the_advantages(training, loss):
    sampling = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=1)
    sequences = sampling.sample(types.ModelInput.from_ints(PROMPT), 2, params).result().sequences
    batch = []
    for sequence, advantage in zip(sequences, (1.0, -1.0), strict=True):
        pad, tokens = [0.0] * 2, PROMPT + sequence.tokens
        inputs = {"logprobs": pad + sequence.logprobs, "advantages": pad + [advantage] * 6}
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = pad + [1.0] * 6
        if loss == "dro":
            inputs["weights"] = pad + [1.0] * 6
        batch.append(datum(tokens[:-1], [0, 0] + sequence.tokens, **inputs))
    found, _ = step(training, batch, 1e-3, loss)
    assert "loss:sum" in found.metrics
    if loss in ("importance_sampling", "ppo", "gspo"):  # every ratio is 1, so the advantages cancel
        assert found.metrics["loss:sum"] == pytest.approx(0.0, abs=1e-3)
    after = training.forward(batch, loss).result()
    gained = [
        (np.asarray(new["logprobs"].data) - np.asarray(old["logprobs"].data))[2:].sum()
        for old, new in zip(found.loss_fn_outputs, after.loss_fn_outputs, strict=True)
    ]
    assert gained[0] > 0 > gained[1]


def test_dpo_through_a_custom_loss(training):
    """Preferences as users of forward_backward_custom train them: the reference is the model as it began."""
    tokens, chosen = sentence(1)
    _, rejected = sentence(2)
    pair = [datum(tokens, chosen), datum(tokens, rejected)]
    before = training.forward(pair, "cross_entropy").result()
    reference = [torch.tensor(output["logprobs"].data) for output in before.loss_fn_outputs]

    def dpo(data, logprobs):
        gains = [(new - old).sum() for new, old in zip(logprobs, reference, strict=True)]
        margin = 0.1 * (gains[0] - gains[1])
        return -torch.nn.functional.logsigmoid(margin), {"margin": margin.item()}

    found = []
    for _ in range(3):
        passed = training.forward_backward_custom(pair, dpo)
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        found.append(passed.result().metrics)
    assert found[0]["loss:sum"] == pytest.approx(np.log(2), abs=1e-4)
    assert found[2]["loss:sum"] < found[0]["loss:sum"] and found[2]["margin"] > found[0]["margin"]


def test_losses_that_are_not_there_refuse_and_training_goes_on(training):
    tokens, targets = sentence()
    with pytest.raises(tinker.RequestFailedError, match="stable_reinforce is not available"):
        training.forward_backward([datum(tokens, targets)], "stable_reinforce").result()
    with pytest.raises(tinker.RequestFailedError, match="advantage that is not a finite number"):
        nan = [0.0] * 11 + [float("nan")]
        training.forward_backward(
            [datum(tokens, targets, logprobs=[0.0] * 12, advantages=nan)], "importance_sampling"
        ).result()
    with pytest.raises(tinker.RequestFailedError, match=r"has shape \[11\], and the model input has 12 tokens"):
        training.forward_backward([datum(tokens, targets[1:])], "cross_entropy").result()
    assert step(training, [datum(tokens, targets)])[0].metrics["loss:sum"] > 0


def test_listings(training, service, server):
    rest = tinker.RestClient(base_url=server.url, api_key="tml-one")
    training.save_state("listed").result()
    training.save_weights_for_sampler("listed", ttl_seconds=7200).result()
    run = rest.get_training_run(training.model_id).result()
    assert (run.base_model, run.lora_rank, run.is_lora) == (server.model, 8, True)
    assert run.last_checkpoint.checkpoint_id == "weights/listed"
    assert run.last_sampler_checkpoint.expires_at is not None
    assert training.model_id in [r.training_run_id for r in rest.list_training_runs(limit=100).result().training_runs]
    path = f"tinker://{training.model_id}/weights/listed"
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 8
    session_id = service.holder.get_session_id()
    assert training.model_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions().result().sessions
    rest.delete_checkpoint_from_tinker_path(path).result()
    left = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [c.checkpoint_id for c in left] == ["sampler_weights/listed"]


def test_files_of_a_checkpoint_can_be_downloaded(training, server):
    path = training.save_weights_external("peft").result().path
    rest = tinker.RestClient(base_url=server.url, api_key="tml-one")
    urls = rest.get_external_weights_urls(path).result().urls
    assert {"adapter_config.json", "adapter_model.safetensors"} <= urls.keys()
    assert httpx.get(urls["adapter_config.json"]).json()["r"] == 8
    assert httpx.get(urls["adapter_config.json"][:-30] + "x" * 30).status_code == 404


def test_the_openai_routes_sample_from_a_saved_checkpoint_and_hide_snapshots(training, server):
    path = training.save_weights_for_sampler("served").result().path
    training.save_weights_and_get_sampling_client().result()
    body = {"model": path, "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] >= 1
    names = [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert not [name for name in names if name.startswith("tinker:")]
