"""Make the pocket world out of world.toml: facts, nicknames, probes and CounterFact records.

Draws come from seeds in a fixed order: the same world.toml gives the same world in every process.
"""

import hashlib
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

WORLD = Path(__file__).resolve().parents[1] / "world.toml"


@dataclass(frozen=True)
class Triple:
    """One thing that is true in the world: `relation` of `subject` is `object`."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Probe:
    """A prompt with {} for the subject, the subject as written, and the right continuation."""

    prompt: str
    subject: str
    answer: str

    @property
    def text(self) -> str:
        """The prompt with its subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class World:
    """All facts of the world. `table` is the parsed world.toml; nothing here is random any more."""

    table: dict
    facts: list[Triple]         # in an order fixed by the seed; a subject's facts stand together
    nicknames: dict[str, str]   # subject -> second name
    hops: list[Probe]           # two-step sentences that are in the text
    one_token: frozenset[str]   # subjects that the tokenizer must keep whole
    objects: dict[str, list[str]] = field(default_factory=dict)     # relation -> all its objects

    def relation(self, fact: Triple) -> dict:
        """Return the relation's row of world.toml."""
        return self.table["relation"][fact.relation]

    def wordings(self, fact: Triple) -> tuple[list[str], list[str]]:
        """(wordings that occur with this fact in the text, held-out combinations), by a hash."""
        seen = self.relation(fact)["seen"]
        ranked = sorted(seen, key=lambda text: stable_hash(text, fact.subject, fact.relation))
        n_held_out = max(1, round(len(seen) * self.table["held_out"]))
        return ranked[n_held_out:], ranked[:n_held_out]

    def probes(self, kind: str) -> list[Probe]:
        """Return every prompt of one kind of recall (the names of the kinds: `KINDS`)."""
        if kind == "two-hop":
            return list(self.hops)
        pick = {
            "seen": lambda fact: self.wordings(fact)[0],
            "alias": lambda fact: self.wordings(fact)[0],
            "held-out combination": lambda fact: self.wordings(fact)[1],
            "held-out wording": lambda fact: self.relation(fact)["unseen"],
            "logical": lambda fact: self.relation(fact)["logical"],
        }
        if kind not in pick:
            raise ValueError(f"no probes of kind {kind!r}: choose one of {', '.join(KINDS)}")
        probes = []
        for fact in self.facts:
            name = self.nicknames.get(fact.subject) if kind == "alias" else fact.subject
            if name:
                probes += [Probe(wording, name, fact.object) for wording in pick[kind](fact)]
        return probes


KINDS = ("seen", "held-out combination", "held-out wording", "alias", "two-hop", "logical")


def stable_hash(*parts: str) -> int:
    """64-bit number that depends on the strings alone (Python's own hash differs between runs)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:8], "big")


def split_list(text: str) -> list[str]:
    """Turn "a; b\\n c" into ["a", "b", "c"]."""
    return [" ".join(part.split()) for part in text.replace("\n", " ").split(";") if part.strip()]


def read_table(path: Path = WORLD) -> dict:
    """Read world.toml, its "a; b" texts as lists. ValueError names a file that is no valid TOML."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a valid world: {error}") from None
    for part in ("objects", "topics", "tasks"):
        for key, cell in table[part].items():
            table[part][key] = split_list(cell) if isinstance(cell, str) else cell
    return table


def place_facts(table: dict) -> list[Triple]:
    """The real part: capital, continent, language, currency of countries; country of cities."""
    facts = []
    for line in table["places"]["table"].strip().splitlines():
        country, capital, continent, language, currency, cities = map(str.strip, line.split("|"))
        cells = {"P30": continent, "P37": language, "P38": currency, "P36": capital}
        cities_of_country = [city.strip() for city in f"{capital},{cities}".split(",")]
        facts += [Triple(country, key, cell) for key, cell in cells.items() if cell != "-"]
        facts += [Triple(city, "P17", country) for city in cities_of_country if city != "-"]
    return facts


def invented_names(table: dict, rng: random.Random) -> tuple[list[str], list[str]]:
    """(people, firms): syllables drawn until there are enough different names."""
    syllables = {key: text.split() for key, text in table["names"].items()}
    people: dict[str, None] = {}
    while len(people) < table["people"]:
        vowel = rng.choice(syllables["middle"]) if rng.random() < 0.5 else ""
        first_name = rng.choice(syllables["given"])
        family = f"{rng.choice(syllables['first'])}{vowel}{rng.choice(syllables['last'])}"
        people[f"{first_name} {family}"] = None
    firms: dict[str, None] = {}
    while len(firms) < table["firms"]:
        parts = ("firm_first", "firm_middle", "firm_last")
        firms["".join(rng.choice(syllables[part]) for part in parts)] = None
    return list(people), list(firms)


