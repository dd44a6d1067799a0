"""Graders: shapes as the real SDK's, templates, formulas that can do nothing but arithmetic, metrics by plain means."""

import ast
import itertools
import math
import pickle
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import graders as sdk
from openai.types.fine_tuning import ReinforcementMethod

from tandem.errors import InvalidRequest
from tandem.finetune import graders, similarity, templates
from tandem.finetune.formula import Formula
from tandem.finetune.templates import NoSuchField, Sample

EXACT = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "eq",
}  # fmt: skip
ALIKE = {
    "type": "text_similarity", "name": "alike", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
    "evaluation_metric": "rouge_l",
}  # fmt: skip
JUDGE = {
    "type": "score_model", "name": "judge", "model": "tiny", "range": [0, 10],
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Rate {{sample.output_text}}"}]}],
    "sampling_params": {"temperature": 0.5, "max_completions_tokens": 20, "seed": 3, "top_p": 0.9},
}  # fmt: skip
CALLBACK = {"type": "endpoint", "url": "https://grader.test:8443/score", "timeout_s": 3.5}
MULTI = {
    "type": "multi", "name": "both", "graders": {"exact": EXACT, "alike": ALIKE},
    "calculate_output": "0.7 * exact + 0.3 * alike",
}  # fmt: skip


# ---- shapes


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (EXACT, sdk.StringCheckGrader), (ALIKE, sdk.TextSimilarityGrader), (JUDGE, sdk.ScoreModelGrader),
        (MULTI | {"graders": EXACT, "calculate_output": "exact"}, sdk.MultiGrader),
    ],
)  # fmt: skip
def test_the_sdks_own_graders_are_taken_and_given_back(raw, kind):
    theirs = kind.model_validate(raw).model_dump(exclude_none=True)
    ours = graders.to_json(graders.parse(theirs if raw["type"] != "multi" else raw))
    if raw["type"] == "multi":
        ours["graders"] = ours["graders"]["exact"]
    assert kind.model_validate(ours).model_dump(exclude_none=True) == theirs
    assert ReinforcementMethod.model_validate({"grader": ours}).grader.type == raw["type"]


def test_our_fields_are_the_sdks():
    """But for the python grader, which is refused, and the metrics that need a model or a word list."""
    pairs = {
        graders.StringCheck: sdk.StringCheckGrader, graders.TextSimilarity: sdk.TextSimilarityGrader,
        graders.ScoreModel: sdk.ScoreModelGrader, graders.Multi: sdk.MultiGrader,
    }  # fmt: skip
    for ours, theirs in pairs.items():
        assert {*ours.__struct_fields__, "type"} == set(theirs.model_fields)
    metrics = sdk.TextSimilarityGrader.model_fields["evaluation_metric"].annotation.__args__
    assert set(metrics) - set(similarity.METRICS) == {"cosine", "meteor"}
    operations = sdk.StringCheckGrader.model_fields["operation"].annotation
    assert msgspec.inspect.type_info(graders.StringCheck).fields[-1].type.values == tuple(sorted(operations.__args__))


def test_several_graders_by_list_and_by_name():
    listed = graders.parse(MULTI | {"graders": [EXACT, ALIKE]})
    assert listed == graders.parse(MULTI) and list(graders.leaves(listed)) == ["exact", "alike"]
    assert graders.leaves(graders.parse(CALLBACK)).keys() == {"endpoint"}


