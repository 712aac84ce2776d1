"""The pocket world: facts are unique, records hold what CounterFact's do, neighbours share the object."""

from collections import Counter

import pytest

from editcore import facts, world


@pytest.fixture(scope="module")
def made():
    return world.build_world()


@pytest.fixture(scope="module")
def records(made):
    return world.records(made)


def test_every_subject_has_one_object_a_relation(made):
    assert max(Counter((f.subject, f.relation) for f in made.facts).values()) == 1
    assert len(made.facts) >= 5000 and len({f.subject.lower() for f in made.facts}) >= 2500


def test_real_places_are_what_they_are(made):
    known = world.object_of(made.facts)
    assert known["France", "P36"] == "Paris" and known["Osaka", "P17"] == "Japan" and known["Kenya", "P30"] == "Africa"
    assert known["Brazil", "P37"] == "Portuguese" and known["Poland", "P38"] == "zloty"


def test_the_world_is_the_same_at_every_call(made, records):
    assert world.build_world() == made
    assert world.records(made)[17] == records[17]


def test_held_out_wordings_and_combinations_are_never_seen(made):
    seen = {(p.prompt, p.subject) for p in made.probes("seen")}
    for kind in ("held-out combination", "held-out wording"):
        assert not seen & {(p.prompt, p.subject) for p in made.probes(kind)}
    assert all(len(made.wordings(fact)[0]) >= 5 for fact in made.facts)
    assert min(len(row["unseen"]) for row in made.table["relation"].values()) >= 1


def test_words_of_unseen_wordings_occur_elsewhere_in_the_text(made):
    rows = made.table["relation"].values()
    texts = [text for row in rows for text in [*row["seen"], *row["logical"], *row.get("hop", ()), row["label"]]]
    words = set(" ".join(texts).replace("'s", " 's").lower().split())
    unseen = " ".join(text for row in rows for text in row["unseen"]).replace("'s", " 's").lower().split()
    assert set(unseen) <= words | {"and"}


def test_unknown_probes_are_one_clear_error(made):
    with pytest.raises(ValueError, match="no probes of kind 'nonsense'"):
        made.probes("nonsense")


def test_records_are_enough_and_read_as_facts(records):
    assert len(records) >= 5000 and [r["case_id"] for r in records] == list(range(len(records)))
    assert len({r["requested_rewrite"]["subject"].lower() for r in records}) >= 2500
    assert facts.fact(records[0]).prompt.count("{}") == 1


def test_neighbours_share_the_object_and_attributes_have_the_new_one(made, records):
    answers = {}
    for kind in ("seen", "held-out combination"):
        for probe in made.probes(kind):
            answers.setdefault(probe.text, set()).add(probe.answer)
    for record in records:
        wish = record["requested_rewrite"]
        assert record["neighborhood_prompts"], wish
        for text in record["neighborhood_prompts"]:
            assert wish["target_true"]["str"] in answers[text] and wish["subject"] != text
        assert all(wish["target_new"]["str"] in answers[text] for text in record["attribute_prompts"])
        assert wish["target_new"]["str"] != wish["target_true"]["str"]
        assert len(set(record["paraphrase_prompts"]) - {wish["prompt"].replace("{}", wish["subject"])}) == 2


def test_first_records_are_of_many_relations_and_some_open_with_one_token(made, records):
    first = {}
    for record in records:
        first.setdefault(record["requested_rewrite"]["subject"].lower(), record["requested_rewrite"])
    assert list(first.values()) == [r["requested_rewrite"] for r in records[: len(first)]], "first records come first"
    assert len(Counter(wish["relation_id"] for wish in first.values())) >= 8
    openers = [w for w in first.values() if w["subject"] in made.one_token and w["prompt"].startswith("{}")]
    assert 40 <= len(openers) <= 80


def test_portability_follows_from_the_new_object(made, records):
    known = world.object_of(made.facts)
    citizens = [r for r in records if r["requested_rewrite"]["relation_id"] == "P27"]
    record = next(r for r in citizens if "Reasoning" in r["portability"])
    new = record["requested_rewrite"]["target_new"]["str"]
    assert record["portability"]["Reasoning"][0]["ground_truth"] == [[known[new, "P30"]]]
    assert record["portability"]["Logical_Generalization"][0]["ground_truth"] == [[new]]


def test_a_broken_world_file_is_named(tmp_path):
    path = tmp_path / "world.toml"
    path.write_text("seed = = 1")
    with pytest.raises(ValueError, match="world.toml: not a valid world"):
        world.read_table(path)
