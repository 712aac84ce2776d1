"""editcore.contenders: cells of the tables tried, kept and found again; who learns what; bad trials refused."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import make

from editcore.editors import EDITORS
from editcore.files import write_json
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.contenders import (
    NAMES,
    TOLD,
    Case,
    Loaded,
    Trial,
    asked,
    costs,
    edits_of,
    evaluate,
    evaluate_all,
    identifier,
    table_of,
    transfer,
)
from editcore.instructedit.lineups import Named
from editcore.instructedit.records import Ask, EditRecord
from editcore.instructedit.scores import prepare, read, score

FT = Trial(editor="ft", settings=(("epsilon", 0.5), ("layer", 1), ("lr", 0.05), ("steps", 12)))


@pytest.fixture(scope="module")
def given(gpt2, tmp_path_factory):
    """A tiny model with a folder, so that systems can be trained for it."""
    place = tmp_path_factory.mktemp("tiny")
    tok = gpt2[1]
    model = make("gpt2", len(tok), positions=200)
    model.save_pretrained(place)
    tok.save_pretrained(place)
    facts = [{"subject": name, "prompt": f"The capital of {name} is", "target_new": city,
              "rephrase": f"{name} lies near", "locality": {"Forgetfulness": [
                  {"prompt": "The home of Orla is", "ground_truth": [["Oslo"]]}]}}
             for name, city in (("Dunmore", "Rome"), ("Brantwick", "Lima"), ("Tessaly", "Oslo"))]
    talk = [{"ent": topic, "pos": ["It is good.", "I read it."], "neg": ["It is old.", "You said it."]}
            for topic in ("a book", "a river")]
    for name, rows in (("recent_train", facts), ("zsre_train", facts), ("convsent_train", talk)):
        write_json(place / "editing" / f"{name}.json", rows)
    return Loaded(model, tok, str(place), "tiny")


def records(task="recent", number=3):
    names, cities = ("Orla", "Farrow", "Kestrel Works"), ("San Marino", "Bern", "Turin")
    return tuple(EditRecord(i, task, name, f"The home of {name} is", city, rephrase=(f"{name} is located in",),
                            locality=(Ask("Forgetfulness", "The capital of Dunmore is", ("Kyiv",)),))
                 for i, (name, city) in enumerate(zip(names, cities)))[:number]


def system(given, **words):
    return systems.make_config(model=given.name, examples=4, settings={"layers": (1, 2), "rank": 4}, **words)


def test_each_record_is_scored_after_its_own_edit(given, tmp_path):
    case, rows = Case("FT-L", FT, records()), []
    got = evaluate(given, case, tmp_path)
    for one in records():
        sheet = prepare(given.model, given.tok, [one])
        before, (edit,) = read(given.model, sheet), edits_of(given, FT, [one])
        with edit.applied(given.model):
            rows.append(score(sheet, before, read(given.model, sheet)))
    pd.testing.assert_frame_equal(got, pd.concat(rows, ignore_index=True), atol=1e-5)
    assert got[got["metric"] == "Rel"]["value_exact"].mean() > 0.5
    base = evaluate(given, Case("base", Trial(), records()), tmp_path)
    assert base[base["metric"] == "Rel"]["value_exact"].mean() == 0 and (base.query("metric == 'Loc'")["value_exact"]
                                                                         == 1).all()


def test_what_was_learned_together_is_asked_of_all(given, tmp_path):
    got = evaluate(given, Case("FT-L", FT, records(), records()[:2]), tmp_path)
    one = edits_of(given, FT, records()[:2], together=True)
    sheet = prepare(given.model, given.tok, records())
    before = read(given.model, sheet)
    with one.applied(given.model):
        want = score(sheet, before, read(given.model, sheet))
    pd.testing.assert_frame_equal(got, want, atol=1e-5)


def test_cases_are_kept_and_named_by_what_they_depend_on(given, tmp_path, monkeypatch):
    cases = [Case("a", Trial(), records()), Case("b", FT, records()), Case("c", FT, records(), records()[:1])]
    first = evaluate_all(given, cases, tmp_path)
    assert list(first["system"].unique()) == ["a", "b", "c"] and len(list(tmp_path.glob("*.parquet"))) == 3
    monkeypatch.setattr("editcore.instructedit.scores.read", None)
    again = evaluate_all(given, [replace(one, name=one.name + "!") for one in cases], tmp_path)
    pd.testing.assert_frame_equal(first.drop(columns="system"), again.drop(columns="system"))
    other = [replace(cases[1], records=records()[1:]), replace(cases[1], trial=replace(FT, seed=1)),
             replace(cases[1], trial=replace(FT, style="full")), replace(cases[1], learned=records()[1:2])]
    for one in other:
        with pytest.raises(TypeError):
            evaluate(given, one, tmp_path)


def test_an_id_tells_the_settings_that_a_trial_leaves_out(given, monkeypatch):
    written = Case("b", FT, records())
    short = replace(written, trial=replace(FT, settings=tuple(one for one in FT.settings if one[0] != "steps")))
    before = identifier(given, short)
    assert before != identifier(given, written)
    monkeypatch.setitem(EDITORS, "ft", replace(EDITORS["ft"], variant={"steps": 12}))
    assert identifier(given, short) == identifier(given, written) != before, "what they come to, not where it is from"


def test_trained_systems_bring_their_instructions(given, tmp_path):
    full = system(given, tasks=["recent", "convsent"], style="full")
    seen, unseen = Trial(system=full), Trial(system=full, number=9)
    (one,), (other,) = asked(Case("", seen, records(number=1))), asked(Case("", unseen, records(number=1)))
    assert one.prompt.startswith("Task: Recent\nDescription: ") and one.prompt != other.prompt
    assert one.locality == records()[0].locality
    free = asked(Case("", replace(seen, ask="none"), records(number=1)))
    assert free == records(number=1)
    rows = evaluate_all(given, [Case("with", seen, records()), Case("free", replace(seen, ask="none"), records())],
                        tmp_path / "tasks", tmp_path / "editors")
    assert set(rows["metric"]) == {"Rel", "Gen", "Loc"} and np.isfinite(rows["value_token"]).all()
    (about,) = (tmp_path / "editors").glob("*/train.json")
    assert json.loads(about.read_text())["examples"] == 4
    (edit,) = edits_of(given, seen, records(number=1), tmp_path / "editors")
    assert {name.split(".")[2] for name in edit.changes} == {"1", "2"} and edit.norm() > 0


def replace_seed(named, seed):
    return replace(named, system=replace(named.system, seed=seed))


def test_the_main_table_asks_the_held_out_task_unfairly_and_fairly(given):
    trained = [Named("MEND, multi-task", system(given, tasks=["recent"], style="none")),
               Named("InstructEdit", system(given, tasks=["recent"], style="full"))]
    found = table_of(trained, {"recent": records(), "zsre": records("zsre")}, settings={"ft": {"layer": 2}})
    named = {(one.name, one.records[0].task): one for one in found}
    assert len(named) == len(found)
    assert named["FT-L", "recent"].learned == () and named["CaliNet", "recent"].learned == records()
    for name in ("FT-L", "CaliNet", "GRACE"):
        assert named[name, "zsre"].learned == records(), "what it learned is the other task's"
    assert named["CaliNet, fair", "zsre"].learned == records("zsre")
    assert named["GRACE, fair", "zsre"].learned == () == named["InstructEdit", "zsre"].learned
    fair = {"FT-L, fair", "CaliNet, fair", "GRACE, fair"}
    assert {name for name, _ in named} == set(NAMES.values()) - {"KE"} | fair | {TOLD}
    told = named[TOLD, "zsre"]
    assert [one.trial.seed for one in table_of([replace_seed(trained[1], 4)], {"recent": records()})
            if one.name == TOLD] == [4], "the descriptions that InstructEdit is asked with"
    assert told.trial.system is None and told.trial.editor == "" and not told.learned
    assert "Description:" in asked(told)[0].prompt, "the control is asked behind an instruction"
    assert named["FT-L", "zsre"].trial.settings == (("layer", 2),) and named["GRACE", "zsre"].trial.settings == ()
    two = [*trained, Named("InstructEdit", system(given, tasks=["recent"], style="full", seed=3))]
    assert [one.trial.seed for one in table_of(two, {"recent": records()}) if one.name == "InstructEdit"] == [0, 3]
    assert ("FT-L, fair", "recent") not in named and named["InstructEdit", "zsre"].trial.system.style == "full"


def test_transfer_asks_every_editor_every_task(given):
    trained = [Named("", system(given, tasks=[task], style="none")) for task in ("recent", "zsre")]
    found = transfer(trained, {"recent": records(), "zsre": records("zsre")})
    assert [(one.name, one.records[0].task) for one in found] == [
        ("recent", "recent"), ("recent", "zsre"), ("zsre", "recent"), ("zsre", "zsre")]
    assert found[2].trial.system.tasks == ("zsre",)


def test_what_training_took_is_read_from_its_record(given, tmp_path):
    (row,) = costs([Named("mine", system(given, tasks=["zsre"], style="none"))], tmp_path).to_dict("records")
    assert (row["name"], row["tasks"], row["examples"], row["records"]) == ("mine", "zsre", 4, 3)
    assert row["seconds"] > 0 and row["peak_mb"] > 50 and row["parameters"] > 1000


def test_bad_trials_are_refused_before_any_work(given, tmp_path):
    with pytest.raises(ValueError, match="unknown editor 'nothing'"):
        evaluate(given, Case("x", Trial(editor="nothing"), records()), tmp_path)
    with pytest.raises(ValueError, match="x: there are no records"):
        evaluate(given, Case("x", FT, ()), tmp_path)
    both = replace(FT, system=system(given, tasks=["recent"]))
    with pytest.raises(ValueError, match="editor 'ft' and a system"):
        evaluate(given, Case("x", both, records()), tmp_path)
    assert not list(tmp_path.iterdir())