WRONG = [
    (EXACT | {"reference": "\0"}, "", "NUL"), (EXACT | {"reference": "\ud800"}, "", "Unicode"),
    (EXACT | {"reference": "x" * 70_000}, "", "characters at most"),
    (None, "type", "one of"), ([], "type", "one of"), ({"type": ["x"]}, "type", "one of"),
    ({"type": "magic"}, "type", "one of"),
    ({"type": "python", "name": "p", "source": "def grade(): ..."}, "type", '"endpoint"'),
    ({"type": "label_model"}, "type", "score_model"),
    ({k: v for k, v in EXACT.items() if k != "reference"}, "", "reference"),
    (EXACT | {"operation": "regex"}, "operation", "regex"), (EXACT | {"input": 3}, "input", "str"),
    (EXACT | {"weight": 1}, "", "weight"),
    (EXACT | {"input": "{{sample.output_text"}, "input", "without"), (EXACT | {"input": "x}}"}, "input", "without"),
    (EXACT | {"reference": "{{answer}}"}, "reference", "item.FIELD"),
    (EXACT | {"reference": "{{item.__class__ or 1}}"}, "reference", "no field"),
    (EXACT | {"reference": "{{}}"}, "reference", "no field"),
    (EXACT | {"input": "{{sample.choices}}"}, "input", "output_text"),
    (EXACT | {"input": "{{sample}}"}, "input", "output_text"),
    (EXACT | {"input": "{{sample.output_text.x}}"}, "input", "output_json"),
    (ALIKE | {"evaluation_metric": "cosine"}, "evaluation_metric", "rouge_l"),
    (ALIKE | {"evaluation_metric": "meteor"}, "evaluation_metric", "fuzzy_match"),
    (JUDGE | {"range": [1, 0]}, "range", "smaller"), (JUDGE | {"range": [0]}, "range", ""),
    (JUDGE | {"range": [0, math.inf]}, "range", "two numbers"), (JUDGE | {"input": []}, "input", "message"),
    (JUDGE | {"input": [{"role": "user", "content": {"type": "input_image"}}]}, "input[0].content", "text"),
    (JUDGE | {"input": [{"role": "user", "content": "{{x}}"}]}, "input[0].content", "item.FIELD"),
    (JUDGE | {"input": [{"role": "judge", "content": "x"}]}, "input[0].role", "judge"),
    (JUDGE | {"sampling_params": {"temperature": 3}}, "sampling_params.temperature", "2"),
    (JUDGE | {"sampling_params": {"reasoning_effort": "high"}}, "sampling_params.reasoning_effort", "effort"),
    (CALLBACK | {"url": "file:///etc/passwd"}, "url", "http"), (CALLBACK | {"url": "http://"}, "url", "http"),
    (CALLBACK | {"url": "http://a:99999/"}, "url", "http"), (CALLBACK | {"url": "http://u:p@a/"}, "url", "password"),
    (CALLBACK | {"url": "http://a/\r\nx"}, "url", "http"), (CALLBACK | {"url": "http://[::1/"}, "url", "http"),
    (CALLBACK | {"timeout_s": 0}, "timeout_s", "0.1"), (CALLBACK | {"max_retries": 99}, "max_retries", "10"),
    (MULTI | {"graders": {}}, "graders", "1 to 32"), (MULTI | {"graders": 3}, "graders", "1 to 32"),
    (MULTI | {"graders": {"a b": EXACT}}, "graders.a b", "name"),
    (MULTI | {"graders": {"max": EXACT}}, "graders.max", "name"),
    (MULTI | {"graders": {"m": MULTI}}, "graders.m.type", "part of another"),
    (MULTI | {"graders": {"e": EXACT | {"operation": 1}}}, "graders.e.operation", ""),
    (MULTI | {"calculate_output": "exact + other"}, "calculate_output", "exact"),
    (MULTI | {"calculate_output": "exact +"}, "calculate_output", "no formula"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "param", "words"), WRONG)
def test_what_is_refused_names_its_field(raw, param, words):
    with pytest.raises(InvalidRequest) as caught:
        graders.parse(raw, "grader")
    assert caught.value.param == ("grader." + param).rstrip("."), caught.value
    assert words in caught.value.message and caught.value.message.startswith(caught.value.param)


# ---- templates


def test_templates():
    item = {"a": "x {{item.b}}", "b": {"c": [1, {"d": None}], "e": "é"}, "n-1": 2.5, "0": "zero"}
    sample = Sample('{"k": [true, "v"]}')
    fill = lambda template: templates.render(template, item, sample)  # noqa: E731
    assert fill("{{item.a}}|{{ item.n-1 }}|{x}|{{item.0}}") == "x {{item.b}}|2.5|{x}|zero", "filled in once"
    assert fill("{{item.b.c}} {{item.b.c[1].d}} {{item.b.c.0}} {{item.b}}") == (
        '[1, {"d": null}] null 1 {"c": [1, {"d": null}], "e": "é"}'
    )
    assert fill("{{sample.output_text}}") == sample.output_text
    assert fill("{{sample.output_json.k[1]}} {{sample.output_json.k[0]}}") == "v true"
    for template, is_sample in (
        ("{{item.none}}", False), ("{{item.b.c[2]}}", False), ("{{item.a.x}}", False),
        ("{{sample.output_json.z}}", True),
    ):  # fmt: skip
        with pytest.raises(NoSuchField) as caught:
            fill(template)
        assert caught.value.is_sample is is_sample
        assert pickle.loads(pickle.dumps(caught.value)).is_sample is is_sample
    with pytest.raises(NoSuchField, match="not JSON"):
        templates.render("{{sample.output_json}}", item, Sample("{"))
    with pytest.raises(NoSuchField):
        templates.render("{{sample.output_json}}", item, Sample("[" * 100_000))


def test_rows_are_checked_for_what_the_grader_needs():
    grader = graders.parse(MULTI)
    graders.check_item(grader, {"answer": "x"})
    with pytest.raises(InvalidRequest, match=r"item\.answer"):
        graders.check_item(grader, {"answers": "x"})
    graders.check_item(graders.parse(CALLBACK), {})


# ---- formulas


def test_formulas_are_arithmetic():
    assert Formula("0.7*a + 0.3*b", "ab")({"a": 1, "b": 0.5}) == 0.85
    assert Formula("1 + a ^ 2", "a")({"a": 3}) == 10, "^ is a power, and binds as one"
    assert Formula("min(a, b, 2) - max(a, -b) / abs(-4)", "ab")({"a": 3, "b": 4}) == 1.25
    assert Formula(" floor(a) + ceil(a) + exp(0) + sqrt(4) + log(1) ", "a")({"a": 1.5}) == 6


