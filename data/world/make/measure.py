"""Ask a model for every fact in every prompt, so that records take prompts that it completes.

    python -m data.world.make.measure MODEL     # data/world/make/tables/measured.csv; goes on
"""

import argparse
import csv
from pathlib import Path

import editcore as ec
from data.world.make import records, tables
from editcore.knowledge import known

MEASURED = tables.TABLES / "measured.csv"


def in_every_prompt(world, relation, subject, target):
    """The fact in every editing prompt of its relation."""
    return [ec.Fact(subject=records.bare(subject), prompt=text, target_new="-", target_true=target)
            for text in (records.filled(world, prompt, subject) for prompt in relation.edit)]


def measure(model, tok, *, world, relation):
    """[(subject, a digit for each editing prompt: 1 if the model completes it rightly)]."""
    questions = [in_every_prompt(world, relation, *pair) for pair in relation.pairs]
    hits = iter(known(model, tok, [fact for group in questions for fact in group]))
    return [(subject, "".join(str(int(next(hits))) for _ in group))
            for (subject, _), group in zip(relation.pairs, questions)]


def main():
    """Ask relation by relation (each is cached) and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    model, tok = ec.load(arguments.model)
    world = records.build()
    rows = []
    for name, relation in world.relations.items():
        hits = measure(model, tok, world=world, relation=relation)
        rows += [(name, *pair) for pair in hits]
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("relation", "subject", "known"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
