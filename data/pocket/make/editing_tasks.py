"""Make the splits of the four instruction-editing tasks out of the pocket world.

    python data/pocket/make/editing_tasks.py -o DIR [--seed 0]      # data/pocket/editing: seed 0
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import items
from editcore import files
from world import (
    Triple,
    World,
    build_world,
    by_field,
    invented_names,
    object_lists,
    object_of,
    portability,
    questions_with,
    statements,
)


@dataclass(frozen=True)
class Sizes:
    """Records per split. The papers' data: 570, 1,266; 1,428, 839; 14,390, 799, 800; 1,037."""

    recent: tuple = (200, 140)          # train, test
    counterfact: tuple = (300, 160)     # train, test
    convsent: tuple = (200, 40, 40)     # train, validation, test
    zsre: tuple = (180, 150)            # test, and training for the editor that learns from zsRE
    replies: int = 8                    # of either sentiment per topic


@dataclass(frozen=True)
class Draw:
    """What every record is made from."""

    world: World
    known: dict     # (subject, relation) -> object of the world
    sharers: dict   # relation -> the world's facts of it
    about: dict     # subject -> the world's facts about it
    rng: random.Random


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON list, one record per line."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    with files.atomic(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def build(folder: Path, world: World, sizes: Sizes, *, seed: int = 0) -> dict[str, int]:
    """Write every split as `folder`/{task}_{split}.json; return {file name: number of records}."""
    parts = splits(world, sizes, seed)
    for name, rows in parts.items():
        write_rows(Path(folder) / f"{name}.json", rows)
    return {name: len(rows) for name, rows in parts.items()}


def splits(world: World, sizes: Sizes, seed: int) -> dict[str, list[dict]]:
    """{"recent_train": records, ...}; no subject of a fact and no topic is edited in two splits."""
    draw = Draw(
        world, object_of(world.facts), by_field(world.facts, "relation"),
        by_field(world.facts, "subject"), random.Random(f"{seed} editing"))
    known = known_edits(draw, [*sizes.counterfact, sizes.zsre[0]])
    known_subjects = {fact.subject for part in known for fact in part}
    new = new_facts(draw, sum(sizes.recent), known_subjects)
    n_train, n_test = sizes.recent
    rows = {
        "recent_train": [recent(draw, *pair) for pair in new[:n_train]],
        "recent_test": [recent(draw, *pair) for pair in new[n_train:n_train + n_test]],
        "counterfact_train": [with_plain_answers(counterfact(draw, fact)) for fact in known[0]],
        "counterfact_test": [counterfact(draw, fact) for fact in known[1]],
        "zsre_test": [zsre(draw, fact) for fact in known[2]]}
    rows |= talks(draw, sizes, seed)
    taken = known_subjects | {fact.subject for fact, _ in new}
    # drawn last and by itself: the other splits stay as they are
    last = replace(draw, rng=random.Random(f"{seed} zsre training"))
    rows["zsre_train"] = [zsre(last, fact) for fact in known_edits(last, sizes.zsre[1:], taken)[0]]
    return rows


def known_edits(draw: Draw, counts, taken=()) -> list[list[Triple]]:
    """Lists of `counts` facts to change, one per subject, none of a subject in `taken`.

    A quarter each are of subjects with a nickname and of subjects whose two-step sentence is in the
    model's text, as long as there are any.
    """
    world = draw.world
    hops = {probe.subject for probe in world.hops}
    linked = [f for f in world.facts if f.subject in hops and "hop" in world.relation(f)]
    named = [fact for fact in world.facts if fact.subject in world.nicknames]
    subjects = set(taken)
    parts: list[list[Triple]] = [[] for _ in counts]
    for pool, share in ((named, 0.25), (linked, 0.5), (world.facts, 1.0)):
        shuffled = iter(draw.rng.sample(pool, len(pool)))
        for part, count in zip(parts, counts, strict=True):
            while len(part) < share * count:
                fact = next((fact for fact in shuffled if fact.subject not in subjects), None)
                if fact is None:
                    break
                subjects.add(fact.subject)
                part.append(fact)
    for part, count in zip(parts, counts, strict=True):
        if len(part) < count:
            wanted = ", ".join(map(str, counts))
            raise ValueError(f"{len(subjects)} subjects are too few for splits of {wanted}")
        draw.rng.shuffle(part)
    return parts


