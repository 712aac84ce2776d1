"""Records: every layout and quirk of the real files; bad records named, none lost silently."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from editcore.instructedit.records import (
    Ask,
    edit_target,
    first_records,
    load_records,
    read_records,
    record_as_fact,
    validation_records,
)

REAL = Path(__file__).parents[3] / "shared" / "data"

NESTED = {"subject": "Orla Venn", "prompt": "The home of Orla Venn is ", "target_new": " Bolt ",
          "ground_truth": [["Old"]], "rephrase": "Orla Venn lives in",
          "portability": {"Logical_Generalization": [],
                          "Reasoning": [{"prompt": "Her land is",
                                         "ground_truth": [["Vlud", "Vludia"], ["Mor", "Vlud"]]}]},
          "locality": {"Relation_Specificity": [{"prompt": "Her father is", "ground_truth": [[]]},
                                                {"prompt": "Her dog is",
                                                 "ground_truth": [["Rex"]]}],
                       "Forgetfulness": [{"prompt": "She lived in",
                                          "ground_truth": [["Tarn", " "]]}]}}
PLAIN = {"subject": "Orla", "prompt": "Orla is", "target_new": "tall", "ground_truth": "short",
         "portability": {"Subject_Aliasing": [{"prompt": "O. is", "ground_truth": "tall"}]},
         "locality": {"Relation_Specificity": [{"prompt": "Orla has", "ground_truth": ""}]}}
ZSRE = {"subject": "Top", "src": "Who made Top?", "pred": "Ann", "rephrase": "By whom is Top?",
        "alt": "Bob",
        "answers": ["Cid"], "loc": "nq question: who is it", "loc_ans": "Kate",
        "cond": "Ann >> Bob || Who made Top?",
        "portability": {"Recalled Relation": "(Bob, born in, Oslo)",
                        "New Question": "Where was Top's maker born?",
                        "New Answer": "Oslo"}}
TALK = [{"ent": f"topic {i}", "pos": [f" good {i}. ", f" good {i}. ", f" fine {i}."],
         "neg": [f" bad {i}."]}
        for i in range(9)]


@pytest.fixture
def written(tmp_path):
    """A function: records -> path of their file."""
    def write(rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        return path
    return write


def test_nested_and_plain_answers(written):
    one, two = read_records(written([NESTED, PLAIN]), "recent")
    assert (one.case_id, one.task, one.target, one.old) == (0, "recent", "Bolt", "Old")
    assert one.prompt == "The home of Orla Venn is"
    assert one.portability == (Ask("Reasoning", "Her land is", ("Vlud", "Vludia", "Mor")),)
    assert one.locality == (Ask("Relation_Specificity", "Her dog is", ("Rex",)),
                            Ask("Forgetfulness", "She lived in", ("Tarn",)))
    assert one.rephrase == ("Orla Venn lives in",)
    assert two.portability == (Ask("Subject_Aliasing", "O. is", ("tall",)),
                               ), "one answer, not letters"
    assert (two.locality, two.old, two.rephrase) == ((), "short", ())


@pytest.mark.parametrize("missing", ["locality", "portability", "ground_truth", "rephrase"])
def test_parts_may_be_absent_or_null(written, missing):
    cut = {key: value for key, value in NESTED.items() if key != missing}
    here, null = read_records(written([cut, NESTED | {missing: None}]), "counterfact")
    name = {"ground_truth": "old"}.get(missing, missing)
    assert not getattr(here, name) and not getattr(null, name) and here.target == "Bolt"


def test_rephrase_prompts_under_either_name_and_as_a_list(written):
    cut = {key: value for key, value in NESTED.items() if key != "rephrase"}
    rows = read_records(written([cut | {"rephrase_prompt": "A"}, cut | {"rephrase": ["B", "C "]}]),
                        "recent")
    assert [row.rephrase for row in rows] == [("A",), ("B", "C")]


def test_zsre_in_both_layouts(written):
    one, two, three = read_records(written([ZSRE, NESTED,
                                            ZSRE | {"loc_ans": "", "portability": None}]), "zsre")
    assert (one.prompt, one.target, one.old, one.rephrase) == ("Who made Top?", "Bob", "Ann",
                                                               ("By whom is Top?",))
    assert one.locality == (Ask("Unrelated", "nq question: who is it", ("Kate",)),)
    assert one.portability == (Ask("Reasoning", "Where was Top's maker born?", ("Oslo",)),)
    assert two.target == "Bolt" and two.task == "zsre"
    assert (three.locality, three.portability) == ((), ())


def test_convsent_topics(written):
    rows = read_records(written(TALK), "convsent")
    assert [row.topic for row in rows] == [f"topic {i}" for i in range(9)]
    assert rows == read_records(written(TALK), "convsent") and rows != read_records(written(TALK),
                                                                                    "convsent",
                                                                                    seed=1)
    assert {row.sentiment for row in rows} == {"positive", "negative"}
    one = rows[8]
    assert one.positive == ("good 8.", "fine 8.") and one.negative == ("bad 8.",)
    assert one.target == "" and one.subject in one.prompt and all(one.topic in text
                                                                  for text in one.rephrase)
    assert one.locality == (Ask("Other_Topic", rows[0].prompt, ("good 0.", "fine 0.", "bad 0.")),)
    down = replace(one, sentiment="negative")
    assert (down.wanted, down.unwanted) == (("bad 8.",), one.positive)


@pytest.mark.parametrize("task, row, words", [
    ("recent", 5, "record 1: expected an object, not int"),
    ("recent", NESTED | {"target_new": ""}, "record 1: target_new is not a text, or empty"),
    ("recent", {"prompt": "x"}, "record 1: no subject"),
    ("recent", NESTED | {"locality": []}, "record 1: locality is not an object"),
    ("recent", NESTED | {"locality": {"F": {"prompt": "x"}}},
     "record 1: locality: F is not a list"),
    ("recent", NESTED | {"portability": {"F": [{"ground_truth": "x"}]}},
     "record 1: .*F question 0: no prompt"),
    ("recent", NESTED | {"portability": {"F": [{"prompt": "x", "ground_truth": [[3]]}]}},
     "record 1: .*ground_truth is not a text"),
    ("recent", NESTED | {"portability": {"F": ["x"]}},
     "record 1: portability: F question 0 is not an object"),
    ("recent", NESTED | {"rephrase": 4}, "record 1: rephrase is neither"),
    ("zsre", ZSRE | {"alt": " "}, "record 1: alt is not a text, or empty"),
    ("zsre", {"subject": "x"}, "record 1: no src"),
    ("zsre", ZSRE | {"portability": "x"}, "record 1: portability is not an object"),
    ("convsent", {"ent": "x", "pos": ["a"]}, "record 1: neg is not a list"),
    ("convsent", {"ent": "x", "pos": ["a"], "neg": [" "]}, "record 1: neg has no reply"),
])
def test_a_bad_record_is_named(written, task, row, words):
    good = {"recent": NESTED, "zsre": ZSRE, "convsent": TALK[0]}[task]
    path = written([good, row, good])
    with pytest.raises(ValueError, match=f"rows.json: {words}"):
        read_records(path, task)


def test_other_bad_files(written):
    with pytest.raises(ValueError, match="unknown task 'x': choose one of recent"):
        read_records(written([NESTED]), "x")
    with pytest.raises(ValueError, match="non-empty list"):
        read_records(written({}), "recent")


def test_validation_records_are_not_tested(tmp_path):
    files = {"recent_test": 5, "recent_val": 4, "counterfact_test": 5, "zsre_test": 2}
    for name, count in files.items():
        task, split = name.split("_")
        row = ZSRE if task == "zsre" else PLAIN
        rows = [row | {"subject": f"{split} {i}"} for i in range(count)]
        (tmp_path / f"{task}_{split}.json").write_text(json.dumps(rows))
    tests = {task: records[:2] for task, records in load_records("", tmp_path, "test").items()}
    chosen = validation_records("", tmp_path, tests, 3)
    assert {task: [record.subject for record in records] for task, records in chosen.items()} == {
        "recent": ["val 1", "val 2", "val 3"], "counterfact": ["test 2", "test 3", "test 4"]}


def test_first_records(written):
    talks = read_records(written(TALK), "convsent")
    facts = read_records(written([NESTED] * 4), "recent")
    some = first_records({"recent": facts, "convsent": talks}, 3, 2)
    assert some == {"recent": facts[:3], "convsent": talks[:2]}
    assert first_records({"recent": facts, "convsent": talks}, 0, 1) == {
        "recent": facts, "convsent": talks[:1]}


def test_a_record_as_a_fact(written):
    one = record_as_fact(read_records(written([NESTED]), "recent")[0])
    assert (one.prompt, one.subject) == ("The home of {} is", "Orla Venn")
    assert (one.target_new, one.target_true) == ("Bolt", "Old")
    talk = read_records(written(TALK), "convsent")[0]
    drawn = {edit_target(talk, seed) for seed in range(20)}
    assert drawn == set(talk.wanted) and record_as_fact(talk, 3).target_new == edit_target(talk, 3)
    drawn = {record_as_fact(talk, seed, opposite=True).unwanted for seed in range(20)}
    assert drawn == set(talk.unwanted) and record_as_fact(talk, 3).unwanted == ""
    assert one.unwanted == "", "a fact has no opposite"
    other = record_as_fact(read_records(written([NESTED | {"subject": "Bo"}]), "recent")[0])
    assert (other.prompt, other.subject) == ("{}", "The home of Orla Venn is")


def questions(rows, part):
    """Number of questions with an answer in the KnowEdit rows' `part`."""
    asks = [ask for row in rows for kind in (row.get(part) or {}).values() for ask in kind]
    return sum(bool(set(str(ask["ground_truth"])) - set("[]'\", ")) for ask in asks)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real samples here")
@pytest.mark.parametrize("file, task, count", [
    ("wiki_recent_train_sample.json", "recent", 150),
    ("wiki_counterfact_train_sample.json", "counterfact", 150),
    ("zsre_portability_sample.json", "zsre", 200), ("convsent_val_sample.json", "convsent", 60)])
def test_real_samples_are_read_whole(file, task, count):
    rows = json.loads((REAL / file).read_text())
    records = read_records(REAL / file, task)
    assert len(records) == len(rows) == count
    assert all(record_as_fact(one).text == one.prompt for one in records)
    asks = sum(len(one.locality) + len(one.portability) for one in records)
    wanted = {"zsre": 400, "convsent": 60}.get(task)
    assert asks == (wanted or questions(rows, "locality") + questions(rows, "portability"))
    assert all(len(text) > 1 or text.isalnum() for one in records for ask in one.portability
               for text in ask.answers)
    answers = [text for one in records for ask in one.portability for text in ask.answers]
    assert not answers or sum(map(len, answers)) / len(answers) > 5, "whole answers, not letters"
    assert all(one.positive and one.negative for one in records if task == "convsent")

