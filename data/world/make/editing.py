"""Make the splits of the four editing tasks for SmolLM2-135M out of the world's facts.

    python -m data.world.make.editing           # data/world/editing
    python -m data.world.make.editing -o DIR
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.world.make import records, talks
from data.world.make.__main__ import text
from data.world.make.questions import GROUPS, Asking
from data.world.make.tables import Relation

EDITING = Path(__file__).parents[1] / "editing"
SPLITS = ("train", "val", "test")
SIZES = {"recent": (1000, 80, 300), "counterfact": (1500, 80, 400), "zsre": (400, 60, 100),
         "convsent": (1000, 80, 300)}       # records of train, val and test
LEFT_OUT = {"widely", "prestigious", "next", "next_number", "greek_letter",
            "translation_spanish", "translation_french"}   # relations with one answer or none known
QUESTIONS = {"recent": 30, "counterfact": 30, "zsre": 70}   # percent of prompts that are questions
INVERSE = {"capital": "country_of_capital", "country_of_capital": "capital",
           "state_capital": "state_of_capital", "state_of_capital": "state_capital",
           "opposite": "opposite"}
NEAR = 2        # locality questions of either kind


@dataclass(frozen=True)
class Fact:
    """One fact to edit."""

    relation: Relation
    subject: str        # with its article
    target: str

    @property
    def key(self):
        """What makes two subjects the same."""
        return records.bare(self.subject).lower()


def by_hash(items, *parts):
    """Facts in an order that depends on their texts alone."""
    return sorted(items, key=lambda fact: records.draw(*parts, fact.relation.name, fact.subject))


def every_fact(world):
    """(known, unknown) Facts; a subject of which the model knows something is in no unknown one."""
    facts = [Fact(relation, subject, target) for name, relation in world.relations.items()
             if name not in LEFT_OUT for subject, target in relation.pairs
             if records.is_usable(subject, target)]
    known = [fact for fact in facts if records.is_known(world, fact.relation, fact.subject)
             and records.new_object(world, fact.relation, fact.subject, fact.target)]
    subjects = {fact.key for fact in facts
                if records.is_known(world, fact.relation, fact.subject)}
    return known, [fact for fact in facts if fact.key not in subjects]


def one_each(facts):
    """{subject: one of its facts}, drawn by a hash, in an order by a hash."""
    return {fact.key: fact for fact in by_hash(facts, "editing")}


def alike(facts, like, count):
    """`count` of the facts, of different subjects, with the shares that relations have in `like`.

    A relation with too few gives all that it has; the others make up for it.
    """
    share = Counter(fact.relation.name for fact in like)
    queues = {name: [fact for fact in by_hash(facts, "recent") if fact.relation.name == name]
              for name in share}
    taken = Counter()
    chosen = {}
    while len(chosen) < count:
        name = max((name for name in queues if queues[name]),
                   key=lambda name: share[name] / (taken[name] + 1))
        fact = queues[name].pop()
        if fact.key not in chosen:
            chosen[fact.key] = fact
            taken[name] += 1
    return by_hash(chosen.values(), "order of recent")


def chosen(world):
    """{task: Facts to edit}, each subject once."""
    known, unknown = every_fact(world)
    sure = list(one_each(known).values())
    n_counterfact = sum(SIZES["counterfact"])
    n_zsre = sum(SIZES["zsre"])
    tasks = {"counterfact": sure[:n_counterfact],
             "zsre": sure[n_counterfact:n_counterfact + n_zsre]}
    return tasks | {"recent": alike(unknown, tasks["counterfact"], sum(SIZES["recent"]))}


def portability(asking, fact, new, old):
    """KnowEdit's block of what follows: by another name, from the new object, the other way."""
    world = asking.world
    block = dict(records.portability(world, fact.relation, fact.subject, old, new))
    inverse = world.relations.get(INVERSE.get(fact.relation.name))
    if inverse:
        prompt = records.filled(world, inverse.edit[0], new)
        block["Logical_Generalization"] = [question(prompt, fact.subject)]
    if name := asking.alias(fact):
        block["Subject_Aliasing"] = [question(asking.alias_prompt(fact, name), new)]
    return block


def question(prompt, answer):
    """A question in KnowEdit's form."""
    return {"prompt": prompt, "ground_truth": [[answer]]}


