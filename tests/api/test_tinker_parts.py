"""What Tinker's server is made of, without an engine: order, seats, futures, the wire against the SDK's own code."""

import asyncio
import json

import numpy as np
import pytest
import zstandard
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tandem.api.tinker_futures import Futures
from tandem.api.tinker_order import MAX_WAITING, Order
from tandem.api.tinker_residents import Residents
from tandem.api.tinker_results import PassResult, Plain, Sampled, SampleResult
from tandem.api.tinker_seats import Seats
from tandem.api.tinker_wire import PROTOBUF, read_pass, unpack
from tandem.errors import Gone, InvalidRequest, NotFound, Overloaded, TandemError
from tandem.work import PassReport

# ---------------------------------------------------------------- order


def test_operations_run_in_the_order_of_their_numbers():
    order = Order()
    assert order.add(2, "b", 0.0) == [] and order.add(3, "c", 0.0) == []
    assert order.add(1, "a", 0.0) == ["a", "b", "c"]
    assert order.add(4, "d", 0.0) == ["d"] and order.next_seq == 5


@pytest.mark.parametrize("again", [1, 3])
def test_a_number_is_taken_once(again):
    order = Order()
    order.add(1, "a", 0.0), order.add(3, "c", 0.0)
    with pytest.raises(InvalidRequest, match="used before"):
        order.add(again, "x", 0.0)


def test_what_waits_for_a_lost_number_is_given_up_and_the_rest_goes_on():
    order = Order()
    order.add(1, "a", 0.0)
    order.add(3, "c", 1.0), order.add(4, "d", 5.0)
    assert order.overdue(2.0) == ["c"]
    assert order.add(2, "b", 6.0) == ["b", "d"], "the number given up is not waited for"
    assert order.next_seq == 5
    with pytest.raises(InvalidRequest):
        order.add(3, "c", 7.0)


def test_only_so_many_wait():
    order = Order()
    for seq in range(2, MAX_WAITING + 2):
        order.add(seq, seq, 0.0)
    with pytest.raises(Overloaded):
        order.add(MAX_WAITING + 2, "x", 0.0)
    assert len(order.add(1, 1, 0.0)) == MAX_WAITING + 1


# ---------------------------------------------------------------- seats


async def test_sessions_take_turns_and_seats_come_back():
    seats, log = Seats(4), []

    async def one(session, num):
        await seats.take(session, num)
        log.append(session)
        await asyncio.sleep(0)
        seats.give(num)

    await asyncio.gather(*(one("greedy", 2) for _ in range(20)), *(one("modest", 2) for _ in range(2)))
    assert log.index("modest") < 4 and log.count("greedy") == 20
    assert seats.num_free == 4


