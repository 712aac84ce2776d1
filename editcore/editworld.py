"""The pocket world comes in; files of the four instruction-editing tasks in their real layouts come out."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from editcore.files import atomic
from editcore.instructedit.records import read_records
from editcore.world import Fact, World, build_world, invented_names, object_lists, object_of, portability, statements
from editcore.worldtext import topics

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pocket" / "editing"


@dataclass(frozen=True)
class Sizes:
    """Records a split. Those of the paper's data: 570 and 1,266; 1,428 and 839; 14,390, 799 and 800; 1,037."""

    recent: tuple = (200, 140)          # train, test
    counterfact: tuple = (300, 160)     # train, test
    convsent: tuple = (200, 40, 40)     # train, validation, test
    zsre: tuple = (180, 150)            # test, and training where zsRE is learned from for comparison
    replies: int = 8                    # of either sentiment a topic


@dataclass(frozen=True)
class Draw:
    """What every record is made from."""

    world: World
    known: dict         # (subject, relation) → object of the world
    sharers: dict       # relation → the world's facts of it
    about: dict         # subject → the world's facts about it
    rng: random.Random


def build(folder=FOLDER, seed=0, sizes=None, world=None):
    """Write every split as `folder`/{task}_{split}.json, one record a line; returns {file name: number of records}."""
    made = splits(world or build_world(), sizes or Sizes(), seed)
    for name, rows in made.items():
        body = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        with atomic(Path(folder) / f"{name}.json") as tmp:
            tmp.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    return {name: len(rows) for name, rows in made.items()}


