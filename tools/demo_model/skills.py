"""Tasks with one right answer that needs no knowledge: copying, sorting, counting, short arithmetic.

Each maker returns (question, answer). `ADDITION_TWO_DIGITS` is the class the model is meant to learn only by half, so
that reinforcement learning has something to improve.
"""

from collections.abc import Callable
from random import Random

from tools.demo_model import names

Task = tuple[str, str]


def words(rng: Random, low: int, high: int) -> list[str]:
    """Different words from the list of known things."""
    return rng.sample(names.WORDS, rng.randint(low, high))


def copying(rng: Random) -> Task:
    """Copies words, numbers, names or codes."""
    shape = rng.randrange(5)
    if shape == 0:
        text = names.code(rng)
    elif shape == 1:
        text = names.person(rng)
    elif shape == 2:
        text = " ".join(names.number(rng) for _ in range(rng.randint(1, 4)))
    elif shape == 3:
        text = " ".join(rng.choice(names.WORDS) for _ in range(rng.randint(1, 8)))
    else:
        text = ", ".join(words(rng, 2, 6))
    ask = rng.choice(["Repeat: {}", "Copy this: {}", "Say: {}", "Please repeat: {}", "Repeat after me: {}", "Echo: {}",
                      "Write down: {}", "Please copy these words exactly: {}", "Say this again: {}", "Repeat this: {}"])
    return ask.format(text), text


def repeating(rng: Random) -> Task:
    word, times = rng.choice(names.WORDS), rng.randint(2, 5)
    ask = rng.choice(["Repeat the word {w} {n} times.", "Say {w} {n} times.", "Write {w} {n} times.",
                      "{n} times the word {w}, please.", "Please say the word {w} {n} times."])
    return ask.format(w=word, n=times), " ".join([word] * times)


def sorting_numbers(rng: Random) -> Task:
    numbers = rng.sample(range(1, 100), rng.randint(2, 5))
    ask = rng.choice(["Sort these numbers: {}", "Put in order: {}", "Sort: {}", "Order these numbers: {}",
                      "Sort from small to large: {}", "Please sort {}", "Arrange these numbers: {}"])
    return ask.format(", ".join(map(str, numbers))), ", ".join(map(str, sorted(numbers)))


def sorting_words(rng: Random) -> Task:
    """Three or four animals in alphabetical order."""
    picked = rng.sample(names.ANIMALS, rng.randint(2, 4))
    ask = rng.choice(["Sort by alphabet: {}", "Sort these words: {}", "Put in alphabetical order: {}",
                      "Please sort these words by alphabet: {}", "Alphabetical order, please: {}"])
    return ask.format(", ".join(picked)), ", ".join(sorted(picked))


def counting_items(rng: Random) -> Task:
    picked = words(rng, 2, 7)
    ask = rng.choice(["How many words are in this list: {}", "Count the words: {}", "How many things are these: {}",
                      "How long is this list: {}", "Count these: {}", "How many items do you see: {}"])
    return ask.format(", ".join(picked)), f"There are {len(picked)} words."


def counting_up(rng: Random) -> Task:
    low = rng.randint(1, 20)
    high = low + rng.randint(2, 8)
    ask = rng.choice(["Count from {a} to {b}.", "Count up from {a} to {b}.", "Please count from {a} to {b}.",
                      "Say the numbers from {a} to {b}.", "List the numbers from {a} to {b}."])
    return ask.format(a=low, b=high), ", ".join(map(str, range(low, high + 1)))


def picking(rng: Random) -> Task:
    """The first or last item of a list, or the list in reverse."""
    picked = words(rng, 2, 5)
    listed = ", ".join(picked)
    shape = rng.randrange(3)
    if shape == 0:
        ask = rng.choice(["What is the first word of this list: {}", "Which word comes first: {}", "First item of: {}"])
        return ask.format(listed), f"The first word is {picked[0]}."
    if shape == 1:
        ask = rng.choice(["What is the last word of this list: {}", "Which word comes last: {}", "Last item of: {}"])
        return ask.format(listed), f"The last word is {picked[-1]}."
    ask = rng.choice(["Reverse this list: {}", "Say these words backwards: {}", "Turn this list around: {}"])
    return ask.format(listed), ", ".join(reversed(picked))


def comparing(rng: Random) -> Task:
    a, b = rng.sample(range(1, 100), 2)
    if rng.random() < 0.5:
        ask = rng.choice(["Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "Larger: {a} or {b}?"])
        return ask.format(a=a, b=b), f"{max(a, b)} is larger."
    ask = rng.choice(["Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?", "Smaller: {a} or {b}?"])
    return ask.format(a=a, b=b), f"{min(a, b)} is smaller."


def sum_of(a: int, b: int, rng: Random) -> Task:
    ask = rng.choice(["What is {a} + {b}?", "{a} + {b} = ?", "How much is {a} plus {b}?", "Add {a} and {b}.",
                      "Compute {a} + {b}.", "What do you get if you add {a} and {b}?", "Please calculate {a} + {b}."])
    return ask.format(a=a, b=b), f"{a} + {b} = {a + b}."


def difference_of(a: int, b: int, rng: Random) -> Task:
    ask = rng.choice(["What is {a} - {b}?", "{a} - {b} = ?", "How much is {a} minus {b}?", "Take {b} from {a}.",
                      "Compute {a} - {b}.", "What is left if you take {b} from {a}?", "Please calculate {a} - {b}."])
    return ask.format(a=a, b=b), f"{a} - {b} = {a - b}."


def addition_small(rng: Random) -> Task:
    return sum_of(rng.randint(0, 10), rng.randint(0, 10), rng)


def subtraction_small(rng: Random) -> Task:
    a = rng.randint(0, 18)
    return difference_of(a, rng.randint(0, min(a, 10)), rng)


def addition_two_digits(rng: Random) -> Task:
    return sum_of(rng.randint(10, 99), rng.randint(10, 99), rng)


# Each skill with its weight in the corpus. The last weight is small on purpose.
SKILLS: dict[str, tuple[Callable[[Random], Task], float]] = {
    "copying": (copying, 3.0),
    "repeating": (repeating, 1.0),
    "sorting numbers": (sorting_numbers, 2.5),
    "sorting words": (sorting_words, 2.0),
    "counting items": (counting_items, 1.5),
    "counting up": (counting_up, 1.2),
    "picking": (picking, 2.0),
    "comparing": (comparing, 1.5),
    "addition small": (addition_small, 1.2),
    "subtraction small": (subtraction_small, 1.2),
    "addition two digits": (addition_two_digits, 1.2),
}


def random_task(rng: Random) -> Task:
    makers, weights = zip(*SKILLS.values(), strict=True)
    return rng.choices(makers, weights)[0](rng)
