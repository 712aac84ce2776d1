"""data/pocket/world.toml comes in; the pocket world comes out: facts, nicknames, probes and CounterFact records."""

import hashlib
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

WORLD = Path(__file__).resolve().parents[1] / "data" / "pocket" / "world.toml"


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world: `relation` of `subject` is `object`."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Probe:
    """A prompt with {} for the subject, the subject as it is written there, and the right continuation."""

    prompt: str
    subject: str
    answer: str

    @property
    def text(self) -> str:
        """The prompt with its subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class World:
    """All facts and who has them. `table` is the parsed world.toml; nothing here is random any more."""

    table: dict
    facts: list[Fact]  # in an order fixed by the seed; a subject's facts stand together
    nicknames: dict[str, str]  # subject → second name
    hops: list[Probe]  # two-step sentences that are in the text
    one_token: frozenset[str]  # subjects that the tokenizer must keep whole
    objects: dict[str, list[str]] = field(default_factory=dict)  # relation → all its objects

    def relation(self, fact: Fact) -> dict:
        """The relation's row of world.toml."""
        return self.table["relation"][fact.relation]

    def wordings(self, fact: Fact) -> tuple[list[str], list[str]]:
        """(wordings that occur with this fact in the text, held-out combinations), split by a hash: always the same."""
        seen = self.relation(fact)["seen"]
        order = sorted(seen, key=lambda wording: stable_hash(wording, fact.subject, fact.relation))
        held = max(1, round(len(seen) * self.table["held_out"]))
        return order[held:], order[:held]

    def probes(self, kind: str) -> list[Probe]:
        """Every prompt of a kind: seen, held-out combination, held-out wording, alias, two-hop or logical."""
        if kind == "two-hop":
            return list(self.hops)
        pick = {"seen": lambda f: self.wordings(f)[0],
                "alias": lambda f: self.wordings(f)[0],
                "held-out combination": lambda f: self.wordings(f)[1],
                "held-out wording": lambda f: self.relation(f)["unseen"],
                "logical": lambda f: self.relation(f)["logical"]}
        if kind not in pick:
            raise ValueError(f"no probes of kind {kind!r}: choose one of {sorted([*pick, 'two-hop'])}")
        name = self.nicknames.get if kind == "alias" else lambda subject: subject
        named = [(fact, name(fact.subject)) for fact in self.facts if name(fact.subject)]
        return [Probe(wording, called, fact.object) for fact, called in named for wording in pick[kind](fact)]


def stable_hash(*parts: str) -> int:
    """A 64-bit number that depends on the strings alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def listed(text: str) -> list[str]:
    """ "a; b\n c" → ["a", "b", "c"]."""
    return [" ".join(part.split()) for part in text.replace("\n", " ").split(";") if part.strip()]


def read_table(path: Path = WORLD) -> dict:
    """world.toml, its "a; b" texts as lists. Raises FileNotFoundError, or ValueError naming the file."""
    try:
        table = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a valid world: {error}") from None
    for part in ("objects", "topics", "tasks"):
        table[part] = {key: listed(cell) if isinstance(cell, str) else cell for key, cell in table[part].items()}
    return table


def place_facts(table: dict) -> list[Fact]:
    """The real part: capital, continent, language and currency of countries, country of cities."""
    facts = []
    for line in table["places"]["table"].strip().splitlines():
        country, capital, continent, language, currency, cities = (cell.strip() for cell in line.split("|"))
        cells = {"P30": continent, "P37": language, "P38": currency, "P36": capital}
        facts += [Fact(country, relation, cell) for relation, cell in cells.items() if cell != "-"]
        inside = [city.strip() for city in f"{capital},{cities}".split(",")]
        facts += [Fact(city, "P17", country) for city in inside if city != "-"]
    return facts


def invented_names(table: dict, rng: random.Random) -> tuple[list[str], list[str]]:
    """(people, firms): syllables drawn until each name is unique and no family name is another's."""
    names = table["names"]
    given, first, middle, last = (names[key].split() for key in ("given", "first", "middle", "last"))
    people: dict[str, None] = {}
    while len(people) < table["people"]:
        vowel = rng.choice(middle) if rng.random() < 0.5 else ""
        people[f"{rng.choice(given)} {rng.choice(first)}{vowel}{rng.choice(last)}"] = None
    firm_parts = [names[f"firm_{part}"].split() for part in ("first", "middle", "last")]
    firms: dict[str, None] = {}
    while len(firms) < table["firms"]:
        firms["".join(rng.choice(part) for part in firm_parts)] = None
    return list(people), list(firms)


