"""editcore.facts: layouts read, bad records named, the published edit order."""

import json
import random

import pytest

from editcore.facts import Fact, fact, one_per_subject, order, read_facts

RECORD = {"case_id": 7, "requested_rewrite": {"prompt": "{} speaks", "subject": "Orla", "relation_id": "P103",
                                              "target_new": {"str": "Bol"}, "target_true": {"str": "Vlud"}},
          "paraphrase_prompts": ["{} is a speaker of"], "neighborhood_prompts": ["Sue speaks"],
          "attribute_prompts": ["Ann speaks"], "generation_prompts": ["Orla is"],
          "portability": {"alias": [{"prompt": "She speaks", "ground_truth": [["Bol", "Bolish"]]}]}}


def test_counterfact_and_plain_layout():
    one = fact(RECORD)
    assert one == Fact(case_id=7, subject="Orla", prompt="{} speaks", target_new="Bol", target_true="Vlud",
                       relation="P103", paraphrases=("Orla is a speaker of",), neighbours=("Sue speaks",),
                       attributes=("Ann speaks",), generation=("Orla is",),
                       portability=(("alias", "She speaks", ("Bol", "Bolish")),))
    assert one.text == "Orla speaks"
    plain = fact({"prompt": "{} is", "subject": "X {y}", "target_new": " big "}, 3)
    assert (plain.case_id, plain.target_new, plain.target_true, plain.text) == (3, "big", "", "X {y} is")


@pytest.mark.parametrize("change, words", [
    ({"subject": " "}, "record 5: the subject is empty"),
    ({"prompt": "Orla speaks"}, "record 5: .*must mark the subject"),
    ({"prompt": "He speaks"}, "record 5: .*does not contain the subject"),
    ({"prompt": "{} and {}"}, "record 5: .*exactly one"),
    ({"target_new": ""}, "record 5: target_new is empty"),
    ({"target_true": "Bol"}, "record 5: target_new equals target_true"),
    ({"target_new": 4}, "record 5: target_new is not a text"),
])
def test_bad_records_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        fact({"prompt": "{} speaks", "subject": "Orla", "target_new": "Bol"} | change, 5)


def test_missing_fields_and_wrong_kinds():
    with pytest.raises(ValueError, match="record 2: no subject, target_new"):
        fact({"prompt": "{} is"}, 2)
    with pytest.raises(ValueError, match="record 2: expected an object"):
        fact("text", 2)
    with pytest.raises(ValueError, match="record 7: neighborhood_prompts is not a list"):
        fact(RECORD | {"neighborhood_prompts": "Sue speaks"})


def test_read_facts(tmp_path):
    path = tmp_path / "facts.json"
    good = {"prompt": "{} is", "subject": "A", "target_new": "b"}
    path.write_text(json.dumps([good, good | {"target_new": ""}, good | {"case_id": 0}]))
    with pytest.raises(ValueError, match="facts.json: record 1: target_new is empty"):
        read_facts(path)
    bad = []
    assert [one.case_id for one in read_facts(path, bad)] == [0]
    assert len(bad) == 2 and "record 0: case_id occurs twice (records 0 and 2)" in bad[1]
    path.write_text("[]")
    with pytest.raises(ValueError, match="non-empty list"):
        read_facts(path)


def test_order_is_the_published_one():
    facts = [Fact(case_id=i, subject=f"S{i % 15}", prompt="{} is", target_new="x") for i in range(20)]
    assert len(one_per_subject(facts)) == 15
    orders = [order(facts, key) for key in range(3)]
    assert orders == [order(facts, key) for key in range(3)]
    assert orders[0] != orders[1]
    for one in orders:
        assert len(one) == 15 and len({f.subject for f in one}) == 15
    indices, generator = list(range(15)), random.Random(37)
    generator.shuffle(indices)
    assert orders[0] == [one_per_subject(facts)[i] for i in indices]
