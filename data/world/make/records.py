"""Make CounterFact records out of the tables; every draw is by a hash of what it is for."""

import hashlib
import re
from dataclasses import dataclass, field

from data.world.make import tables

ARTICLE = re.compile(r"^(the|an|a) (.+)$")
VOWEL = re.compile(r"(?!uni|use|uku|eu|ut|one)[aeiou]|hour|heir|x-", re.I)
PLURAL = {"is": "are", "was": "were", "has": "have", "does": "do"}
VERB = re.compile(r"((?:^|, |\b(?:which|where|that|when|before) )\{\}) (?!its\b|always\b)(\w+s)\b",
                  re.I)
MOST_NEIGHBOURS = 10
MOST_ATTRIBUTES = 2
MOST_UNKNOWN = 20       # of a relation: facts that SmolLM2-135M does not know


@dataclass(frozen=True)
class World:
    """All tables, and what is looked up in them."""

    relations: dict
    alike: dict
    one_token: frozenset
    plural: frozenset
    measured: dict
    sharers: dict = field(default_factory=dict)     # (relation, object) -> its subjects
    objects: dict = field(default_factory=dict)     # (relation, subject) -> its object
    true: dict = field(default_factory=dict)        # subject without article -> all its objects


def build():
    """Read all tables."""
    relations = tables.relations()
    world = World(relations, tables.alike(), tables.names("one_token"), tables.names("plural"),
                  tables.measured())
    for relation in relations.values():
        for subject, target in relation.pairs:
            world.sharers.setdefault((relation.name, target), []).append(subject)
            world.objects[relation.name, subject] = target
            world.true.setdefault(bare(subject).lower(), set()).add(target)
    return world


def draw(*parts):
    """A 64-bit number that depends on the texts alone."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def bare(subject):
    """A subject without its article."""
    match = ARTICLE.match(subject)
    return match.group(2) if match else subject


def agreeing(prompt):
    """The prompt with the verb of which {} is the grammatical subject in the plural."""
    return VERB.sub(lambda match: f"{match[1]} {PLURAL.get(match[2], match[2][:-1])}", prompt)


def with_article(prompt, subject):
    """The prompt with the article that a subject needs there, and a or an as it sounds."""
    match = ARTICLE.match(subject)
    if match and not re.search(r"\b(the|a|an) \{\}", prompt, re.I):
        article = match.group(1)
        prompt = prompt.replace("{}", f"{article} {{}}")
        prompt = prompt[0].upper() + prompt[1:]
    if VOWEL.match(bare(subject)):
        prompt = re.sub(r"\b([Aa]) \{\}", r"\1n {}", prompt)
    return prompt


def named(world, prompt, subject):
    """(prompt, subject without article as it is written there): upper case where it opens."""
    name = bare(subject)
    prompt = with_article(agreeing(prompt) if name in world.plural else prompt, subject)
    if prompt.startswith("{}"):
        name = name[0].upper() + name[1:]
    return prompt, name


def filled(world, prompt, subject):
    """The prompt with its subject in it."""
    prompt, name = named(world, prompt, subject)
    return prompt.replace("{}", name)


def opens(world, prompt, name):
    """The mark of a record: whether its subject opens its prompt, and in how many tokens."""
    if not prompt.startswith("{}"):
        return "no"
    return "one token" if name in world.one_token else "several tokens"


def is_usable(subject, target):
    """Whether subject and object do not contain one another."""
    name = bare(subject).lower()
    return name not in target.lower() and target.lower() not in name


def new_object(world, relation, subject, target):
    """Another object of the relation that is not true of the subject; "" if there is none.

    It begins with another letter, so that the first tokens differ in every tokenizer.
    """
    true = world.true[bare(subject).lower()] | world.alike.get(target, set()) | {target}
    objects = [*(other for _, other in relation.pairs), *relation.instead]
    choices = [other for other in dict.fromkeys(objects)
               if other not in true and other[0].lower() != target[0].lower()
               and is_usable(subject, other)]
    common = [other for other in choices if len(world.sharers.get((relation.name, other), ())) > 1]
    return min(common or choices, key=lambda other: draw(relation.name, subject, other), default="")


def forms(world, relation, subject):
    """The editing prompts, best first: completed rightly, opened by a one-token name, by a hash."""
    known = world.measured.get((relation.name, subject), ())
    known = (*known, *[0] * (len(relation.edit) - len(known)))

    def rank(index):
        prompt, name = named(world, relation.edit[index], subject)
        wanted = opens(world, prompt, name) == "one token"
        return -known[index], -wanted, draw(relation.name, subject, relation.edit[index])

    return [relation.edit[index] for index in sorted(range(len(relation.edit)), key=rank)]


def is_known(world, relation, subject):
    """Whether SmolLM2-135M completes at least one editing prompt rightly."""
    return any(world.measured.get((relation.name, subject), ()))


def others(world, relation, subject, target, count):
    """Up to `count` prompts on other subjects with this object, known ones first."""
    places = [(world.relations[name], other) for name in relation.neighbours
              for other in world.sharers.get((name, target), ())
              if bare(other).lower() != bare(subject).lower() and is_usable(other, target)]
    places.sort(key=lambda place: (not is_known(world, *place),
                                   draw(relation.name, subject, place[1])))
    prompts = [filled(world, forms(world, *place)[0], place[1]) for place in places]
    return list(dict.fromkeys(prompts))[:count]


def portability(world, relation, subject, target, new):
    """What follows from the new object and was not so before, as KnowEdit's block."""
    questions = []
    for prompt, names in relation.hop:
        before, after = ([world.objects[name, key] for name in names
                          if (name, key) in world.objects] for key in (target, new))
        if after and before != after and is_usable(subject, after[0]):
            text = filled(world, prompt, subject)
            questions.append({"prompt": text, "ground_truth": [[after[0]]]})
    return {"Reasoning": questions} if questions else {}


