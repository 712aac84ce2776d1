"""Read the tables that the world's facts are written in: relations with their prompts and pairs."""

import csv
import tomllib
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parent / "tables"
TOPICS = ("places", "nature", "words", "people", "works", "things")


@dataclass(frozen=True)
class Relation:
    """A relation as its table has it; {} in a prompt stands for the subject, without article."""

    name: str
    id: str             # Wikidata's where one fits, e.g. P36, with a letter where it is split
    edit: tuple         # prompts to edit with
    also: tuple         # prompts that are only used as paraphrases
    generation: tuple   # stubs to continue freely
    neighbours: tuple   # names of the relations whose subjects may be neighbours
    hop: tuple          # (prompt, relations that answer it for this relation's object) pairs
    pairs: tuple        # (subject, object), both with the article that they need in a sentence
    instead: tuple = () # further objects, of no subject, for relations with few

    @property
    def prompts(self):
        """All prompts."""
        return (*self.edit, *self.also)


def relations(folder=TABLES):
    """{name: Relation} of all tables, in their order."""
    found = {}
    for topic in TOPICS:
        with open(Path(folder) / f"{topic}.toml", "rb") as file:
            for name, row in tomllib.load(file).items():
                found[name] = relation(name, row, Path(folder))
    return found


def relation(name, row, folder):
    """Make the Relation of one table; ValueError names the table and what is wrong with it."""
    pairs = tuple(dict.fromkeys(pairs_of(row, folder)))
    subjects = [subject for subject, _ in pairs]
    twice = {subject for subject in subjects if subjects.count(subject) > 1}
    if twice:
        raise ValueError(f"{name}: {sorted(twice)} have two objects")
    bad = [text for text in (*row["edit"], *row["also"], *row["generation"])
           if text.count("{}") != 1]
    if bad:
        raise ValueError(f"{name}: not exactly one {{}} in {bad}")
    hops = [(prompt, tuple(names.split("|"))) for prompt, names in row.get("hop", ())]
    return Relation(name, row["id"], tuple(row["edit"]), tuple(row["also"]),
                    tuple(row["generation"]), tuple(row.get("neighbours", (name,))), tuple(hops),
                    pairs, tuple(row.get("instead", ())))


def pairs_of(row, folder):
    """Yield the (subject, object) pairs of a table: two columns of a file, or lines of objects."""
    if "columns" in row:
        yield from columns(folder / row.get("file", "countries.csv"), *row["columns"])
    else:
        text = row.get("facts") or (folder / row["file"]).read_text("utf-8")
        yield from grouped(text)


def columns(path, subject, target):
    """Yield the pairs of two columns of a CSV file; empty cells are left out."""
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row[subject] and row[target]:
                yield row[subject], row[target]


def grouped(text):
    """Yield the pairs of lines "object: subject; subject; ...", each subject once."""
    for line in filter(None, text.splitlines()):
        target, subjects = line.split(": ", 1)
        for subject in subjects.split(";"):
            yield subject.strip(), target


def alike(folder=TABLES):
    """{object: objects that may be true as well or too near to stand in its place}."""
    near = {}
    for line in (Path(folder) / "alike.txt").read_text("utf-8").splitlines():
        names = set(line.split("; "))
        for name in names:
            near.setdefault(name, set()).update(names)
    return near


def names(name, folder=TABLES):
    """The names in a list: `one_token`, subjects that SmolLM2's tokenizer keeps whole at the start
    of a text, or `plural`, subjects whose verb is in the plural.
    """
    lines = (Path(folder) / f"{name}.txt").read_text("utf-8").splitlines()
    return frozenset(part.strip() for line in lines for part in line.split(";"))


def measured(folder=TABLES):
    """{(relation, subject): for each editing prompt whether SmolLM2-135M completes it rightly}."""
    path = Path(folder) / "measured.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["relation"], row["subject"]): tuple(map(int, row["known"]))
                for row in csv.DictReader(file)}
