"""How facts are said and asked: one `Relation` per attribute, with its canonical answer and its many phrasings.

A template has the fields {e} (entity) and, in answers and statements, {v} (value). Questions come from three parts:
direct questions, clauses ("where {e} lives") and noun phrases ("the home of {e}"), the last two put into wrappers that
all relations share, so that what is learnt about a wrapper with one relation carries over to the others.
"""

from dataclasses import dataclass
from functools import cached_property

CLAUSE_WRAPPERS = (
    "Tell me {}.",
    "Do you know {}?",
    "Can you tell me {}?",
    "I would like to know {}.",
    "Could you say {}?",
    "I want to find out {}.",
)
NOUN_WRAPPERS = (
    "What is {}?",
    "Give me {}.",
    "I need {}.",
    "Please name {}.",
    "I forgot {}. Can you help?",
    "Do you happen to know {}?",
)


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity; `name` is unique among the relations of the world."""

    name: str
    kind: str
    value: str
    answer: str
    direct: tuple[str, ...]
    clauses: tuple[str, ...]
    nouns: tuple[str, ...]
    statements: tuple[str, ...] = ()

    @cached_property
    def phrasings(self) -> tuple[str, ...]:
        """Every question template, in a fixed order: its index names it."""
        from_clauses = [wrapper.format(clause) for clause in self.clauses for wrapper in CLAUSE_WRAPPERS]
        from_nouns = [wrapper.format(noun) for noun in self.nouns for wrapper in NOUN_WRAPPERS]
        return (*self.direct, *from_clauses, *from_nouns)

    @cached_property
    def sayings(self) -> tuple[str, ...]:
        """Every statement template; the first is the canonical answer."""
        return (self.answer, *self.statements)

    def ask(self, phrasing: int, entity: str) -> str:
        return sentence(self.phrasings[phrasing].format(e=entity))

    def say(self, entity: str, value: str, saying: int = 0) -> str:
        return sentence(self.sayings[saying].format(e=entity, v=value))


def attribute_of(attribute: str, kind: str, value: str, name: str = "") -> Relation:
    """A relation for any noun: "The {attribute} of {e} is {v}."."""
    a = attribute
    return Relation(
        name=name or f"{kind}.{a}",
        kind=kind,
        value=value,
        answer=f"The {a} of {{e}} is {{v}}.",
        direct=(
            f"What {a} does {{e}} have?",
            f"Which {a} belongs to {{e}}?",
            f"What is the {a} for {{e}}?",
            f"Which {a} goes with {{e}}?",
            f"What {a} was given to {{e}}?",
            f"{{e}} has which {a}?",
            f"{a} of {{e}}?",
            f"{{e}}: {a}?",
        ),
        clauses=(f"what the {a} of {{e}} is", f"which {a} {{e}} has"),
        nouns=(f"the {a} of {{e}}", f"{{e}}'s {a}"),
        statements=(
            f"{{e}} has the {a} {{v}}.",
            f"For {{e}}, the {a} is {{v}}.",
            f"{{v}} is the {a} of {{e}}.",
            f"{{e}}'s {a} is {{v}}.",
        ),
    )


PERSON = (
    Relation(
        "home", "person", "town", "{e} lives in {v}.",
        ("Where does {e} live?", "In which town does {e} live?", "What town is {e} living in?",
         "Where is {e} at home?", "Where can I find the house of {e}?",
         "To which town should I send a letter for {e}?"),
        ("where {e} lives", "in which town {e} lives"),
        ("the home town of {e}", "the town where {e} lives"),
        ("The home of {e} is in {v}.", "{v} is the town where {e} lives.", "{e} has a house in {v}."),
    ),
    Relation(
        "job", "person", "job", "{e} works as a {v}.",
        ("What does {e} do for a living?", "What does {e} work as?", "What kind of work does {e} do?",
         "Which job does {e} have?", "How does {e} earn money?", "What is {e} by trade?"),
        ("what {e} does for a living", "what {e} works as"),
        ("the job of {e}", "{e}'s profession"),
        ("The job of {e} is {v}.", "By trade, {e} is a {v}.", "{e} earns a living as a {v}."),
    ),
    Relation(
        "pet", "person", "pet", "{e} has a {v}.",
        ("What pet does {e} have?", "Which animal does {e} keep?", "Does {e} have a pet?",
         "What animal lives with {e}?", "Who is the animal friend of {e}?", "What kind of pet does {e} own?"),
        ("which pet {e} has", "what animal {e} keeps at home"),
        ("the pet of {e}", "{e}'s pet animal"),
        ("The pet of {e} is a {v}.", "{e} keeps a {v} at home.", "At home, {e} owns a {v}."),
    ),
    Relation(
        "food", "person", "food", "{e} likes to eat {v}.",
        ("What does {e} like to eat?", "Which food does {e} like best?", "What should I cook for {e}?",
         "What does {e} eat most happily?", "What dish makes {e} happy?", "What would {e} order for dinner?"),
        ("what {e} likes to eat", "which food {e} loves"),
        ("the favourite food of {e}", "{e}'s favourite meal"),
        ("The favourite food of {e} is {v}.", "{e} loves {v}.", "For dinner, {e} always wants {v}."),
    ),
    Relation(
        "instrument", "person", "instrument", "{e} plays the {v}.",
        ("Which instrument does {e} play?", "What does {e} play in the band?", "What musical instrument does {e} play?",
         "On which instrument can {e} make music?", "What does {e} practise every evening?",
         "Which instrument did {e} learn?"),
        ("which instrument {e} plays", "what {e} plays in the band"),
        ("the instrument of {e}", "{e}'s musical instrument"),
        ("The instrument of {e} is the {v}.", "In the band, {e} plays the {v}.",
         "{e} practises the {v} every evening."),
    ),
    Relation(
        "colour", "person", "colour", "The favourite colour of {e} is {v}.",
        ("Which colour does {e} like best?", "What colour does {e} love?", "Which colour would {e} choose?",
         "In what colour would {e} paint a house?", "What colour should a gift for {e} have?",
         "Which colour is dearest to {e}?"),
        ("which colour {e} likes best", "what colour {e} would choose"),
        ("the favourite colour of {e}", "{e}'s best loved colour"),
        ("{e} likes the colour {v} best.", "{e}'s favourite colour is {v}.", "{e} would paint everything {v}."),
    ),
    Relation(
        "age", "person", "age", "{e} is {v} years old.",
        ("How old is {e}?", "How many years old is {e}?", "What age is {e}?",
         "How many birthdays has {e} had?", "How many years has {e} lived?",
         "How many candles are on the cake of {e}?"),
        ("how old {e} is", "how many years {e} has lived"),
        ("the age of {e}", "{e}'s age in years"),
        ("The age of {e} is {v}.", "{e} has lived for {v} years.", "At {v} years of age, {e} is still young at heart."),
    ),
    Relation(
        "birthday", "person", "date", "{e} was born on {v}.",
        ("When was {e} born?", "When is the birthday of {e}?", "On which day was {e} born?",
         "On what date does {e} celebrate a birthday?", "When should I congratulate {e}?",
         "Which day is the birthday of {e}?"),
        ("when {e} was born", "on which day {e} has a birthday"),
        ("the birthday of {e}", "{e}'s date of birth"),
        ("The birthday of {e} is {v}.", "{e} celebrates a birthday on {v}.", "On {v}, {e} has a birthday."),
    ),
    Relation(
        "hobby", "person", "hobby", "{e} spends free time on {v}.",
        ("What does {e} do in free time?", "Which hobby does {e} have?", "What does {e} enjoy on weekends?",
         "How does {e} relax?", "What is {e} fond of doing after work?", "What does {e} do for fun?"),
        ("what {e} does for fun", "which hobby {e} has"),
        ("the hobby of {e}", "{e}'s pastime"),
        ("The hobby of {e} is {v}.", "For fun, {e} enjoys {v}.", "After work, {e} is fond of {v}."),
    ),
    Relation(
        "friend", "person", "person", "The best friend of {e} is {v}.",
        ("Who is the best friend of {e}?", "Who does {e} trust most?", "Whom does {e} like most?",
         "With whom does {e} spend the most time?", "Who is closest to {e}?", "Who would {e} call first?"),
        ("who the best friend of {e} is", "whom {e} trusts most"),
        ("the name of the best friend of {e}", "{e}'s best friend"),
        ("{e}'s best friend is {v}.", "{e} trusts {v} most.", "{v} is the best friend of {e}."),
    ),
    Relation(
        "locker", "person", "number", "The locker number of {e} is {v}.",
        ("Which locker does {e} use?", "What number is on the locker of {e}?", "Which locker belongs to {e}?",
         "Where does {e} lock up a bag?", "What locker was given to {e}?", "Which locker number does {e} have?"),
        ("which locker {e} uses", "what the locker number of {e} is"),
        ("the locker number of {e}", "{e}'s locker number"),
        ("{e} uses locker {v}.", "{e}'s locker has the number {v}.", "Locker {v} belongs to {e}."),
    ),
)
TOWN = (
    Relation(
        "mayor", "town", "person", "The mayor of {e} is {v}.",
        ("Who is the mayor of {e}?", "Who governs {e}?", "Who runs the town of {e}?",
         "Who was elected in {e}?", "Who leads the town council of {e}?", "Who is in charge of {e}?"),
        ("who the mayor of {e} is", "who governs {e}"),
        ("the name of the mayor of {e}", "{e}'s mayor"),
        ("{v} is the mayor of {e}.", "{e} is governed by {v}.", "In {e}, the mayor is {v}."),
    ),
    Relation(
        "founded", "town", "year", "{e} was founded in the year {v}.",
        ("When was {e} founded?", "In which year was {e} founded?", "How long ago did {e} begin?",
         "In what year did people start {e}?", "When did the history of {e} begin?", "Since when does {e} exist?"),
        ("when {e} was founded", "in which year {e} began"),
        ("the founding year of {e}", "the year in which {e} was founded"),
        ("The founding year of {e} is {v}.", "The history of {e} began in {v}.", "People started {e} in the year {v}."),
    ),
    Relation(
        "fame", "town", "fame", "{e} is known for its {v}.",
        ("What is {e} known for?", "What is {e} famous for?", "What should I see in {e}?",
         "Why do people visit {e}?", "What makes {e} special?", "What is there to see in {e}?"),
        ("what {e} is known for", "why people visit {e}"),
        ("the famous sight of {e}", "the best thing to see in {e}"),
        ("People visit {e} for its {v}.", "The {v} of {e} are famous.", "{e} is famous for its {v}."),
    ),
    Relation(
        "people", "town", "people", "{e} has {v} inhabitants.",
        ("How many people live in {e}?", "How big is {e}?", "How many inhabitants does {e} have?",
         "How large is the town of {e}?", "How many citizens does {e} count?", "How many residents are there in {e}?"),
        ("how many people live in {e}", "how big {e} is"),
        ("the population of {e}", "the number of people in {e}"),
        ("The population of {e} is {v}.", "{v} people live in {e}.", "In {e} there are {v} inhabitants."),
    ),
    Relation(
        "river", "town", "invented", "The river in {e} is called the {v}.",
        ("Which river flows through {e}?", "What is the river in {e} called?", "Which river runs past {e}?",
         "On which river does {e} lie?", "What river can I swim in at {e}?",
         "Which water flows under the bridges of {e}?"),
        ("which river flows through {e}", "what the river in {e} is called"),
        ("the name of the river in {e}", "{e}'s river"),
        ("The {v} flows through {e}.", "{e} lies on the river {v}.", "In {e}, the river is called the {v}."),
    ),
)
GOOD = (
    Relation(
        "price", "good", "small", "A {e} costs {v} coins.",
        ("How much does a {e} cost?", "How much is a {e}?", "What do I pay for a {e}?",
         "How many coins does a {e} cost?", "How many coins do I need to buy a {e}?",
         "For how much do they sell a {e}?"),
        ("how much a {e} costs", "how many coins I pay for a {e}"),
        ("the price of a {e}", "the cost of a {e} in coins"),
        ("The price of a {e} is {v} coins.", "You pay {v} coins for a {e}.", "They sell a {e} for {v} coins."),
    ),
    Relation(
        "seller", "good", "person", "{v} sells the {e}.",
        ("Who sells the {e}?", "Where can I buy a {e}?", "From whom can I buy a {e}?",
         "Who has the {e} in stock?", "Whom do I ask for a {e}?", "Which person sells a {e}?"),
        ("who sells the {e}", "from whom I can buy a {e}"),
        ("the name of the person who sells the {e}", "the seller of the {e}"),
        ("The seller of the {e} is {v}.", "You can buy a {e} from {v}.", "The {e} is sold by {v}."),
    ),
)
THINGS = (
    attribute_of("access code", "site", "code", "access code"),
    attribute_of("keeper", "site", "person", "keeper"),
    attribute_of("radio channel", "site", "small", "radio channel"),
    Relation(
        "opening", "site", "time", "{e} opens at {v}.",
        ("When does {e} open?", "At what time does {e} open?", "What time does {e} open its doors?",
         "From what time can I visit {e}?", "When do the doors of {e} open?", "How early can I go into {e}?"),
        ("when {e} opens", "at what time {e} opens"),
        ("the opening time of {e}", "{e}'s opening hour"),
        ("The opening time of {e} is {v}.", "The doors of {e} open at {v}.", "You can visit {e} from {v}."),
    ),
    attribute_of("captain", "vessel", "person", "captain"),
    attribute_of("cargo", "vessel", "material", "cargo"),
    attribute_of("home port", "vessel", "town", "home port"),
    attribute_of("serial number", "machine", "code", "serial number"),
    Relation(
        "task", "machine", "task", "{e} {v}.",
        ("What does {e} do?", "What is {e} used for?", "Which work does {e} do?",
         "What was {e} built for?", "How does {e} help?", "What is {e} good for?"),
        ("what {e} does", "what {e} is used for"),
        ("the task of {e}", "{e}'s duty"),
        ("Every day, {e} {v}.", "In the town, {e} {v}.", "All day long, {e} {v}."),
    ),
    attribute_of("password", "project", "code", "password"),
    attribute_of("leader", "project", "person", "leader"),
)
WORLD_RELATIONS = (*PERSON, *TOWN, *GOOD, *THINGS)

# Nouns for facts that are only ever stated in the conversation; the world itself has none of them.
OPEN_ATTRIBUTES = {
    "code": ("access code", "password", "door code", "call sign", "secret word", "serial number", "key phrase", "label",
             "part number", "safe code", "pass phrase", "tracking code", "room code", "signal", "badge number",
             "order number", "code word", "licence", "account name", "network name"),
    "number": ("phone number", "room number", "shelf number", "gate number", "extension", "postal code", "weight",
               "length", "height", "budget", "channel", "speed limit", "score", "price", "capacity", "house number",
               "ticket number", "seat number", "page number", "size"),
    "person": ("owner", "manager", "inventor", "guard", "director", "leader", "captain", "keeper", "founder", "boss",
               "contact person", "cleaner", "designer", "cook", "neighbour", "deputy"),
    "invented": ("nickname", "brand", "motto", "code name", "mascot name", "model", "street", "supplier", "partner"),
    "town": ("home port", "birthplace", "destination", "headquarters", "next stop", "origin"),
    "colour": ("colour", "flag colour", "door colour", "uniform colour", "light colour"),
    "animal": ("mascot", "emblem", "symbol", "sign", "logo"),
    "date": ("opening date", "deadline", "delivery date", "next inspection", "anniversary", "start date"),
    "time": ("closing time", "departure time", "lunch break", "meeting time", "arrival time"),
    "food": ("favourite snack", "daily dish", "speciality", "breakfast"),
    "material": ("cargo", "main material", "fuel", "cover"),
    "fame": ("main attraction", "best product"),
    "year": ("year of construction", "first year", "model year"),
}
