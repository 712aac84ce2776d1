"""Make the few-shot items in GLUE's shapes from tables of sentences written for this project.

    python -m data.world.make.tasks      # writes data/world/tasks/{sst2,mrpc,cola,rte}.json
"""

import json
import random
from pathlib import Path

TABLES = Path(__file__).parent / "tables"
OUT = Path(__file__).parents[1] / "tasks"
SEED = 0


def tasks():
    """Return {task: items}, each with as many items of either label, in a fixed order."""
    generator = random.Random(SEED)
    every = {"sst2": reviews(), "mrpc": pairs(), "cola": sentences(generator), "rte": premises()}
    return {name: generator.sample(items, len(items)) for name, items in every.items()}


def reviews():
    """Sentiment of short reviews: 1 is positive."""
    return [{"sentence": text, "label": int(label)} for label, text in rows("reviews.tsv")]


def pairs():
    """Each sentence with its paraphrase (1), and with that of the sentence before it (0)."""
    table = rows("paraphrases.tsv")
    same = [{"sentence1": first, "sentence2": second, "label": 1} for first, second in table]
    other = [{"sentence1": first, "sentence2": before, "label": 0}
             for (first, _), (_, before) in zip(table, table[-1:] + table[:-1])]
    return same + other


def sentences(generator):
    """Half of the sentences as they are (1), the words of the other half shuffled (0)."""
    lines = (TABLES / "sentences.txt").read_text("utf-8").splitlines()
    half = len(lines) // 2
    return [{"sentence": text, "label": 1} for text in lines[:half]] + [
        {"sentence": shuffled(text, generator), "label": 0} for text in lines[half:]]


def shuffled(text, generator):
    """Return a sentence with its words in another order."""
    words = text.removesuffix(".").split()
    words[0] = words[0] if words[0] == "I" else words[0].lower()
    order = generator.sample(words, len(words))
    return " ".join(order).capitalize() + "."


def premises():
    """What follows from a premise (0) and what contradicts it (1), in GLUE's numbering."""
    return [{"sentence1": premise, "sentence2": (true, false)[label], "label": label}
            for premise, true, false in rows("entailments.tsv") for label in (0, 1)]


def rows(name):
    """Return the rows of a table of tab-separated texts."""
    lines = (TABLES / name).read_text("utf-8").splitlines()
    return [line.split("\t") for line in lines]


def main():
    """Write one JSON file per task."""
    OUT.mkdir(exist_ok=True)
    for name, items in tasks().items():
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (OUT / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
