"""The world's editing tasks: remade they are the committed files, and every record is sound."""

import json
import random
import re

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data.world.make import editing, records, tables, talks
from data.world.make.__main__ import text
from editcore.instructedit.records import load_records, records_folder

FACT_TASKS = ("recent", "counterfact", "zsre")


@pytest.fixture(scope="module")
def world():
    return records.build()


@pytest.fixture(scope="module")
def parts():
    return {path.stem: json.loads(path.read_text("utf-8")) for path in editing.EDITING.glob("*")}


def edits(parts, *tasks):
    """(part's name, record) of every record of these tasks."""
    return [(name, row) for name, rows in parts.items() if name.split("_")[0] in tasks
            for row in rows]


def prompt_of(row):
    """The prompt of a record on a fact."""
    return row["src"] if "src" in row else row["prompt"]


def asks_of(row):
    """Every question of a record that is not its prompt."""
    if "src" in row:
        return [row["loc"], row["rephrase"], *row["portability"].values()]
    blocks = (*row["locality"].values(), *row["portability"].values())
    return [row["rephrase"], *(ask["prompt"] for block in blocks for ask in block)]


def test_making_them_anew_gives_the_committed_files(world):
    made = editing.splits(world)
    assert {path.stem for path in editing.EDITING.glob("*.json")} == set(made)
    for name, rows in made.items():
        assert (editing.EDITING / f"{name}.json").read_text("utf-8") == text(rows), name


def test_sizes(parts):
    for task, sizes in editing.SIZES.items():
        assert [len(parts[f"{task}_{split}"]) for split in editing.SPLITS] == list(sizes)
    size = sum(path.stat().st_size for path in editing.EDITING.glob("*"))
    assert size < 8_000_000


@pytest.mark.parametrize("split", editing.SPLITS)
def test_they_are_read_as_they_are(parts, split):
    assert records_folder("models/smollm2-360m") == editing.EDITING
    read = load_records("models/smollm2-360m", split=split)
    assert {task: len(rows) for task, rows in read.items()} \
        == {task: len(parts[f"{task}_{split}"]) for task in editing.SIZES}
    for task in FACT_TASKS:
        for record in read[task]:
            assert record.subject in record.prompt and record.rephrase and record.locality
            assert record.rephrase[0] != record.prompt
            assert record.target != record.old and bool(record.old) == (task != "recent")
    assert all(len(record.positive) == len(record.negative) == talks.N_REPLIES
               for record in read["convsent"])


def test_no_subject_is_in_two_places(parts):
    rows = edits(parts, *editing.SIZES)
    subjects = [records.bare(row.get("subject") or row["ent"]).lower() for _, row in rows]
    assert len(set(subjects)) == len(subjects) == sum(map(sum, editing.SIZES.values()))


def test_prompts_and_targets_are_clean(parts):
    articles = re.compile(r"\b(the|an|a) (the|an|a) |\b[Aa] [aei]\w|\b[Aa]n [bcdfgjklmnpqrstvwyz]")
    for _, row in edits(parts, *FACT_TASKS):
        target = row.get("target_new", row.get("alt"))
        assert target.strip(" .") == target, row
        for prompt in (prompt_of(row), *asks_of(row)):
            assert prompt.strip() == prompt and not re.search(r"[{}]|  ", prompt), row
            assert not articles.search(prompt), prompt


def test_objects_are_true_or_false_as_the_task_wants(world, parts):
    for name, row in edits(parts, *FACT_TASKS):
        new = row.get("target_new", row.get("alt"))
        true = world.true[row["subject"].lower()]
        if name.startswith("recent"):
            assert new in true, row
        else:
            old = row["pred"] if "pred" in row else row["ground_truth"][0][0]
            assert old in true and new not in true and new not in world.alike.get(old, ()), row


def test_the_model_knows_counterfact_and_nothing_of_recent(world):
    facts = editing.chosen(world)
    for task in FACT_TASKS:
        for fact in facts[task]:
            assert records.is_known(world, fact.relation, fact.subject) == (task != "recent")


def test_replies_are_sentences_and_differ(parts):
    for _, row in edits(parts, "convsent"):
        replies = [*row["pos"], *row["neg"]]
        assert len(set(replies)) == 2 * talks.N_REPLIES, row["ent"]
        for reply in replies:
            assert re.fullmatch(r"[A-Z].*[.!?]", reply) and not re.search(r"[{}]|  ", reply)


def test_there_are_many_templates_and_some_of_one_split_only():
    table = talks.reply_table()
    for sentiment in talks.SENTIMENTS:
        every = [template for kind in table.values() for template in kind.get(sentiment, ())]
        assert len(set(every)) == len(every) >= 150
        train, test = ({template for kind in table.values() if sentiment in kind
                        for template in talks.templates(kind, "tea", sentiment, split)}
                       for split in ("train", "test"))
        assert min(len(train - test), len(test - train)) >= 15


def masked(parts, task, splits):
    """The prompts of a task with one word for the subject, shuffled."""
    prompts = [prompt_of(row).replace(row["subject"], "SUBJECT")
               for split in splits for row in parts[f"{task}_{split}"]]
    return random.Random(0).sample(prompts, len(prompts))


@pytest.mark.parametrize("tasks, bound", [(("recent", "counterfact"), 0.56), (FACT_TASKS, 0.5)])
def test_a_prompt_hardly_tells_its_task(parts, tasks, bound):
    accuracies = []
    for splits in (("train",), ("val", "test")):
        groups = [masked(parts, task, splits) for task in tasks]
        size = min(map(len, groups))
        prompts = [prompt for group in groups for prompt in group[:size]]
        labels = [task for task in tasks for _ in range(size)]
        if splits == ("train",):
            words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
            probe = make_pipeline(words, LogisticRegression(max_iter=1000)).fit(prompts, labels)
        accuracies.append(probe.score(prompts, labels))
    assert accuracies[1] < bound


def test_questions_are_on_every_relation_that_is_asked(world):
    asking = editing.Asking(world)
    asked = set(world.relations) - editing.LEFT_OUT
    assert set(asking.questions) == asked
    for name, questions in asking.questions.items():
        assert len(set(questions)) == len(questions) >= 3, name
        assert all(text.count("{}") == 1 and text.endswith("?") for text in questions), name
    subjects = {subject for relation in world.relations.values() for subject, _ in relation.pairs}
    assert len(set(asking.aliases) & subjects) > 40, tables.TABLES
