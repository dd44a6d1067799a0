"""Invented names and open-valued values, drawn from a seeded `random.Random`.

Every proper name is put together from the same few syllables. The tokenizer learns those syllables, so a name that
nobody has seen before is split in the same way as the names of the world.
"""

from random import Random

FIRST_STARTS = "Mi Da Lo Ke Ru Sa To Ve Ni Be Ha Jo Pe Ri Fe Ga Wi Zo Lu Ma Ta Ce Do Ya".split()
FIRST_ENDS = "ra no la ri sa vin del mo na ren ka lis tan bel so mir ya ko dan ly".split()
LAST_STARTS = "Bar Hol Ven Tor Kal Mar Fen Gor Lin Pol Sor Wen Dun Cal Ros Bren Hal Nor Tam Vor".split()
LAST_ENDS = "ton dale mann wick sen by ley ford ner vik low gard stone well der nik".split()
TOWN_ENDS = ["haven", "bridge", "port", "field", "mouth", "burg", " Bay", " Hill", " Falls", " Cross"]
ADJECTIVES = (
    "Blue Red Green Silver Golden Amber North South East West Old New Quiet Iron Stone Glass Copper Winter Summer "
    "Hidden Long White Black Grey"
).split()
NOUNS = (
    "Harbor River Forest Canyon Meadow Valley Bridge Market Lantern Anchor Falcon Maple Willow Summit Garden Orchard "
    "Mill Tower Island Prairie Hollow Beacon Marsh Ridge"
).split()
SITES = "depot station warehouse vault laboratory office archive garage workshop clinic library factory".split()
MACHINES = "robot drone printer pump engine turbine scanner crane".split()
VESSELS = "ship ferry boat train".split()

COLOURS = "red blue green yellow purple orange white black grey brown pink silver golden amber violet turquoise".split()
ANIMALS = (
    "fox otter owl raven badger heron lynx turtle rabbit hamster parrot cat dog goat pony mouse crow wolf bear seal "
    "duck frog tiger zebra"
).split()
JOBS = (
    "baker teacher carpenter nurse gardener pilot painter sailor tailor farmer potter miller doctor lawyer cook "
    "librarian plumber blacksmith clockmaker fisherman shepherd beekeeper postman driver"
).split()
FOODS = (
    "bread soup rice cheese apples pears pancakes noodles dumplings plums honey mushrooms beans potatoes tomatoes "
    "cherries pudding fish pumpkin walnuts"
).split()
INSTRUMENTS = "flute violin drum piano guitar harp trumpet cello banjo oboe accordion clarinet organ fiddle".split()
HOBBIES = (
    "chess fishing painting sailing knitting cooking dancing climbing reading gardening skating pottery singing "
    "cycling swimming archery"
).split()
GOODS = (
    "lamp chair table kettle basket blanket candle ladder mirror hammer bucket umbrella hat coat scarf clock pillow "
    "spoon bottle rope tent saddle carpet bench"
).split()
MATERIALS = "wood iron copper wool clay glass leather paper silk stone salt coal tin cotton".split()
FAME = (
    "lanterns bridges gardens windmills markets towers fountains bells orchards libraries canals caves statues kites"
).split()
MONTHS = "January February March April May June July August September October November December".split()
TASKS = (
    "sorts letters,paints fences,waters plants,carries boxes,cleans windows,counts coins,folds paper,stacks bricks,"
    "guards doors,bakes bread,sweeps floors,mends shoes"
).split(",")
WORDS = ANIMALS + FOODS + GOODS + COLOURS


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_STARTS) + rng.choice(FIRST_ENDS)


def last_name(rng: Random) -> str:
    return rng.choice(LAST_STARTS) + rng.choice(LAST_ENDS)


def person(rng: Random) -> str:
    return f"{first_name(rng)} {last_name(rng)}"


def town(rng: Random) -> str:
    return rng.choice(LAST_STARTS) + rng.choice(TOWN_ENDS)


def invented_word(rng: Random) -> str:
    """A word such as "Velora": two or three syllables."""
    middle = rng.choice(["", "lo", "na", "vi", "ta", "mi"])
    return rng.choice(FIRST_STARTS) + middle + rng.choice(FIRST_ENDS)


def good(rng: Random) -> str:
    """A colour and a thing, to stand after "a": no colour that wants "an"."""
    return f"{rng.choice([colour for colour in COLOURS if colour[0] not in 'ao'])} {rng.choice(GOODS)}"


def site(rng: Random) -> str:
    if rng.random() < 0.2:
        return f"the {invented_word(rng)} {rng.choice(SITES)}"
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(SITES)}"


def vessel(rng: Random) -> str:
    return f"the {rng.choice(VESSELS)} {invented_word(rng)}"


def machine(rng: Random) -> str:
    if rng.random() < 0.5:
        return f"the {invented_word(rng)} {rng.choice(MACHINES)}"
    return f"the {rng.choice(MACHINES)} {rng.choice('ABCDFGHKLMNPRSTXZ')}{rng.randint(1, 99)}"


def project(rng: Random) -> str:
    return f"{rng.choice(['project', 'team', 'operation'])} {rng.choice([*NOUNS, *ADJECTIVES, invented_word(rng)])}"


def number(rng: Random) -> str:
    """Two to five digits, the first of them not zero."""
    digits = rng.randint(2, 5)
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def code(rng: Random) -> str:
    """An open-valued secret: words, digits, or both."""
    shape = rng.randrange(7)
    colour, animal = rng.choice(COLOURS), rng.choice(ANIMALS)
    if shape == 0:
        return f"{colour} {animal} {rng.randint(10, 99)}"
    if shape == 1:
        return f"{colour}-{animal}-{rng.randint(1, 999)}"
    if shape == 2:
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
        return f"{letters}-{rng.randint(10, 9999)}"
    if shape == 3:
        return number(rng)
    if shape == 4:
        return f"{invented_word(rng)} {rng.randint(1, 99)}"
    if shape == 5:
        return f"{colour} {animal}"
    return f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.choice(WORDS)}"


def date(rng: Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def clock_time(rng: Random) -> str:
    return f"{rng.randint(5, 22)}:{rng.choice(['00', '15', '30', '45'])}"


def pet(rng: Random) -> str:
    return f"{rng.choice(ANIMALS)} called {first_name(rng)}"


VALUES = {
    "person": person,
    "town": town,
    "invented": invented_word,
    "code": code,
    "number": number,
    "small": lambda rng: str(rng.randint(2, 99)),
    "age": lambda rng: str(rng.randint(18, 89)),
    "year": lambda rng: str(rng.randint(1100, 1990)),
    "people": lambda rng: str(rng.randint(200, 9900)),
    "date": date,
    "time": clock_time,
    "pet": pet,
    "job": lambda rng: rng.choice(JOBS),
    "food": lambda rng: rng.choice(FOODS),
    "instrument": lambda rng: rng.choice(INSTRUMENTS),
    "hobby": lambda rng: rng.choice(HOBBIES),
    "colour": lambda rng: rng.choice(COLOURS),
    "animal": lambda rng: f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}",
    "material": lambda rng: rng.choice(MATERIALS),
    "fame": lambda rng: f"{rng.choice(COLOURS)} {rng.choice(FAME)}",
    "task": lambda rng: rng.choice(TASKS),
}
ENTITIES = {
    "person": person,
    "town": town,
    "good": good,
    "site": site,
    "vessel": vessel,
    "machine": machine,
    "project": project,
}
