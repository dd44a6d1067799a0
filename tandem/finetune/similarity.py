"""How alike two texts are, from 0 to 1: the metrics of the text_similarity grader that need no model and no word list.

fuzzy_match: 2 x longest common subsequence / both lengths, over characters. bleu: 4-grams, clipped, brevity penalty,
exponential smoothing (Papineni et al. 2002; Chen and Cherry 2014). gleu: the smaller of n-gram precision and recall, n
up to 4 (Wu et al. 2016). rouge_1 to rouge_5 and rouge_l: F-measure of n-grams or of the longest common subsequence,
over lower-case words (Lin 2004). bleu and gleu see words and punctuation marks, in their case.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

MAX_ORDER = 4
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"[^\W_]+")


def fuzzy_match(text: str, reference: str) -> float:
    if not text and not reference:
        return 1.0
    return 2 * _common(text, reference) / (len(text) + len(reference))


def bleu(text: str, reference: str) -> float:
    words, wanted = _WORD_OR_MARK.findall(text), _WORD_OR_MARK.findall(reference)
    if not words or not wanted:
        return 0.0
    logs, orders, halving = 0.0, 0, 1.0
    for n in range(1, MAX_ORDER + 1):
        total = len(words) - n + 1
        if total < 1:
            break
        matches: float = _matches(words, wanted, n)
        if not matches:
            if n == 1:
                return 0.0
            halving *= 2
            matches = 1 / halving
        logs += math.log(matches / total)
        orders += 1
    brevity = min(1.0, math.exp(1 - len(wanted) / len(words)))
    return brevity * math.exp(logs / orders)


def gleu(text: str, reference: str) -> float:
    words, wanted = _WORD_OR_MARK.findall(text), _WORD_OR_MARK.findall(reference)
    matches = sum(_matches(words, wanted, n) for n in range(1, MAX_ORDER + 1))
    longest = max(sum(max(0, len(side) - n + 1) for n in range(1, MAX_ORDER + 1)) for side in (words, wanted))
    return matches / longest if longest else 0.0


def rouge_n(text: str, reference: str, n: int) -> float:
    words, wanted = _lower_words(text), _lower_words(reference)
    both = max(0, len(words) - n + 1) + max(0, len(wanted) - n + 1)
    return 2 * _matches(words, wanted, n) / both if both else 0.0


def rouge_l(text: str, reference: str) -> float:
    words, wanted = _lower_words(text), _lower_words(reference)
    return 2 * _common(words, wanted) / (len(words) + len(wanted)) if words and wanted else 0.0


def _rouge(n: int) -> Callable[[str, str], float]:
    return lambda text, reference: rouge_n(text, reference, n)


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match, "bleu": bleu, "gleu": gleu, **{f"rouge_{n}": _rouge(n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}  # fmt: skip


def _lower_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _matches(words: Sequence[str], wanted: Sequence[str], n: int) -> int:
    """n-grams that both have, each as often as the one that has it less often."""
    return (_grams(words, n) & _grams(wanted, n)).total()


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n))))


def _common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence: a column of the table is one integer, a bit per entry of `a` (Hyyrö
    2004), so that texts of thousands of characters take milliseconds."""
    places: dict[Hashable, int] = {}
    for i, entry in enumerate(a):
        places[entry] = places.get(entry, 0) | 1 << i
    everything = (1 << len(a)) - 1
    column = everything
    for entry in b:
        hits = column & places.get(entry, 0)
        column = ((column + hits) | (column - hits)) & everything
    return len(a) - column.bit_count()