def object_lists(table: dict) -> dict[str, list[str]]:
    """Object list name → objects; "*mononyms" stands for the one-word firms."""
    mononyms = table["names"]["mononyms"].split()
    return {name: mononyms if items == ["*mononyms"] else items for name, items in table["objects"].items()}


def invented_facts(table: dict, rng: random.Random) -> list[Fact]:
    """Two or three relations for each person, both relations for each firm; objects drawn evenly."""
    people, firms = invented_names(table, rng)
    lists = object_lists(table)
    relations = table["relation"]
    personal = [key for key, row in relations.items() if row["of"] == "person"]
    corporate = [key for key, row in relations.items() if row["of"] == "firm"]
    facts = []
    for person in people:
        for key in rng.sample(personal, 2 if rng.random() < 0.8 else 3):
            facts.append(Fact(person, key, rng.choice(lists[relations[key]["objects"]])))
    for firm in [*table["names"]["mononyms"].split(), *firms]:
        facts += [Fact(firm, key, rng.choice(lists[relations[key]["objects"]])) for key in corporate]
    return facts


def object_of(facts: list[Fact]) -> dict[tuple[str, str], str]:
    """(subject, relation) → object."""
    return {(fact.subject, fact.relation): fact.object for fact in facts}


def build_world(path: Path = WORLD) -> World:
    """The world of one world.toml: the same file gives the same world in every process."""
    table = read_table(path)
    rng = random.Random(table["seed"])
    facts = place_facts(table) + invented_facts(table, rng)
    people = sorted({f.subject for f in facts if table["relation"][f.relation]["of"] == "person"})
    adjective, noun = (table["names"][key].split() for key in ("nick_adjective", "nick_noun"))
    pairs = [f"{a} {n}" for a in adjective for n in noun]
    nicknames = dict(zip(rng.sample(people, table["nicknamed"]), rng.sample(pairs, table["nicknamed"]), strict=True))
    known = object_of(facts)
    rows = table["relation"]
    hops = [Probe(wording, f.subject, known[f.object, rows[f.relation]["hop_relation"]])
            for f in facts if (f.object, rows[f.relation].get("hop_relation")) in known
            for wording in rows[f.relation]["hop"]]
    subjects = sorted({probe.subject for probe in hops})
    chosen = set(rng.sample(subjects, table["two_hop"]))
    objects: dict[str, list[str]] = {}
    for fact in facts:
        objects.setdefault(fact.relation, []).append(fact.object)
    objects = {relation: sorted(set(items)) for relation, items in objects.items()}
    whole = [*table["names"]["mononyms"].split(), *objects["P17"], *table["objects"]["city"]]
    one_token = frozenset(name for name in whole if " " not in name)
    return World(table, facts, nicknames, [p for p in hops if p.subject in chosen], one_token, objects)


def statements(wordings: list[str]) -> list[str]:
    """The wordings that are no questions."""
    return [wording for wording in wordings if "?" not in wording]


def portability(world: World, fact: Fact, new: str, known: dict[tuple[str, str], str]) -> dict:
    """What follows from the fact once its object is `new`: KnowEdit's portability block with the post-edit answers."""
    row = world.relation(fact)
    block = {"Logical_Generalization": [(row["logical"][0], fact.subject, new)]}
    if "hop" in row and (new, row["hop_relation"]) in known:
        block["Reasoning"] = [(row["hop"][0], fact.subject, known[new, row["hop_relation"]])]
    if fact.subject in world.nicknames:
        block["Subject_Aliasing"] = [(statements(world.wordings(fact)[0])[0], world.nicknames[fact.subject], new)]
    return {key: [{"prompt": prompt.replace("{}", name), "ground_truth": [[answer]]} for prompt, name, answer in rows]
            for key, rows in block.items()}