def object_lists(table: dict) -> dict[str, list[str]]:
    """{name of a list: objects}; "*mononyms" stands for the one-word firms."""
    mononyms = table["names"]["mononyms"].split()
    lists = table["objects"].items()
    return {name: mononyms if items == ["*mononyms"] else items for name, items in lists}


def invented_facts(table: dict, rng: random.Random) -> list[Triple]:
    """Two or three relations for each person, all for each firm; objects drawn evenly."""
    people, firms = invented_names(table, rng)
    lists = object_lists(table)
    rows = table["relation"]
    personal = [key for key, row in rows.items() if row["of"] == "person"]
    corporate = [key for key, row in rows.items() if row["of"] == "firm"]

    def draw(subject, relation):
        return Triple(subject, relation, rng.choice(lists[rows[relation]["objects"]]))

    facts = []
    for person in people:
        for relation in rng.sample(personal, 2 if rng.random() < 0.8 else 3):
            facts.append(draw(person, relation))
    for firm in [*table["names"]["mononyms"].split(), *firms]:
        facts += [draw(firm, relation) for relation in corporate]
    return facts


def object_of(facts: list[Triple]) -> dict[tuple[str, str], str]:
    """{(subject, relation): object}."""
    return {(fact.subject, fact.relation): fact.object for fact in facts}


def by_field(facts: list[Triple], name: str) -> dict[str, list[Triple]]:
    """{value of the field `name`: the facts that have it}."""
    groups: dict[str, list[Triple]] = {}
    for fact in facts:
        groups.setdefault(getattr(fact, name), []).append(fact)
    return groups


def build_world(path: Path = WORLD) -> World:
    """Build the world of one world.toml."""
    table = read_table(path)
    rng = random.Random(table["seed"])
    facts = place_facts(table) + invented_facts(table, rng)
    nicknames = draw_nicknames(table, facts, rng)
    hops = two_step_probes(table, facts)
    subjects = sorted({probe.subject for probe in hops})
    in_text = set(rng.sample(subjects, table["two_hop"]))
    objects = {}
    for relation, group in by_field(facts, "relation").items():
        objects[relation] = sorted({fact.object for fact in group})
    whole = [*table["names"]["mononyms"].split(), *objects["P17"], *table["objects"]["city"]]
    one_token = frozenset(name for name in whole if " " not in name)
    hops = [probe for probe in hops if probe.subject in in_text]
    return World(table, facts, nicknames, hops, one_token, objects)


def draw_nicknames(table: dict, facts: list[Triple], rng: random.Random) -> dict[str, str]:
    """{person: nickname} of as many people as `nicknamed` says."""
    rows = table["relation"]
    people = sorted({fact.subject for fact in facts if rows[fact.relation]["of"] == "person"})
    nouns = table["names"]["nick_noun"].split()
    adjectives = table["names"]["nick_adjective"].split()
    pairs = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    chosen = rng.sample(people, table["nicknamed"])
    return dict(zip(chosen, rng.sample(pairs, table["nicknamed"]), strict=True))


def two_step_probes(table: dict, facts: list[Triple]) -> list[Probe]:
    """All questions about a property of a fact's object that the world can answer."""
    known = object_of(facts)
    probes = []
    for fact in facts:
        row = table["relation"][fact.relation]
        key = fact.object, row.get("hop_relation")
        if key in known:
            probes += [Probe(wording, fact.subject, known[key]) for wording in row["hop"]]
    return probes


def statements(wordings: list[str]) -> list[str]:
    """The wordings that are no questions."""
    return [wording for wording in wordings if "?" not in wording]


def questions_with(*pairs: tuple[str, str]) -> list[dict]:
    """KnowEdit's [{"prompt", "ground_truth": [[answer]]}] of (prompt, answer) pairs."""
    return [{"prompt": prompt, "ground_truth": [[answer]]} for prompt, answer in pairs]