EVIL = [
    "__import__('os').system('x')", "a.__class__", "a[0]", "(lambda: 1)()", "[a for a in (1,)]", "f'{a}'", "'x' * 9",
    "a if a else 1", "a and 1", "a < 1", "eval(a)", "min", "min(*a)", "max(a, key=a)", "(a := 1)", "True", "None", "1j",
    "{a}", "a; a", "a = 1", "import os", "", "()", "a @ a", "a // 0", "a % 2", "~a", "not a", "...", "b", "min(a)",
    "abs(a, a)", "abs()", "yield", "await a", "a\nb", "\0", "a" * 2000, "(" * 300, "+".join("a" * 150), "-" * 900 + "a",
    "1__0_",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_formulas_are_nothing_else(text):
    with pytest.raises(InvalidRequest):
        Formula(text, "a")


@given(st.recursive(
    st.sampled_from(["a", "b", "2", "0.5"]),
    lambda part: st.builds("({} {} {})".format, part, st.sampled_from("+-*"), part)
    | st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), part, part),
    max_leaves=20,
))  # fmt: skip
def test_formulas_as_python_computes_them(text):
    scores = {"a": 0.25, "b": -3.0}
    expected = eval(compile(ast.parse(text, mode="eval"), "x", "eval"), {}, scores)  # the oracle, on our own text
    assert Formula(text, scores)(scores) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["1 / a", "log(a)", "sqrt(a - 1)", "exp(999)", "10 ^ 999", "(a - 1) ^ 0.5", "1e999",
                                  "9" * 400 + " * a"])  # fmt: skip
def test_formulas_without_a_finite_value(text):
    formula = Formula(text, "a")
    with pytest.raises(InvalidRequest, match="a=0"):
        formula({"a": 0.0})


# ---- scores


def test_string_checks():
    sample = Sample("The answer is PARIS")
    said = lambda operation, reference: graders.score(  # noqa: E731
        graders.parse(EXACT | {"operation": operation, "reference": reference}), {"answer": "paris"}, sample
    )
    assert said("eq", "The answer is PARIS") == 1 and said("eq", "the answer is paris") == 0
    assert said("ne", "x") == 1 and said("ne", "The answer is PARIS") == 0
    assert said("like", "{{item.answer}}") == 0 and said("like", "PARIS") == 1
    assert said("ilike", "{{item.answer}}") == 1 and said("ilike", "rome") == 0


def test_similarity_against_the_libraries_own_numbers():
    """rapidfuzz 3.14 (ratio), rouge-score 0.1.2, nltk 3.10 (sentence_gleu), sacrebleu 2.6 (sentence_bleu)."""
    text, reference = "the cat sat on the mat", "the cat is sitting on the red mat"
    golden = {
        "fuzzy_match": 0.7636363636, "bleu": 0.1739350277, "gleu": 0.2692307692, "rouge_1": 0.7142857143,
        "rouge_2": 0.3333333333, "rouge_3": 0.0, "rouge_4": 0.0, "rouge_5": 0.0, "rouge_l": 0.7142857143,
    }  # fmt: skip
    assert golden.keys() == similarity.METRICS.keys()
    for name, value in golden.items():
        assert similarity.METRICS[name](text, reference) == pytest.approx(value, abs=1e-9), name
    assert similarity.bleu("the red mat", reference) == pytest.approx(0.1888756028, abs=1e-9), "shorter than 4 words"


@pytest.mark.parametrize("name", similarity.METRICS)
def test_similarity_is_from_0_to_1(name):
    metric = similarity.METRICS[name]
    long = "a b c d e f g, h"
    assert metric(long, long) == pytest.approx(1)
    assert metric("x,y,z", "a b c") == metric("", "a b c") == metric("a b c", "") == 0
    for a, b in itertools.product(["a", "b c a", long, "A. B.", "naïve 東京 🙂", ""], repeat=2):
        assert 0 <= metric(a, b) <= 1 + 1e-12


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_common_subsequences_against_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    assert similarity._common(a, b) == table[-1][-1]


def test_long_texts_take_no_time():
    rng = random.Random(1)
    a, b = ("".join(rng.choices("abcdefgh ", k=20_000)) for _ in range(2))
    assert 0.4 < similarity.fuzzy_match(a, b) < 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), ("Score: 7.5", 7.5), ("I give 3, no: 4", 4), ("-1", None), ("11", None), ("none", None), ("", None),
        (".5", 0.5), ("1e1", 10), ("0.", 0), ("v1.2.3", None), ("**8**", 8), ("9" * 400, None), ("8/10", 10),
    ],
)  # fmt: skip
def test_reading_a_judges_number(text, score):
    assert graders.read_score(text, 0, 10) == score
