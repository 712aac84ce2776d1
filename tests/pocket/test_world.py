"""The pocket world: unique facts, records as in CounterFact, shared objects, solvable items."""

import json
from collections import Counter
from pathlib import Path

import pytest

import items
import world
from editcore import facts, fewshot

DATA = Path(__file__).parents[2] / "data" / "pocket"


@pytest.fixture(scope="module")
def pocket():
    return world.build_world()


@pytest.fixture(scope="module")
def records(pocket):
    return world.records(pocket)


def test_every_subject_has_one_object_per_relation(pocket):
    assert max(Counter((fact.subject, fact.relation) for fact in pocket.facts).values()) == 1
    assert len(pocket.facts) >= 5000
    assert len({fact.subject.lower() for fact in pocket.facts}) >= 2500


@pytest.mark.parametrize("subject, relation, wanted", [
    ("France", "P36", "Paris"), ("Osaka", "P17", "Japan"), ("Kenya", "P30", "Africa"),
    ("Brazil", "P37", "Portuguese"), ("Poland", "P38", "zloty")])
def test_real_places_are_what_they_are(pocket, subject, relation, wanted):
    assert world.object_of(pocket.facts)[subject, relation] == wanted


def test_the_files_beside_the_model_are_made_from_the_world(pocket, records):
    assert world.build_world() == pocket
    assert json.loads((DATA / "facts.json").read_text(encoding="utf-8")) == records
    made = {f"tasks/{task}": rows for task, rows in items.held_out_items(pocket.table).items()}
    for name, rows in (made | {"topics": items.topics(pocket.table)}).items():
        assert json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")) == rows, name


def test_held_out_wordings_and_combinations_are_never_seen(pocket):
    seen = {(probe.prompt, probe.subject) for probe in pocket.probes("seen")}
    for kind in ("held-out combination", "held-out wording"):
        assert not seen & {(probe.prompt, probe.subject) for probe in pocket.probes(kind)}
    assert all(len(pocket.wordings(fact)[0]) >= 5 for fact in pocket.facts)
    assert all(row["unseen"] for row in pocket.table["relation"].values())
    with pytest.raises(ValueError, match="no probes of kind 'nonsense'"):
        pocket.probes("nonsense")


def test_paraphrases_are_one_seen_and_one_held_out_combination(pocket, records):
    combinations = {probe.text for probe in pocket.probes("held-out combination")}
    seen = {probe.text for probe in pocket.probes("seen")}
    for record in records:
        first, second = record["paraphrase_prompts"]
        assert first in seen and second in combinations


def test_records_are_enough_and_read_as_facts(records):
    assert len(records) >= 5000
    assert [record["case_id"] for record in records] == list(range(len(records)))
    assert facts.fact(records[0]).prompt.count("{}") == 1


def test_neighbours_share_the_object_and_attributes_have_the_new_one(pocket, records):
    answers = {}
    for kind in ("seen", "held-out combination"):
        for probe in pocket.probes(kind):
            answers.setdefault(probe.text, set()).add(probe.answer)
    for record in records:
        rewrite = record["requested_rewrite"]
        true, new = (rewrite[target]["str"] for target in ("target_true", "target_new"))
        assert record["neighborhood_prompts"], rewrite
        assert all(true in answers[text] for text in record["neighborhood_prompts"])
        assert all(new in answers[text] for text in record["attribute_prompts"])
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
        assert new != true and len(set(record["paraphrase_prompts"]) - {prompt}) == 2


def test_first_records_are_of_many_relations_and_some_open_with_one_token(pocket, records):
    rewrites = [record["requested_rewrite"] for record in records]
    first = {}
    for rewrite in rewrites:
        first.setdefault(rewrite["subject"].lower(), rewrite)
    assert len(first) >= 2500 and list(first.values()) == rewrites[:len(first)]
    assert len({rewrite["relation_id"] for rewrite in first.values()}) >= 8
    openers = [rewrite for rewrite in first.values()
               if rewrite["subject"] in pocket.one_token and rewrite["prompt"].startswith("{}")]
    assert 40 <= len(openers) <= 80


def test_portability_follows_from_the_new_object(pocket, records):
    known = world.object_of(pocket.facts)
    record = next(record for record in records if "Reasoning" in record["portability"]
                  and record["requested_rewrite"]["relation_id"] == "P27")
    new = record["requested_rewrite"]["target_new"]["str"]
    assert record["portability"]["Reasoning"][0]["ground_truth"] == [[known[new, "P30"]]]
    assert record["portability"]["Logical_Generalization"][0]["ground_truth"] == [[new]]


def test_a_broken_world_file_is_named(tmp_path):
    path = tmp_path / "world.toml"
    path.write_text("seed = = 1")
    with pytest.raises(ValueError, match="world.toml: not a valid world"):
        world.read_table(path)


def test_items_are_balanced_distinct_and_solvable_by_construction(pocket):
    by_task = items.held_out_items(pocket.table)
    assert set(by_task) == set(fewshot.TASKS)
    for rows in by_task.values():
        assert Counter(row["label"] for row in rows) == {0: 100, 1: 100}
        assert len({items.item_key(row) for row in rows}) == 200
    for task, agrees in {"mrpc": 1, "rte": 0}.items():
        for row in by_task[task]:
            denies = bool({"not", "never"} & set(row["sentence2"].split()))
            assert denies == (row["label"] != agrees)
    good = set(pocket.table["topics"]["pos_word"])
    for row in by_task["sst2"]:
        assert bool(good & set(row["sentence"].split())) == bool(row["label"])


def test_topics_have_ten_replies_of_each_sign(pocket):
    rows = items.topics(pocket.table)
    assert len({row["ent"] for row in rows}) == len(rows) >= 100
    for row in rows:
        assert len(set(row["pos"])) == len(set(row["neg"])) == 10
        assert not set(row["pos"]) & set(row["neg"])