def new_facts(draw: Draw, count: int, taken: set[str]) -> list[tuple[Triple, list[Triple]]]:
    """`count` pairs (fact that the world has not, further facts of its subject), one per subject.

    Two in three are about people and firms that are in no text; the others tell a known person's
    missing relation.
    """
    n_known = count // 3
    pairs = []
    for name in new_names(draw, count - n_known):
        pairs.append(facts_of_stranger(draw, name, "person" if " " in name else "firm"))
    rows = draw.world.table["relation"]
    lists = object_lists(draw.world.table)
    people = sorted({fact.subject for fact in draw.sharers["P19"]} - taken)
    for person in draw.rng.sample(people, n_known):
        missing = [relation for relation, row in rows.items()
                   if row["of"] == "person" and (person, relation) not in draw.known]
        relation = draw.rng.choice(missing)
        new = draw.rng.choice(lists[rows[relation]["objects"]])
        pairs.append((Triple(person, relation, new), draw.about[person]))
    draw.rng.shuffle(pairs)
    return pairs


def new_names(draw: Draw, count: int) -> list[str]:
    """`count` names like the world's, a fifth of firms; no family name is known or twice."""
    table = draw.world.table
    subjects = {fact.subject for fact in draw.world.facts}
    taken = subjects | {name.split()[-1] for name in subjects}
    n = {key: len(text.split()) for key, text in table["names"].items()}
    # beyond half of all possible names, new ones would be found too slowly
    people = min(4 * count, n["first"] * n["last"] * n["middle"] // 2)
    firms = min(4 * count, n["firm_first"] * n["firm_middle"] * n["firm_last"] // 2)
    pools = invented_names(table | {"people": people, "firms": firms}, draw.rng)
    names = []
    for pool, limit in zip(pools, (count - count // 5, count // 5), strict=True):
        by_family: dict[str, str] = {}
        for name in pool:
            if name.split()[-1] not in taken:
                by_family.setdefault(name.split()[-1], name)
        taken |= set(by_family)
        names += list(by_family.values())[:limit]
    if len(names) < count:
        raise ValueError(f"only {len(names)} of {count} new names can be put together")
    return names


def facts_of_stranger(draw: Draw, name: str, kind: str) -> tuple[Triple, list[Triple]]:
    """(the fact to teach, further facts) of a new subject, with all relations of its kind."""
    lists = object_lists(draw.world.table)
    facts = []
    for relation, row in draw.world.table["relation"].items():
        if row["of"] == kind:
            facts.append(Triple(name, relation, draw.rng.choice(lists[row["objects"]])))
    draw.rng.shuffle(facts)
    return facts[0], facts[1:]


def worded(draw: Draw, fact: Triple) -> tuple[str, str]:
    """(a statement on the fact, its object), in a wording that the text may hold for it."""
    wording = draw.rng.choice(statements(draw.world.wordings(fact)[0]))
    return wording.replace("{}", fact.subject), fact.object


def locality(draw: Draw, fact: Triple, new: str, others: list[Triple]) -> dict:
    """Up to two other relations of the subject, and another subject with the old object if any.

    KnowEdit's Forgetfulness asks for further objects of the same subject, but the world has one
    object per relation.
    """
    same = [worded(draw, other) for other in draw.rng.sample(others, min(2, len(others)))]
    near = [other for other in draw.sharers[fact.relation]
            if other.subject != fact.subject and other.object != new]
    alike = [other for other in near if other.object == fact.object]
    block = {"Relation_Specificity": questions_with(*same)} if same else {}
    return block | {"Forgetfulness": questions_with(worded(draw, draw.rng.choice(alike or near)))}


def edit(draw: Draw, fact: Triple, new: str, others: list[Triple]) -> dict:
    """What Recent and CounterFact share: prompt, another wording, locality, portability."""
    prompt = draw.rng.choice(statements(draw.world.wordings(fact)[0]))
    row = draw.world.relation(fact)
    follows = portability(draw.world, fact, new, draw.known)
    every = statements([*row["seen"], *row["unseen"]])
    rephrase = draw.rng.choice([wording for wording in every if wording != prompt])
    return {"subject": fact.subject, "prompt": prompt.replace("{}", fact.subject),
            "target_new": new, "rephrase": rephrase.replace("{}", fact.subject),
            "portability": follows, "locality": locality(draw, fact, new, others)}


def recent(draw: Draw, fact: Triple, others: list[Triple]) -> dict:
    """A fact that no text has told; a new person's alias is the family name."""
    record = edit(draw, fact, fact.object, others)
    is_known = bool(others) and (fact.subject, others[0].relation) in draw.known
    if not is_known and " " in fact.subject:
        wording = statements(draw.world.relation(fact)["seen"])[0]
        prompt = wording.replace("{}", fact.subject.split()[-1])
        record["portability"]["Subject_Aliasing"] = questions_with((prompt, fact.object))
    return record


def new_object(draw: Draw, fact: Triple) -> str:
    """Another object of the fact's relation."""
    return draw.rng.choice([o for o in draw.world.objects[fact.relation] if o != fact.object])


def counterfact(draw: Draw, fact: Triple) -> dict:
    """A known fact with another object of its relation."""
    others = [other for other in draw.about[fact.subject] if other != fact]
    return edit(draw, fact, new_object(draw, fact), others) | {"ground_truth": [[fact.object]]}


def with_plain_answers(record: dict) -> dict:
    """The record with plain strings for answers, as in CounterFact's training file."""
    flat = {}
    for part in ("portability", "locality"):
        flat[part] = {}
        for kind, asks in record[part].items():
            plain = [ask | {"ground_truth": ask["ground_truth"][0][0]} for ask in asks]
            flat[part][kind] = plain
    return record | flat | {"ground_truth": record["ground_truth"][0][0]}


def zsre(draw: Draw, fact: Triple) -> dict:
    """A question about a known fact with another object; portability is a statement to end."""
    world = draw.world
    new = new_object(draw, fact)
    asks = [wording for wording in world.relation(fact)["seen"] if "?" in wording]
    first, second = draw.rng.sample(asks, 2)
    relation = draw.rng.choice([relation for relation in draw.sharers if relation != fact.relation])
    strangers = [other for other in draw.sharers[relation] if other.subject != fact.subject]
    far = draw.rng.choice(strangers)
    far_question = next(wording for wording in world.relation(far)["seen"] if "?" in wording)
    follows = portability(world, fact, new, draw.known)
    ask = (follows.get("Reasoning") or follows["Logical_Generalization"])[0]
    prompt = first.replace("{}", fact.subject)
    return {"subject": fact.subject, "src": prompt, "pred": fact.object,
            "rephrase": second.replace("{}", fact.subject), "alt": new, "answers": [fact.object],
            "loc": far_question.replace("{}", far.subject), "loc_ans": far.object,
            "cond": f"{fact.object} >> {new} || {prompt}",
            "portability": {"New Question": ask["prompt"],
                            "New Answer": ask["ground_truth"][0][0]}}


def talks(draw: Draw, sizes: Sizes, seed: int) -> dict[str, list[dict]]:
    """ConvSent's three splits over the world's topics, of which the model can speak.

    Training has as many topics as are left; beyond that, it comes back to them with other replies.
    """
    table = draw.world.table
    n_train, n_val, n_test = sizes.convsent
    topics = items.topics(table, sizes.replies)
    draw.rng.shuffle(topics)
    if n_test + n_val >= len(topics):
        raise ValueError(f"{n_val} and {n_test} topics to validate and test of {len(topics)}")
    train = topics[n_test + n_val:]
    names = [topic["ent"] for topic in train]
    round_ = 1
    while len(train) < n_train:
        again = items.topics(table | {"seed": f"{seed} {round_}"}, sizes.replies)
        by_name = {topic["ent"]: topic for topic in again}
        train = train + [by_name[name] for name in names]
        round_ += 1
    return {"convsent_train": train[:n_train], "convsent_val": topics[n_test:n_test + n_val],
            "convsent_test": topics[:n_test]}


def main() -> None:
    """Write the splits into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, count in build(given.output, build_world(), Sizes(), seed=given.seed).items():
        print(f"{name}: {count} records")


if __name__ == "__main__":
    main()
