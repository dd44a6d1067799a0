"""Which tokens are learnt, against transformers' own assistant mask, for templates with and without marks."""

import itertools

import chat_templates
import pytest
import tiny_models
import transformers

from tandem.config import DEMO_MODEL
from tandem.errors import InvalidRequest
from tandem.finetune import formats, render
from tandem.tokenizer import Tokenizer

TURNS = [
    {"role": "user", "content": "Where does Mira live?"},
    {"role": "assistant", "content": "Mira lives in Norbridge 東京 🙂"},
    {"role": "user", "content": "And Dan?"},
    {"role": "assistant", "content": "Nobody knows."},
]
SYSTEM = [{"role": "system", "content": "You are helpful."}]
CHATS = {
    "one": TURNS[:2],
    "two": TURNS,
    "system": SYSTEM + TURNS,
    "two answers": [*TURNS, {"role": "assistant", "content": "Sorry!"}],
    "same words": [TURNS[0], TURNS[1], TURNS[0], TURNS[1]],
    "line breaks": [{"role": "user", "content": "hello\n"}, {"role": "assistant", "content": "one\n\ntwo"}],
}
BACKENDS = {"byte level": chat_templates.byte_level, "sentencepiece": chat_templates.sentencepiece}


@pytest.fixture(scope="module", params=list(BACKENDS))
def hf(request):
    return BACKENDS[request.param]()


def learnt(messages, tokenizer, weights=None, tools=None):
    """(ids, mask) by our code, all turns weighing 1 unless `weights` says otherwise, by message."""
    row = {
        "messages": [
            {**m, **({"weight": weights[i]} if weights and i in weights else {})} for i, m in enumerate(messages)
        ]
    }
    row |= {"tools": tools} if tools else {}
    marked = render.mark(formats.convert(row, "chat"), tokenizer)
    ((ids, ranges),) = render.encode([marked], tokenizer)
    return ids, [int(any(a <= i < b for a, b in ranges)) for i in range(len(ids))]


def theirs(hf, messages, template, tools=None):
    """(ids, mask) by transformers."""
    made = hf.apply_chat_template(
        messages, chat_template=template, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], made["assistant_masks"]


# Chats that the family's template refuses, drops a message of, or (without marks) hides an answer in.
NO_SUCH = [("gemma", "system"), ("gemma", "two answers"), ("mistral", "system"), ("forgetful", "two answers")]
CASES = [case for case in itertools.product(chat_templates.STYLES, CHATS) if case not in NO_SUCH]


@pytest.mark.parametrize(("style", "name"), CASES)
def test_marked_and_plain_templates_learn_what_transformers_masks(hf, style, name):
    template, messages = chat_templates.STYLES[style], CHATS[name]
    expected = theirs(hf, messages, template)
    assert sum(expected[1]) > 0
    assert learnt(messages, Tokenizer(hf, template)) == expected
    assert learnt(messages, Tokenizer(hf, chat_templates.plain(template))) == expected


def test_the_plain_templates_write_the_same_text(hf):
    for template in chat_templates.STYLES.values():
        texts = [
            hf.apply_chat_template(TURNS, chat_template=t, tokenize=False)
            for t in (template, chat_templates.plain(template))
        ]
        assert texts[0] == texts[1]
        assert not Tokenizer(hf, chat_templates.plain(template)).marks_generation


@pytest.mark.parametrize("marks", [True, False])
def test_weight_0_leaves_a_turn_out(hf, marks):
    template = chat_templates.CHATML if marks else chat_templates.plain(chat_templates.CHATML)
    tokenizer = Tokenizer(hf, template)
    ids, both = learnt(TURNS, tokenizer)
    _, first = learnt(TURNS, tokenizer, {1: 1, 3: 0})
    _, last = learnt(TURNS, tokenizer, {1: 0})
    assert [a + b for a, b in zip(first, last, strict=True)] == both
    assert tokenizer.decode([i for i, m in zip(ids, last, strict=True) if m], False) == "Nobody knows.<|im_end|>"


def test_weight_0_where_a_template_marks_several_parts_of_a_turn(hf):
    template = chat_templates.CHATML.replace(
        "{% generation %}", "{% generation %}{{ '(' }}{% endgeneration %}{{ '..' }}{% generation %}"
    )
    tokenizer = Tokenizer(hf, template)
    ids, last = learnt(TURNS, tokenizer, {1: 0})
    assert "".join(tokenizer.token_text(i) for i, m in zip(ids, last, strict=True) if m).replace("▁", " ") in (
        "(Nobody knows.<|im_end|>", "( Nobody knows.<|im_end|>",
    )  # fmt: skip


