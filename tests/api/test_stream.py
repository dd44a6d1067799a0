"""Events of the engine into text: stop tokens, held-back bytes, late news, several prompts at once."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.api.stream import Answer, Choice, TextOptions
from tandem.errors import EngineDead
from tandem.telemetry import Telemetry
from tandem.work import Request, SamplingParams, TokenEvent

PROMPT = [5, 6, 7]


def choice_of(tokenizer, options=TextOptions(), **sampling) -> Choice:  # noqa: B008
    return Choice(0, Request(request_id="r", prompt=PROMPT, sampling=SamplingParams(**sampling)), tokenizer, options)


def events_of(ids, last="length", stop_token=False):
    for i, token in enumerate(ids):
        is_last = i == len(ids) - 1
        yield TokenEvent(request_id="r", token_id=token, finish_reason=last if is_last else None,
                         stop_token=stop_token and is_last)  # fmt: skip


def texts(choice, ids, **how):
    return [choice.push(event).text for event in events_of(ids, **how)]


def test_a_stop_token_is_counted_but_not_shown(tokenizer):
    end = tokenizer.encode("<|im_end|>", False)
    ids = [*tokenizer.encode("Hello", False), *end]
    for options, shown in ((TextOptions(), "Hello"), (TextOptions(skip_special_tokens=False), "Hello"),
                           (TextOptions(skip_special_tokens=False, include_stop=True), "Hello<|im_end|>")):  # fmt: skip
        choice = choice_of(tokenizer, options, stop_token_ids=tuple(end))
        assert "".join(texts(choice, ids, last="stop", stop_token=True)) == shown
        assert (choice.num_tokens, choice.finish_reason, choice.stop_reason) == (len(ids), "stop", end[0])
    eos = choice_of(tokenizer)
    texts(eos, ids, last="stop", stop_token=True)
    assert eos.stop_reason is None


def test_half_a_character_comes_with_the_end(tokenizer):
    ids = tokenizer.encode("🙂", False)[:-1]
    assert texts(choice_of(tokenizer), ids) == [""] * (len(ids) - 1) + ["\ufffd"]


def test_what_looked_like_a_stop_string_comes_with_the_end(tokenizer):
    ids = tokenizer.encode("Hello wor", False)
    choice = choice_of(tokenizer, TextOptions(stops=[" world"]))
    assert "".join(texts(choice, ids)) == "Hello wor" and choice.finish_reason == "length"


def test_a_cancelled_choice_is_aborted(tokenizer):
    choice = choice_of(tokenizer)
    assert choice.push(TokenEvent(request_id="r", finish_reason="cancelled")).finish_reason == "abort"


@settings(max_examples=100, deadline=None)
@given(text=st.text("Helo wrd.🙂é", max_size=30), stop=st.text("Helo wrd.🙂é", min_size=1, max_size=3))
def test_stop_strings_end_the_text_wherever_the_tokens_part(tokenizer, text, stop):
    ids = tokenizer.encode(text, False)
    if ids:
        choice = choice_of(tokenizer, TextOptions(stops=[stop]))
        shown = "".join(choice.push(event).text for event in events_of(ids) if choice.finish_reason is None)
        assert shown == text.partition(stop)[0]
        assert choice.finish_reason == ("stop" if stop in text else "length")


class ScriptedEngine:
    """Streams that yield what they are told, one list at a time, and remember what was cancelled."""

    def __init__(self, scripts):
        self.scripts, self.cancelled, self.closed = scripts, [], 0

    def submit(self, request):
        return ScriptedStream(self, self.scripts[request.request_id])

    def cancel(self, request_id, index=None):
        self.cancelled.append((request_id, index))


class ScriptedStream:
    def __init__(self, engine, script):
        self.engine, self.script = engine, iter(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0.001)
        news = next(self.script, None)
        if isinstance(news, Exception):
            raise news
        if news is None:
            raise StopAsyncIteration
        return news

    async def aclose(self):
        self.engine.closed += 1


def answer_of(engine, tokenizer, requests, options=TextOptions()):  # noqa: B008
    return Answer(engine, tokenizer, Telemetry(), requests, options, 0.0)


def request(name, n=1):
    return Request(request_id=name, prompt=PROMPT, sampling=SamplingParams(n=n))


async def collect(answer):
    await answer.submit()
    found = {}
    async for deltas in answer.steps():
        for delta in deltas:
            found[delta.choice.index] = found.get(delta.choice.index, "") + delta.text
    await answer.aclose()
    return found


async def test_several_prompts_are_merged_by_index(tokenizer):
    ids = tokenizer.encode("Hello world", False)

    def script(name):
        for i, token in enumerate(ids):
            why = "stop" if i == len(ids) - 1 else None
            yield [TokenEvent(request_id=name, index=k, token_id=token, finish_reason=why) for k in (0, 1)]

    engine = ScriptedEngine({name: list(script(name)) for name in "abc"})
    found = await collect(answer_of(engine, tokenizer, [request(name, 2) for name in "abc"]))
    assert found == dict.fromkeys(range(6), "Hello world") and engine.closed == 3 and not engine.cancelled


async def test_a_stop_string_cancels_only_its_choice_and_late_news_is_dropped(tokenizer):
    hello, world = tokenizer.encode("Hello", False), tokenizer.encode(" world", False)
    script = [[TokenEvent(request_id="a", index=0, token_id=t), TokenEvent(request_id="a", index=1, token_id=t)]
              for t in hello]  # fmt: skip
    script += [[TokenEvent(request_id="a", index=0, token_id=t)] for t in world]
    script += [[TokenEvent(request_id="a", index=0, finish_reason="cancelled"),
                TokenEvent(request_id="a", index=1, token_id=world[0], finish_reason="length")]]  # fmt: skip
    engine = ScriptedEngine({"a": script})
    answer = answer_of(engine, tokenizer, [request("a", 2)], TextOptions(stops=[" w"]))
    found = await collect(answer)
    assert found[0] == "Hello" and answer.choices[0].finish_reason == "stop"
    assert engine.cancelled == [("a", 0)]
    assert answer.choices[1].finish_reason in ("length", "stop")


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_an_error_of_one_prompt_ends_the_answer(tokenizer, names):
    script = [[TokenEvent(request_id="a", token_id=9)], EngineDead("killed")]
    engine = ScriptedEngine({name: list(script) for name in names})
    answer = answer_of(engine, tokenizer, [request(name) for name in names])
    await answer.submit()
    with pytest.raises(EngineDead):
        async for _ in answer.steps():
            pass
    await answer.aclose()
    assert engine.closed == len(names)