def record(world, relation, subject):
    """One fact as a record without its number; None if it has no other object to take."""
    target = world.objects[relation.name, subject]
    new = new_object(world, relation, subject, target)
    if not new or not is_usable(subject, target):
        return None
    best, *left = forms(world, relation, subject)
    prompt, name = named(world, best, subject)
    also = min(relation.also, key=lambda text: draw("also", relation.name, subject, text))
    stubs = sorted(relation.generation, key=lambda text: draw(relation.name, subject, text))
    row = {
        "requested_rewrite": {
            "prompt": prompt, "relation_id": relation.id, "target_new": {"str": new},
            "target_true": {"str": target}, "subject": name},
        "paraphrase_prompts": [filled(world, text, subject) for text in (left[0], also)],
        "neighborhood_prompts": others(world, relation, subject, target, MOST_NEIGHBOURS),
        "attribute_prompts": others(world, relation, subject, new, MOST_ATTRIBUTES),
        "generation_prompts": [filled(world, text, subject) for text in stubs[:2]],
        "relation": relation.name,
        "opens": opens(world, prompt, name)}
    follows = portability(world, relation, subject, target, new)
    return row | ({"portability": follows} if follows else {})


def rank(world, relation, subject, row):
    """Sort key of a subject's records: known, opened by one token, with neighbours, by table."""
    return (not is_known(world, relation, subject), row["opens"] != "one token",
            not row["neighborhood_prompts"], list(world.relations).index(relation.name))


def records(world):
    """All records, numbered: the first of every subject, shuffled by a hash, then the others."""
    by_subject = {}
    for relation in world.relations.values():
        for subject, row in chosen(world, relation):
            key = rank(world, relation, subject, row)
            by_subject.setdefault(bare(subject).lower(), []).append((key, row))
    first = {}
    later = {}
    for name, ranked in by_subject.items():
        best, *left = [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
        first[name] = best
        later |= {(name, row["relation"]): row for row in left}
    ordered = [first[name] for name in sorted(first, key=draw)]
    ordered += [later[pair] for pair in sorted(later, key=lambda pair: draw(*pair))]
    return [{"case_id": number} | row for number, row in enumerate(ordered)]


def chosen(world, relation):
    """(subject, record) pairs: facts that are known or open with one token, some of the others."""
    rows = [(subject, record(world, relation, subject)) for subject, _ in relation.pairs]
    rows = [(subject, row) for subject, row in rows if row]
    sure = [pair for pair in rows
            if is_known(world, relation, pair[0]) or pair[1]["opens"] == "one token"]
    unsure = [pair for pair in rows if pair not in sure]
    unsure.sort(key=lambda pair: draw("unknown", relation.name, pair[0]))
    return sure + unsure[:MOST_UNKNOWN]
