"""Runs that share their passes: the rows of separate runs, also after a kill and beside a run that fails."""

import dataclasses
import json

import pandas as pd
import pytest
from conftest import corpus

from editcore.editors import EDITORS, Editor, memit
from editcore.model import content_hash
from editcore.study import loop as study
from editcore.study import measure as lab

ROME, MEMIT = {"layer": 1, "steps": 4}, {"layers": [0, 2], "lambda": 5.0, "steps": 4}
CASES = {"rome": ROME, "nas": ROME | {"anchor": 2}, "memit": MEMIT, "memit-past": MEMIT,
         "emmet": MEMIT | {"layers": [1]}, "encore": MEMIT | {"ridge": 0.1, "early_stop": 1}, "rect": MEMIT,
         "alphaedit": MEMIT | {"null_space": 0.3, "lambda": 1.0}, "prune": MEMIT,
         "ft": {"epsilon": 1e-2, "lr": 5e-3, "layer": 1, "steps": 4}}


@pytest.fixture(scope="module")
def place(place):
    folder = place
    (folder / "texts.txt").write_text("\n".join(corpus() * 4))
    return folder


def runs_of(place, name, size=1, **words):
    """Three runs: two orders, and another seed, whose context templates are its own."""
    return [study.make(model=str(place), editor=name, settings=CASES[name], n_edits=5, batch_size=size, retest_every=2,
                       downstream_every=2, untouched=3, checkpoint_every=1, order=order, seed=seed, **words)
            for order, seed in ((0, 0), (1, 0), (0, 3))]


def rows_of(folder):
    return pd.read_parquet(folder / "rows.parquet")


def same(a, b, tolerance=2e-4):
    keys = ["step", "fact", "metric"]
    a, b = (rows_of(one).sort_values(keys).reset_index(drop=True) for one in (a, b))
    assert a["run"].iloc[0] == b["run"].iloc[0]
    pd.testing.assert_frame_equal(a[keys], b[keys])
    exact = a["metric"].str.contains("evaluations")
    assert (a["value"][exact] == b["value"][exact]).all()
    pd.testing.assert_series_equal(a["value"], b["value"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_rows_equal_those_of_separate_runs(place, tmp_path, name, size):
    several = runs_of(place, name, size)
    together = study.execute_together(several, tmp_path / "together")
    for run, folder in zip(several, together, strict=True):
        same(folder, study.execute(run, tmp_path / "apart"), 5e-3 if name == "ft" else 2e-4)
    assert len({rows_of(folder)["value"].sum() for folder in together}) == 3
    assert json.loads((together[0] / "run.json").read_text())["together"] == 3


@pytest.mark.parametrize("name", ["memit-past", "rome"])
def test_killed_runs_go_on_from_where_each_was(monkeypatch, place, tmp_path, name):
    several, calls, real = runs_of(place, name), [], lab.update_together
    whole = study.execute_together(several, tmp_path / "whole")

    def update(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(lab, "update_together", update)
        with pytest.raises(KeyboardInterrupt):
            study.execute_together(several, tmp_path / "broken")
    alone = study.execute(several[1], tmp_path / "broken")      # one of them ends by itself
    broken = study.execute_together(several, tmp_path / "broken")
    assert broken[1] == alone
    for a, b in zip(whole, broken, strict=True):
        same(a, b)


def test_a_run_that_remembers_keys_is_taken_up_exactly(monkeypatch, place, tmp_path):
    run, calls, real = runs_of(place, "memit-past", 2)[0], [], lab.update
    whole = study.execute(run, tmp_path / "whole")

    def update(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(lab, "update", update)
        with pytest.raises(KeyboardInterrupt):
            study.execute(run, tmp_path / "broken")
    pd.testing.assert_frame_equal(rows_of(whole), rows_of(study.execute(run, tmp_path / "broken")), check_exact=True)


def test_one_that_fails_leaves_the_others(monkeypatch, place, tmp_path):
    several, real = runs_of(place, "memit"), memit.edit_groups
    whole = study.execute_together(several, tmp_path / "whole")
    first = rows_of(whole[1]).query("metric == 'ES' and step == 3")["fact"].item()

    def edit_groups(model, tok, groups, config, *, prepared, current=None):
        if any(str(fact.case_id) == first for group in groups for fact in group) and len(prepared[0].contexts) == 6:
            failing.append(1)
            raise ValueError(f"record {first}: made to fail")
        return real(model, tok, groups, config, prepared=prepared, current=current)

    failing = []
    monkeypatch.setattr(memit, "edit_groups", edit_groups)
    folders = study.execute_together(several, tmp_path / "failing", keep_going=True)
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert records[1]["status"] == "stopped" and records[1]["edits"] == 2 and "made to fail" in records[1]["stopped"]
    assert failing
    for a, b, record in zip(whole, folders, records, strict=True):
        if record["status"] == "finished":
            same(a, b)
    with pytest.raises(ValueError, match=f"edit 3 .record {first}.: record {first}: made to fail; the rows of the 2"):
        study.execute_together(several, tmp_path / "again")


def test_groups_share_what_can_be_shared(place, monkeypatch):
    rome, memit = runs_of(place, "rome"), runs_of(place, "memit")
    assert study.groups(rome + memit) == [rome, memit]
    assert study.groups(rome + rome + memit, most=2) == [rome[:2], rome[2:], memit[:2], memit[2:]]
    assert study.groups(rome, workers=2) == [rome[:2], rome[2:]]
    other = dataclasses.replace(rome[0], n_edits=4)
    assert study.groups([rome[0], other]) == [[rome[0]], [other]]
    monkeypatch.setitem(EDITORS, "own", Editor("editcore.editors.rome"))
    own = [dataclasses.replace(run, editor="own") for run in rome]
    assert study.groups(own) == [[run] for run in own]      # it may draw random numbers
    with pytest.raises(ValueError, match="may differ in order, seed, leave_out only"):
        study.execute_together([rome[0], other])


def test_execute_all_gives_the_folders_in_order(place, tmp_path):
    several = [*runs_of(place, "rome")[:2], *runs_of(place, "memit")[:1], runs_of(place, "rome")[2]]
    folders = study.execute_all([*several, several[0]], tmp_path)
    assert [json.loads((folder / "run.json").read_text())["parameters"]["editor"] for folder in folders] == \
        ["rome", "rome", "memit", "rome", "rome"]
    assert folders[0] == folders[4] and len(set(folders)) == 4


def test_the_shared_model_is_left_to_nobody(place, tmp_path, monkeypatch):
    """The labs share one model and one unedited copy; after the runs the unedited weights are still known."""
    seen, real = [], lab.set_up
    monkeypatch.setattr(lab, "set_up", lambda *given: seen.append(real(*given)) or seen[-1])
    study.execute_together(runs_of(place, "memit"), tmp_path)
    assert len({id(one.model) for one in seen}) == 1 and len({id(one.original) for one in seen}) == 1
    lab.put(seen[0], type("Nothing", (), {"changes": {}})())
    assert content_hash(seen[0].model) == seen[0].weights_hash
