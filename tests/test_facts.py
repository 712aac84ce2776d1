"""editcore.facts: layouts read, bad records named, the published edit order."""

import json
import random

import pytest

from editcore.facts import Fact, check_agreement, fact, one_per_subject, order, read_facts

PLAIN = {"prompt": "{} speaks", "subject": "Orla", "target_new": "Bol"}
RECORD = {
    "case_id": 7,
    "requested_rewrite": {"prompt": "{} speaks", "subject": "Orla", "relation_id": "P103",
                          "target_new": {"str": "Bol"}, "target_true": {"str": "Vlud"}},
    "paraphrase_prompts": ["{} is a speaker of"],
    "neighborhood_prompts": ["Sue speaks"],
    "attribute_prompts": ["Ann speaks"],
    "generation_prompts": ["Orla is"],
    "portability": {"alias": [{"prompt": "She speaks", "ground_truth": [["Bol", "Bolish"]]},
                              {"prompt": "He speaks", "ground_truth": "Bol"}]},
}


def test_counterfact_and_plain_layout():
    full = fact(RECORD)
    assert full == Fact(
        case_id=7, subject="Orla", prompt="{} speaks", target_new="Bol", target_true="Vlud",
        relation="P103", paraphrases=("Orla is a speaker of",), neighbours=("Sue speaks",),
        attributes=("Ann speaks",), generation=("Orla is",),
        portability=(("alias", "She speaks", ("Bol", "Bolish")), ("alias", "He speaks", ("Bol",))))
    assert full.text == "Orla speaks"
    plain = fact({"prompt": "{} is", "subject": "X {y}", "target_new": " big "}, 3)
    assert plain == Fact(case_id=3, prompt="{} is", subject="X {y}", target_new="big")
    assert plain.text == "X {y} is"
    assert Fact(prompt="{} is", subject="X", target_new="big").case_id == 0


def test_a_record_that_is_no_object_is_named():
    with pytest.raises(ValueError, match="record 5: expected an object"):
        fact("text", 5)


def test_read_facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([PLAIN, PLAIN | {"target_new": ""}, PLAIN | {"case_id": 0}]))
    with pytest.raises(ValueError, match="facts.json: record 1: target_new is empty"):
        read_facts(path)
    bad = []
    assert read_facts(path, bad) == [fact(PLAIN, 0)]
    assert len(bad) == 2 and "record 0: case_id occurs twice (records 0 and 2)" in bad[1]
    for records, words in (([], "non-empty list"), ([{}], "no usable fact among 1 records")):
        path.write_text(json.dumps(records))
        with pytest.raises(ValueError, match=words):
            read_facts(path, [])


def test_two_answers_after_one_prompt_are_refused():
    facts = [Fact(case_id=i, subject="Orla", prompt="{} speaks", target_new=text)
             for i, text in enumerate(("Bol", "Bol", "Vlud"))]
    check_agreement(facts[:2])
    with pytest.raises(ValueError, match="records 0 and 2 want 'Bol' and 'Vlud' after the same"):
        check_agreement(facts)


def test_order_is_the_published_one():
    facts = [Fact(case_id=i, subject=f"S{i % 15}", prompt="{} is", target_new="x")
             for i in range(20)]
    unique = one_per_subject(facts)
    assert unique == facts[:15]
    orders = [order(facts, key) for key in range(3)]
    assert orders == [order(facts, key) for key in range(3)] and orders[0] != orders[1]
    indices = list(range(15))
    generator = random.Random(37)
    for ordered in orders:
        generator.shuffle(indices)
        assert ordered == [unique[i] for i in indices]
