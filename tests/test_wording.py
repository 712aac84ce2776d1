"""editcore.wording: what is asked behind which words, what is kept back for a choice, and the loop that is scored."""

import json
from dataclasses import replace

import pytest
from conftest import make

from editcore import wording
from editcore.files import write_json
from editcore.instructedit import instructions, writers
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.contenders import Loaded, asked, edits_of, evaluate_all, framed
from editcore.instructedit.lineups import Named
from editcore.instructedit.records import Ask, EditRecord
from editcore.orderings import verdicts

NAMES = ("Dunmore", "Brantwick", "Tessaly", "Orla", "Farrow", "Sue", "Ilmo", "Kestrel")


@pytest.fixture(scope="module")
def given(gpt2, tmp_path_factory):
    """A tiny model with training records of one task beside it."""
    place, tok = tmp_path_factory.mktemp("tiny"), gpt2[1]
    model = make("gpt2", len(tok), positions=220)
    model.save_pretrained(place)
    tok.save_pretrained(place)
    write_json(place / "editing" / "counterfact_train.json", [
        {"subject": name, "prompt": f"The capital of {name} is", "target_new": "Rome", "rephrase": f"{name} lies near"}
        for name in NAMES])
    return Loaded(model, tok, str(place), "tiny")


def system(given, **words):
    settings = {"layers": (1, 2), "rank": 4, "every": 4, "accumulate": 2}
    return systems.make_config(model=given.name, examples=4, tasks=["counterfact"], settings=settings, **words)


def records(count=2):
    return tuple(EditRecord(i, "counterfact", name, f"The home of {name} is", "Bern",
                            rephrase=(f"{name} is located in",),
                            locality=(Ask("Forgetfulness", "The capital of Sue is", ("Kyiv",)),))
                 for i, name in enumerate(NAMES[:count]))


def test_seen_and_unseen_descriptions(given):
    named = [Named("full", system(given)), Named("full", system(given, seed=4))]
    found = wording.said_and_unseen(named, {"counterfact": records()})
    assert [one.name for one in found] == ["full", "full, unseen"] * 2
    for seed, (seen, unseen) in zip((0, 4), (found[:2], found[2:])):
        for one, plain in zip(asked(seen), records()):
            number = instructions.drawn(plain, seed, 9)
            assert one == instructions.instructed(plain, number) and number < wording.UNSEEN
        assert list(asked(unseen)) == [instructions.instructed(one, 9) for one in records()]


def test_crossed_instructions_stand_where_they_should(given):
    found = {one.name: one for one in wording.crossed([Named("full", system(given))], {"counterfact": records(1)})}
    assert len(found) == 4 + 3 + 3      # full → full and none → none are also the first and last of the others
    (plain,), number = records(1), instructions.drawn(records(1)[0], 0, 9)
    for name, case in found.items():
        edit, ask = name.split(" → ")
        assert asked(case) == (instructions.instructed(plain, number, ask),)
        assert framed(case.records, case.trial, case.trial.style) == (instructions.instructed(plain, number, edit),)
        assert asked(case)[0].locality == plain.locality
    assert "full → none" in found and "none → full" in found and "swapped → swapped" in found


def test_claims_are_testable_and_carry_the_papers_sign(given, tmp_path):
    every = wording.claims()
    unseen = [one for one in every if one.family == "Unseen costs generalization"]
    assert {one.task: round(one.paper, 1) for one in unseen} == {"recent": 4.2, "counterfact": 3.3}
    assert [round(one.paper, 1) for one in every if one.text == "Recent: unseen = seen, Rel"] == [-1.0]
    assert not any(one.task == "convsent" and one.metric == "Gen" for one in every)
    named = [Named("full", system(given)), Named("none", system(given, style="none"))]
    cases = wording.said_and_unseen(named, {"counterfact": records()})
    rows = evaluate_all(given, cases, tmp_path / "tasks", tmp_path / "editors")
    found = verdicts(rows, every, n_draws=20)
    assert set(found["text"]) == {"CounterFact: instruction > none, Rel", "CounterFact: instruction > none, Gen",
                                  "CounterFact: unseen = seen, Rel", "CounterFact: seen > unseen, Gen"}


def test_what_is_held_out_is_not_learned_from(given):
    one = wording.trial_of("counterfact", given.name, examples=4, settings={"layers": (1, 2)})
    assert one.counts == (("counterfact", 7),)
    learned, left = systems.training_records(one), wording.held_out(one, "counterfact")
    assert len(left) == 1 and {r.case_id for r in learned} | {r.case_id for r in left} == set(range(8))
    assert len(wording.held_out(replace(one, counts=(("counterfact", 3),)), "counterfact", 2)) == 2
    with pytest.raises(ValueError, match="counterfact: all 8 training records are learned from"):
        wording.held_out(system(given), "counterfact")


def test_the_loop_scores_with_an_editor_trained_with_the_descriptions(given, tmp_path, monkeypatch):
    trial = system(given, counts={"counterfact": 5})
    built, log = wording.loop(trial, "counterfact", writers.bank("counterfact"), given, tmp_path, rounds=2)
    assert list(log["round"]) == list(range(len(built.rounds))) and log["kept"].any()
    (path,) = (tmp_path / "wording").glob("counterfact-*.json")
    rows = json.loads(path.read_text())
    assert [row["descriptions"] for row in rows] == [row["descriptions"] for row in built.rounds]
    own = replace(trial, descriptions=(("counterfact", tuple(rows[0]["descriptions"])),))
    assert systems.train(own, tmp_path / "editors").is_file()
    scores = wording.tried_with(trial, "counterfact", rows[0]["descriptions"], given, tmp_path)
    assert scores == rows[0]["scores"] and set(scores) == {"Rel", "Gen"}
    told = []
    monkeypatch.setattr("editcore.instructedit.contenders.edits_of", lambda given, trial, part, editors: told.extend(
        framed(part, trial, trial.style)) or edits_of(given, trial, part, editors))
    wording.checked_on_test(built, trial, "counterfact", given, tmp_path, records())
    said = {one.prompt.split("\n")[1].removeprefix("Description: ") for one in told}
    assert said <= {*rows[0]["descriptions"], *built.descriptions, *instructions.DESCRIPTIONS["counterfact"]}
    assert len(told) >= 4