def locality(asking, fact, new, old):
    """KnowEdit's block of what stays: other facts of the subject, near subjects, the old object."""
    world = asking.world
    about = [(world.relations[name], target) for (name, subject), target in world.objects.items()
             if subject == fact.subject and name not in LEFT_OUT
             and not GROUPS[name] & GROUPS[fact.relation.name]]
    same = [Fact(relation, fact.subject, target) for relation, target in about]
    sharers = [Fact(fact.relation, subject, target) for subject, target in fact.relation.pairs
               if records.bare(subject).lower() != fact.key and target != new]
    sharers.sort(key=lambda other: (not records.is_known(world, other.relation, other.subject),
                                    records.draw(fact.subject, other.subject)))
    near = [other for other in sharers if other.target != old]
    block = {"Relation_Specificity": (same[:NEAR] + near)[:NEAR]}
    block["Forgetfulness"] = [other for other in sharers if other.target == old][:NEAR]
    return {kind: [question(asking.prompt(other, QUESTIONS["counterfact"]), other.target)
                   for other in others] for kind, others in block.items() if others}


def knowedit(asking, fact, template, new, old):
    """A record in KnowEdit's layout; old is "" for a fact that the model does not know."""
    prompt, subject = asking.named(template, fact.subject)
    row = {"subject": subject, "prompt": prompt, "target_new": new}
    row |= {"ground_truth": [[old]]} if old else {}
    return row | {"rephrase": asking.rephrase(fact, template),
                  "portability": portability(asking, fact, new, old),
                  "locality": locality(asking, fact, new, old)}


def zsre(asking, fact, others):
    """A record in zsRE's layout with portability; `others` are facts to ask for what stays."""
    world = asking.world
    new = records.new_object(world, fact.relation, fact.subject, fact.target)
    template = asking.template(fact, QUESTIONS["zsre"])
    prompt, subject = asking.named(template, fact.subject)
    far = min((other for other in others
               if not GROUPS[other.relation.name] & GROUPS[fact.relation.name]),
              key=lambda other: records.draw(fact.subject, other.relation.name, other.subject))
    follows = portability(asking, fact, new, fact.target)
    row = {"subject": subject, "src": prompt, "pred": fact.target,
           "rephrase": asking.rephrase(fact, template), "alt": new, "answers": [fact.target],
           "loc": asking.question(far), "loc_ans": far.target,
           "cond": f"{fact.target} >> {new} || {prompt}", "portability": {}}
    if follows:
        ask = next(iter(follows.values()))[0]
        row["portability"] = {"New Question": ask["prompt"],
                              "New Answer": ask["ground_truth"][0][0]}
    return row


def rows_of_facts(world):
    """({task: records} of the three tasks on facts, names of their subjects).

    Recent takes its wordings from CounterFact's records of the relation, so that the wording does
    not tell the two apart.
    """
    asking = Asking(world)
    facts = chosen(world)
    templates = {}
    rows = {"counterfact": [], "recent": [], "zsre": []}
    for fact in facts["counterfact"]:
        template = asking.template(fact, QUESTIONS["counterfact"])
        templates.setdefault(fact.relation.name, []).append(template)
        new = records.new_object(world, fact.relation, fact.subject, fact.target)
        rows["counterfact"].append(knowedit(asking, fact, template, new, fact.target))
    for fact in facts["recent"]:
        seen = templates[fact.relation.name]
        template = seen[records.draw("recent", fact.relation.name, fact.subject) % len(seen)]
        rows["recent"].append(knowedit(asking, fact, template, fact.target, ""))
    rows["zsre"] = [zsre(asking, fact, facts["counterfact"]) for fact in facts["zsre"]]
    taken = {fact.key for part in facts.values() for fact in part}
    return rows, taken


def splits(world):
    """{"recent_train": records, ...}"""
    rows, taken = rows_of_facts(world)
    parts = {}
    for task, all_rows in rows.items():
        start = 0
        for split, size in zip(SPLITS, SIZES[task]):
            parts[f"{task}_{split}"] = all_rows[start:start + size]
            start += size
    for split, talk in talks.splits(world, taken, dict(zip(SPLITS, SIZES["convsent"]))).items():
        parts[f"convsent_{split}"] = talk
    return parts


def main():
    """Write the splits and say how many records there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=EDITING)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits(records.build()).items():
        (folder / f"{name}.json").write_text(text(rows), encoding="utf-8")
        print(f"{name}: {len(rows)} records")


if __name__ == "__main__":
    main()