async def test_who_gives_up_leaves_no_seat_behind():
    seats = Seats(2)
    await seats.take("a", 2)
    waiting = [asyncio.create_task(seats.take("a", 1)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    seats.give(2)  # the second and third have theirs now
    waiting[1].cancel()  # though it has not run since
    await asyncio.gather(*waiting, return_exceptions=True)
    assert seats.num_free == 1


# ---------------------------------------------------------------- futures


async def result_of(value):
    return Plain({"value": value})


async def test_futures_are_their_tenants_own():
    futures = Futures()
    future = futures.add("a", "s", "key", "sample", result_of(1))
    assert futures.find("key") is future and futures.get("a", future.request_id) is future
    assert (await futures.wait(future, 1.0)).json() == {"value": 1}
    for tenant, request_id in (("b", future.request_id), ("a", "req_unknown")):
        with pytest.raises(NotFound):
            futures.get(tenant, request_id)


async def test_what_nobody_collects_goes():
    futures = Futures(kept_s=10.0)
    future = futures.add("a", "s", "key", "sample", result_of(1))
    await future.task
    await asyncio.sleep(0)
    futures.sweep(future.done_s + 9.0)
    assert len(futures) == 1
    futures.sweep(future.done_s + 11.0)
    assert len(futures) == 0 and futures.find("key") is None
    with pytest.raises(Gone):
        futures.get("a", future.request_id)
    with pytest.raises(NotFound):
        futures.get("b", future.request_id)


async def test_failures_are_results_too():
    async def fails(error):
        raise error

    futures = Futures()
    made = [futures.add("a", "s", i, "x", fails(e)) for i, e in enumerate((InvalidRequest("no"), TandemError("oh")))]
    told = [(await futures.wait(f, 1.0)).json() for f in made]
    assert told == [{"error": "no", "category": "user"}, {"error": "oh", "category": "server"}]


async def test_a_pending_future_says_so():
    futures = Futures()
    future = futures.add("a", "s", 1, "x", asyncio.sleep(30))
    assert await futures.wait(future, 0.01) is None
    futures.cancel(future)
    assert "cancelled" in (await futures.wait(future, 1.0)).json()["error"]


# ---------------------------------------------------------------- the wire


def request(*data, loss="cross_entropy", config=None):
    body = types.ForwardBackwardRequest(types.ForwardBackwardInput(list(data), loss, config), "model", 7)
    return forward_backward_request_to_proto(body)


def datum(tokens, **inputs):
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def read(message):
    return read_pass(message.SerializeToString(), PROTOBUF, False)


def test_protobuf_of_the_sdk():
    weights = np.asarray([0.5, -1.0, 0.0], np.float32)
    message = request(datum([1, 2, 3], target_tokens=[2, 3, 4], weights=weights), config={"beta": 0.5})
    message.forward_only = True
    found = read(message)
    assert (found.model_id, found.seq_id, found.forward_only) == ("model", 7, True)
    data = found.data()
    assert data.examples[0].tokens == [1, 2, 3] and data.examples[0].targets == [2, 3, 4]
    assert data.examples[0].weights == [0.5, -1.0, 0.0]
    assert (data.loss, data.loss_params, data.shapes) == ("cross_entropy", {"beta": 0.5}, [(3,)])


# What SDK 0.16.1 sends.
OLD_BODY = {
    "forward_backward_input": {
        "data": [
            {
                "loss_fn_inputs": {
                    "target_tokens": {"data": [5, 6, 7], "dtype": "int64", "shape": [3]},
                    "logprobs": {"data": [-1.5, -2.0, -0.5], "dtype": "float32", "shape": [3]},
                    "advantages": {"data": [1.0, 0.0, -1.0], "dtype": "float32", "shape": [3]},
                },
                "model_input": {"chunks": [{"tokens": [4, 5, 6]}]},
            }
        ],
        "loss_fn": "ppo",
        "loss_fn_config": {"clip_low_threshold": 0.9},
    },
    "model_id": "m",
    "seq_id": 2,
}


def test_json_of_older_sdks():
    found = read_pass(json.dumps(OLD_BODY).encode(), "application/json", False)
    data = found.data()
    assert (found.model_id, found.seq_id, found.forward_only) == ("m", 2, False)
    assert (data.loss, data.loss_params, data.shapes) == ("ppo", {"clip_low_threshold": 0.9}, [(3,)])
    example = data.examples[0]
    assert (example.tokens, example.targets, example.logprobs) == ([4, 5, 6], [5, 6, 7], [-1.5, -2.0, -0.5])
    assert example.weights == [1.0, 0.0, 1.0], "where the advantage is zero there is nothing to compute"


def test_sparse_rows():
    torch = pytest.importorskip("torch")
    targets, weights = torch.tensor([[7, 0, 9], [3, 0, 0]]), torch.tensor([[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]])
    data = read(request(datum([1, 2], target_tokens=targets, weights=weights))).data()
    assert data.examples[0].soft_targets == targets.tolist() and data.shapes == [(2, 3)]
    assert data.examples[0].soft_weights == weights.tolist()


def broken(change):
    message = request(datum([1, 2, 3], target_tokens=[2, 3, 4], weights=np.ones(3, np.float32)))
    change(message.data[0])
    return message


BROKEN = {
    "cut bytes": lambda d: setattr(d.loss_fn_inputs["weights"], "dense", b"12345"),
    "shape": lambda d: d.loss_fn_inputs["weights"].shape.append(2),
    "negative shape": lambda d: d.loss_fn_inputs["weights"].shape.__setitem__(0, -3),
    "no dtype": lambda d: setattr(d.loss_fn_inputs["weights"], "dtype", 0),
    "floats for ids": lambda d: setattr(d.loss_fn_inputs["target_tokens"], "dtype", 1),
    "unknown input": lambda d: d.loss_fn_inputs["speed"].CopyFrom(d.loss_fn_inputs["weights"]),
    "no targets": lambda d: d.loss_fn_inputs.pop("target_tokens"),
    "image": lambda d: setattr(d.model_input[0].image, "data", b"png"),
    "too few": lambda d: setattr(d.model_input[0].encoded_text, "tokens", b"\1\0\0\0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_data_that_cannot_be_trained_on(what):
    found = read(broken(BROKEN[what]))
    assert found.seq_id == 7
    with pytest.raises(InvalidRequest):
        found.data()


@pytest.mark.parametrize("crow, col", [([0, 1], [0]), ([0, 2, 1], [0]), ([0, 1, 1], [9]), ([0, 1, 2], [0])])
def test_sparse_rows_that_do_not_fit(crow, col):
    message = request(datum([1, 2], target_tokens=[2, 3]))
    csr = message.data[0].loss_fn_inputs["target_tokens"]
    csr.sparse_csr.values = np.asarray([5], "<i8").tobytes()
    csr.sparse_csr.crow_indices, csr.sparse_csr.col_indices = (np.asarray(x, "<i8").tobytes() for x in (crow, col))
    del csr.shape[:]
    csr.shape.extend([2, 3])
    with pytest.raises(InvalidRequest):
        read(message).data()


def test_a_sparse_tensor_cannot_blow_up():
    message = request(datum([1, 2], target_tokens=[2, 3]))
    csr = message.data[0].loss_fn_inputs["target_tokens"]
    csr.sparse_csr.values = b""
    csr.shape[:] = [2**31, 2**31]
    with pytest.raises(InvalidRequest):
        read(message).data()


def test_zstd():
    body = b"tokens " * 1000
    packed = zstandard.ZstdCompressor().compress(body)
    assert unpack(packed, "zstd", 2**20) == body and unpack(body, "", 1) == body
    for damaged, encoding, limit in (
        (packed, "zstd", 100), (packed[:-5], "zstd", 2**20), (body, "zstd", 2**20), (body, "br", 2**20)
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            unpack(damaged, encoding, limit)


def test_passes_as_the_sdk_reads_them():
    report = PassReport(
        loss=1.5, nll=2.0, num_tokens=4, num_correct=1, logprobs=[[-1.0, -2.0], [-3.0], [-1.0, -2.0, -3.0, -4.0]],
        metrics={"clipped": 0.25},
    )  # fmt: skip
    result = PassResult(report, [(2,), (1,), (2, 2)])
    found = deserialize_forward_backward_output(result.protobuf())
    assert found.metrics == {"loss:sum": 1.5, "tokens:sum": 4.0, "clipped:sum": 0.25}
    outputs = [o["logprobs"] for o in found.loss_fn_outputs]
    assert [o.data for o in outputs] == report.logprobs and [o.shape for o in outputs] == [[2], [1], [2, 2]]
    assert result.json()["loss_fn_outputs"][2]["logprobs"] == {
        "data": [-1.0, -2.0, -3.0, -4.0], "dtype": "float32", "shape": [2, 2]
    }  # fmt: skip


def test_samples_as_the_sdk_reads_them():
    first = Sampled([5, 6], [-0.5, -1.0], [[(5, -0.5), (7, -2.0)], [(6, -1.0)]], "stop")
    sequences = [first, Sampled([9], [-3.0], [[]])]
    result = SampleResult(sequences, [None, -1.5], [None, [(4, -0.25)]], 1, 2, 3)
    found = deserialize_sample_response(result.protobuf())
    assert [s.tokens for s in found.sequences] == [[5, 6], [9]]
    assert [s.stop_reason for s in found.sequences] == ["stop", "length"]
    assert found.sequences[0].topk_logprobs == [[(5, -0.5), (7, -2.0)], [(6, -1.0)]]
    assert found.prompt_logprobs == [None, -1.5] and found.topk_prompt_logprobs == [None, [(4, -0.25)]]
    assert found.prompt_cache_hit_tokens == 3
    plain = result.json()
    assert plain["prompt_logprobs"] == [None, -1.5] and plain["sequences"][0]["logprobs"] == [-0.5, -1.0]




async def test_what_is_cancelled_before_it_began_fails_like_anything_else():
    futures = Futures()
    future = futures.add("a", "s", 1, "x", result_of(1))
    futures.cancel(future)
    assert "cancelled" in (await futures.wait(future, 1.0)).json()["error"]


# ---------------------------------------------------------------- residents


class Adapters:
    """An engine that remembers names."""

    def __init__(self, most, others=0):
        self.max_resident_adapters, self.adapters = most, {f"job-{i}": None for i in range(others)}

    def publish(self, model_id, name):
        self.adapters[name] = model_id

    def retire_adapter(self, name):
        self.adapters.pop(name, None)

    async def load_adapter(self, name, path):
        self.adapters[name] = path


def test_snapshots_leave_room_for_others_and_for_each_model():
    engine = Adapters(20, others=3)
    residents = Residents(engine)
    residents.publish("modest", "s", "tinker:modest")
    for i in range(50):
        residents.publish("greedy", "s", f"tinker:greedy-{i}")
    mine = [name for name in engine.adapters if name.startswith("tinker:")]
    assert len(mine) == 10 and "tinker:modest" in mine
    assert mine[1:] == [f"tinker:greedy-{i}" for i in range(41, 50)]


async def test_what_is_in_use_stays_and_files_go_first(tmp_path):
    engine = Adapters(8)
    residents = Residents(engine)
    residents.publish("m", "s", "tinker:used")
    used = await residents.use("tinker:used", "s", None)
    await residents.use("tinker://r/weights/a", "s", tmp_path)
    for i in range(3):
        if i == 2:  # full: nothing idle but the two snapshots, and the file, if it were released
            residents.release(residents._residents["tinker://r/weights/a"])
        residents.publish("m", "s", f"tinker:{i}")
    assert "tinker:used" in engine.adapters and "tinker://r/weights/a" not in engine.adapters
    assert {"tinker:0", "tinker:1", "tinker:2"} <= engine.adapters.keys()
    residents.release(used)
    with pytest.raises(Gone, match="newer snapshots"):
        await residents.use("tinker:never", "s", None)
    residents.end_session("s")
    assert engine.adapters == {}