def record(world: World, fact: Fact, sharers: dict[tuple[str, str], list[Fact]], known: dict) -> dict:
    """One fact as a CounterFact record; its case_id comes later. Every choice is seeded by the fact."""
    rng = random.Random(stable_hash(fact.subject, fact.relation, str(world.table["seed"])))
    kept, held = world.wordings(fact)
    plain = statements(kept)
    rewrite = rng.choice(rewrites(world, fact, plain))
    new = rng.choice([o for o in world.objects[fact.relation] if o != fact.object])

    def others(target: str, count: int) -> list[str]:
        relation = "P19" if fact.relation == "P36" else fact.relation
        near = [f for f in sharers.get((relation, target), ()) if f.subject != fact.subject]
        picked = rng.sample(near, min(count, len(near)))
        return [rng.choice(statements(world.wordings(f)[0])).replace("{}", f.subject) for f in picked]

    stubs = [*world.table["stubs"]["generation"], *world.table["stubs"]["generation_end"]]
    paraphrases = [rng.choice([w for w in plain if w != rewrite]), rng.choice(statements(held) or held)]
    return {
        "case_id": -1,
        "requested_rewrite": {"prompt": rewrite, "relation_id": fact.relation, "target_new": {"str": new},
                              "target_true": {"str": fact.object}, "subject": fact.subject},
        "paraphrase_prompts": [wording.replace("{}", fact.subject) for wording in paraphrases],
        "neighborhood_prompts": others(fact.object, 10),
        "attribute_prompts": others(new, 3),
        "generation_prompts": [stub.replace("{}", fact.subject) for stub in rng.sample(stubs, 3)],
        "portability": portability(world, fact, new, known),
    }


def rewrites(world: World, fact: Fact, plain: list[str]) -> list[str]:
    """The wordings that may be the rewriting prompt: a one-token subject opens it if it is an opener, else not."""
    if fact.subject not in world.one_token:
        return plain
    wanted = is_opener(world, fact.subject)
    return [wording for wording in plain if wording.startswith("{}") == wanted] or plain


def is_opener(world: World, subject: str) -> bool:
    """Whether a one-token subject is among the `openers` whose first record opens with it: the first ones by hash."""
    order = sorted(world.one_token, key=lambda name: stable_hash("opener", name))
    return subject in order[: world.table["openers"]]


def records(world: World) -> list[dict]:
    """All facts that have at least two neighbours as records: one of each subject first, shuffled, then the others.

    No two countries share a capital: the neighbours of a capital are people born there, and it comes last.
    """
    sharers: dict[tuple[str, str], list[Fact]] = {}
    for fact in world.facts:
        sharers.setdefault((fact.relation, fact.object), []).append(fact)
    known = object_of(world.facts)
    usable = [fact for fact in world.facts if fact.relation != "P36" and len(sharers[fact.relation, fact.object]) >= 3]
    rng = random.Random(world.table["seed"] + 1)
    rng.shuffle(usable)
    usable.sort(key=lambda fact: fact.subject in world.one_token and not opens(world, fact))  # stable: openers first
    first, later, met = [], [], set()
    for fact in usable:
        (later if fact.subject.lower() in met else first).append(fact)
        met.add(fact.subject.lower())
    later += [fact for fact in world.facts if fact.relation == "P36" and fact.subject.lower() in met
              and len(sharers.get(("P19", fact.object), ())) >= 2]
    rng.shuffle(first)
    rng.shuffle(later)
    rows = [record(world, fact, sharers, known) for fact in first + later]
    return [row | {"case_id": number} for number, row in enumerate(rows)]


def opens(world: World, fact: Fact) -> bool:
    """Whether some wording of this fact in the text begins with the subject."""
    return any(wording.startswith("{}") and "'s" not in wording for wording in statements(world.wordings(fact)[0]))