def test_the_end_of_a_turn_is_learnt_where_the_marks_leave_it_out(hf):
    outside = chat_templates.CHATML.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    inside = theirs(hf, TURNS, chat_templates.CHATML)
    assert theirs(hf, TURNS, outside)[1] != inside[1]
    assert learnt(TURNS, Tokenizer(hf, outside)) == inside


def test_tools_and_tool_calls(hf):
    call = {"type": "function", "function": {"name": "find", "arguments": '{"who": "Dan"}'}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Dunby", "tool_call_id": "1"},
        TURNS[3],
    ]
    parsed = {**call, "function": {"name": "find", "arguments": {"who": "Dan"}}}
    as_objects = [messages[0], {"role": "assistant", "content": "", "tool_calls": [parsed]}, *messages[2:]]
    for template in (chat_templates.QWEN, chat_templates.plain(chat_templates.QWEN)):
        expected = theirs(hf, as_objects, chat_templates.QWEN, tools)
        assert learnt(messages, Tokenizer(hf, template), tools=tools) == expected
    with pytest.raises(InvalidRequest, match="does not take tools"):
        learnt(messages, Tokenizer(hf, chat_templates.CHATML), tools=tools)


def test_messages_become_what_the_chat_api_makes_of_them():
    from tandem.api.schemas import ChatRequest

    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hello", "name": "Dan"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "x", "tool_call_id": "7"},
        {"role": "assistant", "content": "done", "reasoning_content": "hm"},
    ]
    request = ChatRequest.model_validate({"model": "m", "messages": messages})
    served = [message.plain(f"messages.{i}") for i, message in enumerate(request.messages)]
    assert formats.convert({"messages": messages}, "chat").messages == served


def test_the_embedded_model_and_the_tiny_ones():
    demo = transformers.PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    chat = SYSTEM + TURNS
    assert learnt(chat, Tokenizer.load(str(DEMO_MODEL))) == theirs(demo, chat, None)
    tiny = tiny_models.tokenizer()
    ids, mask = learnt(TURNS, Tokenizer(tiny))
    expected_ids, expected = theirs(tiny, TURNS, None)
    # One token a byte: transformers' mask stops at the first byte of a last character that has several.
    assert ids == expected_ids and all(m >= e for m, e in zip(mask, expected, strict=True))
    assert bytes(tiny.decode([i for i, m in zip(ids, mask, strict=True) if m]), "utf-8") == b"".join(
        m["content"].encode() for m in TURNS
    )


def test_what_trained_rows_begin_with_is_the_prompt_that_serving_makes(hf):
    """Up to the first learnt token a row is what the chat API sends to the model for the same messages."""
    for template in chat_templates.STYLES.values():
        for made in (template, chat_templates.plain(template)):
            tokenizer = Tokenizer(hf, made)
            ids, mask = learnt(TURNS, tokenizer, {1: 0})
            assert ids[: mask.index(1)] == tokenizer.render(TURNS[:3])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}", "messages\\[1\\]"),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}END{% endif %}{% endfor %}", "not render messages"),
        (
            "{% for m in messages %}{{ m.content | upper if loop.last and loop.index > 1 else m.content }}{% endfor %}",
            "otherwise when",
        ),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        (None, "no chat template"),
    ],
)
def test_templates_that_hide_what_is_the_models(template, words):
    tokenizer = Tokenizer(chat_templates.byte_level(), template)
    with pytest.raises(InvalidRequest, match=words):
        learnt(TURNS, tokenizer)


def test_a_first_turn_of_the_assistants():
    greeting = [{"role": "assistant", "content": "hello"}, *TURNS]
    hf = chat_templates.byte_level()
    assert learnt(greeting, Tokenizer(hf, chat_templates.CHATML)) == theirs(hf, greeting, chat_templates.CHATML)
    plain = Tokenizer(hf, chat_templates.plain(chat_templates.CHATML))
    with pytest.raises(InvalidRequest, match="begin with a user or system message"):
        learnt(greeting, plain)
    ids, mask = learnt(greeting, plain, {0: 0})
    assert ids == theirs(hf, greeting, chat_templates.CHATML)[0] and sum(mask) > 0