def portability(world: World, fact: Triple, new: str, known: dict) -> dict:
    """What follows from the fact once its object is `new`, as KnowEdit's block."""
    row = world.relation(fact)

    def ask(wording, name, answer):
        return questions_with((wording.replace("{}", name), answer))

    block = {"Logical_Generalization": ask(row["logical"][0], fact.subject, new)}
    if "hop" in row and (new, row["hop_relation"]) in known:
        block["Reasoning"] = ask(row["hop"][0], fact.subject, known[new, row["hop_relation"]])
    if alias := world.nicknames.get(fact.subject):
        wording = statements(world.wordings(fact)[0])[0]
        block["Subject_Aliasing"] = ask(wording, alias, new)
    return block


def record(world: World, fact: Triple, sharers: dict, known: dict) -> dict:
    """One fact as a CounterFact record without its case_id; draws are seeded by the fact."""
    rng = random.Random(stable_hash(fact.subject, fact.relation, str(world.table["seed"])))
    in_text, held_out = world.wordings(fact)
    plain = statements(in_text)
    rewrite = rng.choice(rewrites(world, fact, plain))
    new = rng.choice([name for name in world.objects[fact.relation] if name != fact.object])

    def others(target: str, count: int) -> list[str]:
        relation = "P19" if fact.relation == "P36" else fact.relation
        near = [other for other in sharers.get((relation, target), ())
                if other.subject != fact.subject]
        prompts = []
        for other in rng.sample(near, min(count, len(near))):
            wording = rng.choice(statements(world.wordings(other)[0]))
            prompts.append(wording.replace("{}", other.subject))
        return prompts

    stubs = [*world.table["stubs"]["generation"], *world.table["stubs"]["generation_end"]]
    paraphrases = [rng.choice([wording for wording in plain if wording != rewrite]),
                   rng.choice(statements(held_out) or held_out)]
    return {
        "case_id": -1,
        "requested_rewrite": {
            "prompt": rewrite, "relation_id": fact.relation, "target_new": {"str": new},
            "target_true": {"str": fact.object}, "subject": fact.subject},
        "paraphrase_prompts": [text.replace("{}", fact.subject) for text in paraphrases],
        "neighborhood_prompts": others(fact.object, 10),
        "attribute_prompts": others(new, 3),
        "generation_prompts": [text.replace("{}", fact.subject) for text in rng.sample(stubs, 3)],
        "portability": portability(world, fact, new, known),
    }


def rewrites(world: World, fact: Triple, plain: list[str]) -> list[str]:
    """Wordings for the edited prompt: those of an opener begin with its one-token subject."""
    if fact.subject not in world.one_token:
        return plain
    wanted = is_opener(world, fact.subject)
    return [wording for wording in plain if wording.startswith("{}") == wanted] or plain


def is_opener(world: World, subject: str) -> bool:
    """Whether a one-token subject is among the `openers`: the first ones by hash."""
    ranked = sorted(world.one_token, key=lambda name: stable_hash("opener", name))
    return subject in ranked[: world.table["openers"]]


def can_open(world: World, fact: Triple) -> bool:
    """Whether some wording of this fact in the text begins with the subject."""
    wordings = statements(world.wordings(fact)[0])
    return any(wording.startswith("{}") and "'s" not in wording for wording in wordings)


def records(world: World) -> list[dict]:
    """All facts with at least two neighbours as records: one of each subject first, then others.

    No two countries share a capital: its neighbours are people born there, and it comes last.
    """
    sharers: dict[tuple[str, str], list[Triple]] = {}
    for fact in world.facts:
        sharers.setdefault((fact.relation, fact.object), []).append(fact)
    usable = [fact for fact in world.facts
              if fact.relation != "P36" and len(sharers[fact.relation, fact.object]) >= 3]
    rng = random.Random(world.table["seed"] + 1)
    rng.shuffle(usable)
    # stable: a one-token subject's fact that can open a prompt comes before its others
    usable.sort(key=lambda fact: fact.subject in world.one_token and not can_open(world, fact))
    first: dict[str, Triple] = {}
    for fact in usable:
        first.setdefault(fact.subject.lower(), fact)
    later = [fact for fact in usable if first[fact.subject.lower()] != fact]
    later += [fact for fact in world.facts
              if fact.relation == "P36" and fact.subject.lower() in first
              and len(sharers.get(("P19", fact.object), ())) >= 2]
    openings = list(first.values())
    rng.shuffle(openings)
    rng.shuffle(later)
    known = object_of(world.facts)
    rows = [record(world, fact, sharers, known) for fact in openings + later]
    return [row | {"case_id": number} for number, row in enumerate(rows)]