def read(folder=FOLDER, seed=0):
    """{"recent_train": EditRecords, …} of every split in a folder that `build` wrote, through the real readers."""
    paths = sorted(Path(folder).glob("*_*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no split of an editing task")
    return {path.stem: read_records(path, path.stem.split("_")[0], seed=seed) for path in paths}


def splits(world, sizes, seed):
    """{"recent_train": JSON records, …}; no subject of a fact and no topic is edited in two splits."""
    draw = Draw(world, object_of(world.facts), grouped(world.facts, "relation"),
                grouped(world.facts, "subject"), random.Random(f"{seed} editing"))
    edits = known_edits(draw, [*sizes.counterfact, sizes.zsre[0]])
    fresh = new_facts(draw, sum(sizes.recent), {fact.subject for part in edits for fact in part})
    train, test = sizes.recent
    rows = {"recent_train": [recent(draw, *one) for one in fresh[:train]],
            "recent_test": [recent(draw, *one) for one in fresh[train:train + test]],
            "counterfact_train": [plain(counterfact(draw, fact)) for fact in edits[0]],
            "counterfact_test": [counterfact(draw, fact) for fact in edits[1]],
            "zsre_test": [zsre(draw, fact) for fact in edits[2]]}
    for name, part in zip(("train", "val", "test"), talks(draw, sizes, seed), strict=True):
        rows[f"convsent_{name}"] = part
    taken = {fact.subject for part in edits for fact in part} | {fact.subject for fact, _ in fresh}
    own = replace(draw, rng=random.Random(f"{seed} zsre training"))     # drawn last: the other splits stay as they are
    rows["zsre_train"] = [zsre(own, fact) for fact in known_edits(own, sizes.zsre[1:], taken)[0]]
    return rows


def grouped(facts, name):
    """Value of the field `name` → the facts that have it."""
    found = {}
    for fact in facts:
        found.setdefault(getattr(fact, name), []).append(fact)
    return found


def known_edits(draw, counts, taken=()):
    """Lists of `counts` facts to change, one a subject, none of the subjects in `taken`.

    A quarter each are of subjects with a nickname and of subjects whose two-step sentence is in the model's text, as
    long as there are any.
    """
    hops = {probe.subject for probe in draw.world.hops}
    linked = [fact for fact in draw.world.facts if fact.subject in hops and "hop" in draw.world.relation(fact)]
    named = [fact for fact in draw.world.facts if fact.subject in draw.world.nicknames]
    met, parts = set(taken), [[] for _ in counts]
    for pool, upto in ((named, 0.25), (linked, 0.5), (draw.world.facts, 1.0)):
        shuffled = iter(draw.rng.sample(pool, len(pool)))
        for part, count in zip(parts, counts, strict=True):
            while len(part) < upto * count:
                fact = next((one for one in shuffled if one.subject not in met), None)
                if fact is None:
                    break
                met.add(fact.subject)
                part.append(fact)
    for part, count in zip(parts, counts, strict=True):
        if len(part) < count:
            raise ValueError(f"the world has {len(met)} subjects, too few for splits of {', '.join(map(str, counts))}")
        draw.rng.shuffle(part)
    return parts


def new_facts(draw, count, taken):
    """`count` pairs (fact that the world has not, further facts of its subject), one a subject.

    Two in three are about people and firms that are in no text; the others tell a known person's missing relation.
    """
    known = count // 3
    strangers = new_names(draw, count - known)
    found = [told(draw, name, "person" if " " in name else "firm") for name in strangers]
    rows, lists = draw.world.table["relation"], object_lists(draw.world.table)
    people = sorted({fact.subject for fact in draw.sharers["P19"]} - taken)
    for person in draw.rng.sample(people, known):
        missing = [key for key, row in rows.items() if row["of"] == "person" and (person, key) not in draw.known]
        key = draw.rng.choice(missing)
        found.append((Fact(person, key, draw.rng.choice(lists[rows[key]["objects"]])), draw.about[person]))
    draw.rng.shuffle(found)
    return found


def new_names(draw, count):
    """`count` names like the world's, a fifth of firms; no full name and no family name is the world's or twice."""
    table, subjects = draw.world.table, {fact.subject for fact in draw.world.facts}
    met = subjects | {name.split()[-1] for name in subjects}
    syllables = {key: len(text.split()) for key, text in table["names"].items()}
    there = (syllables["first"] * syllables["last"] * syllables["middle"],
             syllables["firm_first"] * syllables["firm_middle"] * syllables["firm_last"])
    people, firms = (min(4 * count, size // 2) for size in there)     # beyond that, new ones would be found too slowly
    names = []
    for drawn, limit in zip(invented_names(table | {"people": people, "firms": firms}, draw.rng),
                            (count - count // 5, count // 5), strict=True):
        kept = [name for name in drawn if not (name.split()[-1] in met or met.add(name.split()[-1]))]
        names += kept[:limit]
    if len(names) < count:
        raise ValueError(f"only {len(names)} of {count} new names can be put together")
    return names


def told(draw, name, kind):
    """(the fact to teach, further facts) of a new subject: objects drawn evenly for all its kind's relations."""
    rows, lists = draw.world.table["relation"], object_lists(draw.world.table)
    facts = [Fact(name, key, draw.rng.choice(lists[row["objects"]])) for key, row in rows.items() if row["of"] == kind]
    draw.rng.shuffle(facts)
    return facts[0], facts[1:]


def asks(*pairs):
    """[{"prompt", "ground_truth": [[answer]]}] of (prompt, answer) pairs."""
    return [{"prompt": prompt, "ground_truth": [[answer]]} for prompt, answer in pairs]


def worded(draw, fact):
    """(a statement on the fact, its object), in a wording that the text may hold for it."""
    wording = draw.rng.choice(statements(draw.world.wordings(fact)[0]))
    return wording.replace("{}", fact.subject), fact.object


def locality(draw, fact, new, others):
    """Up to two other relations of the subject; another subject of the relation, if possible with the old object.

    KnowEdit's Forgetfulness asks for further objects of the same subject, but the world has one object a relation.
    """
    same = [worded(draw, one) for one in draw.rng.sample(others, min(2, len(others)))]
    near = [one for one in draw.sharers[fact.relation] if one.subject != fact.subject and one.object != new]
    alike = [one for one in near if one.object == fact.object]
    block = {"Relation_Specificity": asks(*same)} if same else {}
    return block | {"Forgetfulness": asks(worded(draw, draw.rng.choice(alike or near)))}


def edit(draw, fact, new, others):
    """The part that Recent and CounterFact share: prompt, another wording, locality and portability."""
    prompt = draw.rng.choice(statements(draw.world.wordings(fact)[0]))
    row, follows = draw.world.relation(fact), portability(draw.world, fact, new, draw.known)
    other = draw.rng.choice([one for one in statements([*row["seen"], *row["unseen"]]) if one != prompt])
    return {"subject": fact.subject, "prompt": prompt.replace("{}", fact.subject), "target_new": new,
            "rephrase": other.replace("{}", fact.subject), "portability": follows,
            "locality": locality(draw, fact, new, others)}


def recent(draw, fact, others):
    """A fact that no text has told; a new person's alias is the family name."""
    made = edit(draw, fact, fact.object, others)
    known = (fact.subject, others[0].relation) in draw.known if others else False
    if not known and " " in fact.subject:
        alias = fact.subject.split()[-1]
        wording = statements(draw.world.relation(fact)["seen"])[0]
        made["portability"]["Subject_Aliasing"] = asks((wording.replace("{}", alias), fact.object))
    return made


def counterfact(draw, fact):
    """A known fact with another object of its relation."""
    others = [one for one in draw.about[fact.subject] if one != fact]
    new = draw.rng.choice([one for one in draw.world.objects[fact.relation] if one != fact.object])
    return edit(draw, fact, new, others) | {"ground_truth": [[fact.object]]}


def plain(row):
    """The record with plain strings for answers, as in CounterFact's training file."""
    flat = {part: {kind: [ask | {"ground_truth": ask["ground_truth"][0][0]} for ask in found]
                   for kind, found in row[part].items()} for part in ("portability", "locality")}
    return row | flat | {"ground_truth": row["ground_truth"][0][0]}


def zsre(draw, fact):
    """A question about a known fact with another object as answer; the portability question is a statement to end."""
    new = draw.rng.choice([one for one in draw.world.objects[fact.relation] if one != fact.object])
    first, second = draw.rng.sample([one for one in draw.world.relation(fact)["seen"] if "?" in one], 2)
    relation = draw.rng.choice([one for one in draw.sharers if one != fact.relation])
    far = draw.rng.choice([one for one in draw.sharers[relation] if one.subject != fact.subject])
    question = next(one for one in draw.world.relation(far)["seen"] if "?" in one)
    follows = portability(draw.world, fact, new, draw.known)
    ask = (follows.get("Reasoning") or follows["Logical_Generalization"])[0]
    prompt = first.replace("{}", fact.subject)
    return {"subject": fact.subject, "src": prompt, "pred": fact.object,
            "rephrase": second.replace("{}", fact.subject), "alt": new, "answers": [fact.object],
            "loc": question.replace("{}", far.subject), "loc_ans": far.object,
            "cond": f"{fact.object} >> {new} || {prompt}",
            "portability": {"New Question": ask["prompt"], "New Answer": ask["ground_truth"][0][0]}}


def talks(draw, sizes, seed):
    """ConvSent's training, validation and test split over the world's topics, of which it can speak, and no others.

    Training has as many topics as are left; beyond that, it comes back to them with other replies.
    """
    table, (train, val, test) = draw.world.table, sizes.convsent
    known = topics(table, sizes.replies)
    draw.rng.shuffle(known)
    if test + val >= len(known):
        raise ValueError(f"{val} and {test} topics to validate and test, but the world has {len(known)}")
    names, rows, turn = [row["ent"] for row in known[test + val:]], known[test + val:], 1
    while len(rows) < train:
        again = {row["ent"]: row for row in topics(table | {"seed": f"{seed} {turn}"}, sizes.replies)}
        rows, turn = rows + [again[name] for name in names], turn + 1
    return rows[:train], known[test:test + val], known[:test]
