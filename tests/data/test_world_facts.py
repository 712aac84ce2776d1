"""The world's facts: made anew they are the committed file, and every record is consistent."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.world.make import __main__ as maker
from data.world.make import records, tables
from editcore import facts, files

WORLD = Path(__file__).parents[2] / "data" / "world"


@pytest.fixture(scope="module")
def world():
    return records.build()


@pytest.fixture(scope="module")
def rows():
    return json.loads((WORLD / "facts.json").read_text("utf-8"))


def core(row):
    """The subject, the prompt and the two objects of a record."""
    rewrite = row["requested_rewrite"]
    return (rewrite["subject"], rewrite["prompt"], rewrite["target_true"]["str"],
            rewrite["target_new"]["str"])


def texts(row):
    """Every prompt of a record, with its subject."""
    subject, prompt, _, _ = core(row)
    questions = [part["prompt"] for parts in row.get("portability", {}).values() for part in parts]
    return [prompt.replace("{}", subject), *row["paraphrase_prompts"], *questions,
            *row["neighborhood_prompts"], *row["attribute_prompts"], *row["generation_prompts"]]


def one_each(rows):
    """The first record of every subject, as a run takes them."""
    first = {}
    for row in rows:
        first.setdefault(core(row)[0].lower(), row)
    return list(first.values())


def test_making_it_anew_gives_the_committed_file(world):
    text = (WORLD / "facts.json").read_text("utf-8")
    assert maker.text(records.records(world)) == text
    assert len(text.encode()) < 4_000_000


def test_there_are_enough_records_subjects_and_openers(rows):
    assert [row["case_id"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 3000
    first = one_each(rows)
    assert len(first) >= 1500
    assert rows[:len(first)] == first, "the first record of every subject comes first"
    for part, least in ((rows, 150), (first, 120)):
        marks = Counter(row["opens"] for row in part)
        assert set(marks) == {"no", "one token", "several tokens"}
        assert min(marks["one token"], marks["several tokens"]) >= least


def test_records_read_as_facts(rows):
    read = facts.read_facts(WORLD / "facts.json")
    assert len(read) == len(rows) and len(facts.one_per_subject(read)) == len(one_each(rows))
    assert all(len(fact.paraphrases) == 2 and len(fact.generation) == 2 for fact in read)
    assert sum(bool(fact.portability) for fact in read) >= 1000


def test_prompts_are_clean_sentences(rows):
    words = re.compile(r"[\x21-\x7e]+( [\x21-\x7e]+)*")
    articles = re.compile(r"\b(the|an|a) (the|an|a) |\ba [aeio]\w|\ban [bcdfgjklmnpqrstvwyz]")
    for row in rows:
        subject, prompt, true, new = core(row)
        assert prompt.count("{}") == 1, row
        for text in (*texts(row), subject, true, new):
            assert words.fullmatch(text) and "{}" not in text, text
            assert not articles.search(text) or subject.startswith(("One ", "one ")), text
        assert len({*row["paraphrase_prompts"], prompt.replace("{}", subject)}) == 3


def test_subject_and_objects_are_apart(rows):
    for row in rows:
        subject, _, true, new = core(row)
        assert true[0].lower() != new[0].lower(), "the first tokens might be the same"
        for target in (true, new):
            assert subject.lower() not in target.lower(), row
            assert target.lower() not in subject.lower(), row


def test_new_object_is_not_true(world, rows):
    for row in rows:
        subject, _, true, new = core(row)
        answers = world.true[subject.lower()]
        assert true in answers and new not in answers, row
        assert new not in world.alike.get(true, ()), row


def prompts_of_all_facts(world):
    """{editing prompt with its subject: (subject, objects)}."""
    known = {}
    for relation in world.relations.values():
        for subject, target in relation.pairs:
            for prompt in relation.edit:
                text = records.filled(world, prompt, subject)
                known.setdefault(text, (records.bare(subject).lower(), set()))[1].add(target)
    return known


def test_neighbours_have_the_true_object_and_attributes_the_new_one(world, rows):
    known = prompts_of_all_facts(world)
    for row in rows:
        subject, _, true, new = core(row)
        for part, target in (("neighborhood_prompts", true), ("attribute_prompts", new)):
            assert len(set(row[part])) == len(row[part]) <= 10
            for text in row[part]:
                other, targets = known[text]
                assert other != subject.lower() and target in targets, text
    assert sum(bool(row["neighborhood_prompts"]) for row in rows) >= 0.8 * len(rows)


def test_portability_follows_from_the_new_object_only(rows):
    for row in rows:
        subject, _, true, new = core(row)
        for part in row.get("portability", {}).get("Reasoning", ()):
            (answer,), = part["ground_truth"]
            assert subject.lower() in part["prompt"].lower()
            assert answer != true


@pytest.mark.parametrize("relation, subject, target", [
    ("capital", "France", "Paris"), ("city_country", "Osaka", "Japan"),
    ("country_of_capital", "Ottawa", "Canada"), ("opposite", "hot", "cold"),
    ("author", "Hamlet", "William Shakespeare"), ("us_city", "Houston", "Texas"),
    ("city_of_landmark", "the Eiffel Tower", "Paris"), ("element_symbol", "gold", "Au")])
def test_facts_are_true(world, relation, subject, target):
    assert world.objects[relation, subject] == target


def test_marks_say_what_opens_the_prompt(rows):
    whole = tables.names("one_token")
    for row in rows:
        subject, prompt, _, _ = core(row)
        opening = "one token" if subject in whole else "several tokens"
        assert row["opens"] == (opening if prompt.startswith("{}") else "no"), row


def test_marks_are_those_of_smollm2s_tokenizer(rows):
    paths = sorted(files.cache_folder().glob("gguf/*/smollm2/tokenizer.json"))
    if not paths:
        pytest.skip("no smollm2 in the cache")
    tokenizer = Tokenizer.from_file(str(paths[0]))
    for row in rows:
        subject, prompt, _, _ = core(row)
        if prompt.startswith("{}"):
            size = len(tokenizer.encode(subject, add_special_tokens=False).ids)
            assert row["opens"] == ("one token" if size == 1 else "several tokens"), subject


def test_the_datasheet_counts_what_is_there(rows):
    text = (WORLD / "README.md").read_text("utf-8")
    counted = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| *(\d+) \|", text, re.M))
    assert {name: int(count) for name, count in counted.items()} \
        == Counter(row["relation"] for row in rows)
    assert f"{len(rows):,} records of {len(one_each(rows)):,} subjects" in text


@pytest.mark.parametrize("prompt, subject, wanted", [
    ("The capital of {} is", "the United States", "The capital of the United States is"),
    ("{} is a country in", "the Gambia", "The Gambia is a country in"),
    ("The {} is a type of", "the harp", "The harp is a type of"),
    ("A {} is a breed of", "Appaloosa", "An Appaloosa is a breed of"),
    ("The color of {} is", "a tomato", "The color of a tomato is"),
    ("{} are a type of", "ants", "Ants are a type of")])
def test_articles_and_capitals(world, prompt, subject, wanted):
    assert records.filled(world, prompt, subject) == wanted


@pytest.mark.parametrize("change, problem", [
    ({"facts": "red: rose; ruby\nblue: rose\n"}, r"colour: \['rose'\] have two objects"),
    ({"edit": ["{} is", "what is"]}, r"colour: not exactly one \{\} in \['what is'\]")])
def test_a_bad_table_is_refused(change, problem):
    row = {"id": "P462", "edit": ["{} is"], "also": ["{} has"], "generation": ["{}"],
           "facts": "red: rose; ruby\n"}
    assert len(tables.relation("colour", row, tables.TABLES).pairs) == 2
    with pytest.raises(ValueError, match=problem):
        tables.relation("colour", row | change, tables.TABLES)
