"""Plans list the runs that were planned before, and say what has become of them."""

import dataclasses
import json

import pandas as pd
import pytest

from editcore.study import loop, measure, plans, results
from editcore.study.run import Run, make_run, run_id


@pytest.fixture
def quick(place):
    """Parameters of quick runs of two edits on a tiny model."""
    return {"model": str(place), "n_edits": 2, "items": 2, "untouched": 2, "downstream_every": 0,
            "settings": {"rome": {"layer": 1, "steps": 2}}, "final": ("ES",)}


def test_ids_of_published_plans_stay():
    ids = {name: [run_id(run, {})[:-9] for run in plan()] for name, plan in plans.PLANS.items()}
    assert ids["orders"][:3] == ["rome-738f3246", "rome-26c146fb", ids["methods"][10]]
    assert ids["methods"][2:5] == ["r-rome-2d3e02d8", "r-rome-0a0feff0", "p-rome-1e0db6d0"]
    assert {name: len(runs) for name, runs in ids.items()} == {
        "orders": 6, "methods": 24, "conventions": 6, "batches": 8, "lambdas": 5, "layers": 7,
        "tokens": 6}


def test_plans_share_their_runs():
    orders = set(plans.orders())
    assert orders <= set(plans.methods()) and set(plans.conventions()) <= set(plans.methods())
    for name in ("lambdas", "layers", "tokens", "batches"):
        assert set(plans.methods()) & set(plans.PLANS[name]()), name
    assert all(run.final and run.n_edits == 120 for run in orders)


def test_options_and_settings_reach_the_runs():
    settings = {"rome": {"layer": 1, "steps": 40}, "memit": {"lambda": 2.0}}
    runs = plans.orders("pocket", ["rome", "memit"], orders=[3], settings=settings, n_edits=9,
                        seed=4)
    assert [run.editor for run in runs] == ["rome", "memit"]
    assert all((run.order, run.n_edits, run.seed) == (3, 9, 4) for run in runs)
    assert runs[0].settings == (("layer", 1),)      # 40 steps are the published ones
    assert runs[1].settings == (("lambda_", 2.0),)
    factors = plans.lambdas(settings=settings, factors=(1, 10))
    assert [dict(run.settings)["lambda_"] for run in factors] == [2.0, 20.0]
    sizes = plans.batches(editors=["memit"], sizes=(1, 4), n_edits=4)
    assert [run.batch_size for run in sizes] == [1, 4]
    with pytest.raises(ValueError, match="unknown parameter 'n_edit'"):
        plans.orders(n_edit=5)
    with pytest.raises(ValueError, match="rome has no setting 'leyer'"):
        plans.orders(settings={"rome": {"leyer": 5}})


def test_status_says_what_is_there(quick, tmp_path):
    runs = plans.orders(editors=["rome"], orders=(0, 1, 2), **quick)
    assert list(plans.status(runs, tmp_path)["status"]) == ["missing"] * 3
    folder = loop.execute(runs[1], tmp_path)
    begun = tmp_path / plans.status(runs, tmp_path)["run"][2] / "checkpoint"
    begun.mkdir(parents=True)
    (begun / "checkpoint.json").write_text("{}")
    table = plans.status([*runs, runs[0]], tmp_path)
    assert list(table["status"]) == ["missing", "finished", "begun"]
    assert table["run"][1] == folder.name and list(table["order"]) == [0, 1, 2]


# ── tables of what runs left ────────────────────────────────────────────────────────────────────

@pytest.fixture
def folders(quick, tmp_path):
    """Three finished runs of two edits; the last of other settings."""
    runs = plans.orders(editors=["rome"], **quick)
    other = dataclasses.replace(runs[0], seed=1, batch_size=2,
                                settings=(("layer", 2), ("steps", 2)))
    return loop.execute_all([*runs, other], tmp_path)


def test_tables_choose_runs(folders, tmp_path):
    assert results.table(tmp_path)["run"].nunique() == 3
    assert set(results.table(tmp_path, seed=1)["seed"]) == {1}
    assert results.table(tmp_path, order=[1], seed=0)["run"].unique() == [folders[1].name]
    assert results.table(tmp_path, seed=9).empty and results.table(tmp_path / "none").empty
    with pytest.raises(ValueError, match="no 'sede' to choose by"):
        results.table(tmp_path, sede=1)


def test_tables_of_folders(folders):
    made = results.runs(folders[1:])
    assert list(made["run"]) == [folder.name for folder in folders[1:]]
    assert list(made["layer"]) == [1, 2] and list(made["steps"]) == [2, 2]      # the editor's
    assert list(made["status"]) == ["finished"] * 2 and made["seconds_per_edit"].gt(0).all()
    table = results.table([folders[2], folders[0], folders[0]])
    assert list(table["run"].unique()) == [folders[2].name, folders[0].name]
    assert list(table.columns) == ["run", "model", "editor", "data", "seed", "order", "batch_size",
                                   "settings", "step", "fact", "metric", "value"]
    assert list(table["settings"].unique()) == ["layer=2, steps=2", "layer=1, steps=2"]
    rows = pd.read_parquet(folders[0] / "rows.parquet")
    pd.testing.assert_frame_equal(table[table["run"] == folders[0].name][results.COLUMNS]
                                  .reset_index(drop=True), rows, check_exact=True)
    assert len(results.cases(folders)) == 6


def test_published_runs_are_one_per_editor_order_and_schedule(tmp_path):
    for editor, order, n_edits, insert in [
            ("rome", 0, 10, []), ("rome", 0, 5, []), ("rome", 0, 20, []), ("rome", 1, 10, []),
            ("rome", 1, 5, []), ("rome", 0, 4, [[2, "7"]]), ("ft", 0, 5, []), ("ft", 1, 10, [])]:
        name = f"{editor}-{order}-{n_edits}"
        parameters = {"editor": editor, "order": order, "n_edits": n_edits, "insert": insert}
        record = {"run": name, "status": "finished", "parameters": parameters}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    rome = [tmp_path / name for name in ("rome-0-10", "rome-0-4", "rome-1-10")]
    others = [tmp_path / "ft-0-5", tmp_path / "ft-1-10"]        # no length that both orders have
    assert results.published(tmp_path) == others + rome
    assert results.published(tmp_path, longest=True, editor="rome") == [
        tmp_path / "rome-0-20", rome[1], rome[2]]
    assert results.published(tmp_path, put_in=True) == rome[1:2]
    assert results.published(tmp_path, put_in=False, order=[0]) == [others[0],
                                                                   tmp_path / "rome-0-20"]
    assert results.published("") == [] == results.published(tmp_path / "none", editor="ft")


def test_runs_of_before_have_the_parameters_of_today(folders):
    path = folders[0] / "run.json"
    record = json.loads(path.read_text())
    del record["parameters"]["answers"]
    path.write_text(json.dumps(record))
    (folders[0] / "cases.parquet").unlink()
    assert list(results.runs(folders[:1])["answers"]) == [Run().answers]
    assert len(results.cases(folders)) == 4


def test_tables_name_a_damaged_file(folders, tmp_path):
    (folders[0] / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{folders[0].name}/rows.parquet: missing or damaged"):
        results.table(tmp_path)
    (folders[0] / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json: not valid JSON"):
        results.table(tmp_path)


def test_defaults_make_the_default_run():
    assert make_run() == Run()


@pytest.fixture
def real(place, monkeypatch):
    """Parameters of `plans.real` on a tiny model that is taken to know every fact but number 0."""
    monkeypatch.setattr(measure, "known", lambda *_: [False] + [True] * 11)
    settings = {name: {"layer": 1, "steps": 2} for name in ("rome", "r-rome")}
    return {"model": str(place), "editors": ["rome", "r-rome"], "orders": (0, 1), "n_edits": 4,
            "settings": settings, "n_long": 6, "n_longest": 7, "places": (2, 4, 9), "untouched": 2,
            "generation": 0}


def test_real_runs_place_predicted_edits(real):
    runs = plans.real(disabling=("3", "4", "5"), long=("rome",), placed=("r-rome",), **real)
    assert [(run.editor, run.order, run.n_edits, len(run.insert)) for run in runs] == [
        ("r-rome", 0, 4, 2), ("r-rome", 1, 4, 2), ("rome", 0, 6, 0), ("rome", 1, 6, 0),
        ("r-rome", 0, 4, 0), ("r-rome", 1, 4, 0), ("rome", 0, 7, 0)]
    assert all(run.known and set(run.leave_out) == {"3", "4", "5"} for run in runs)
    assert [place for place, _ in runs[0].insert] == [2, 4]
    assert {case for _, case in runs[0].insert} < {"3", "4", "5"}
    assert runs[0].retest_every < runs[4].retest_every
    assert len(set(loop.groups(runs)[0])) == 2      # orders of an editor share their passes
    once = plans.real(disabling=("3",), long=("rome",), placed=(), once=("r-rome",), **real)
    assert [(run.editor, run.order, run.n_edits) for run in once[-2:]] == [
        ("r-rome", 0, 6), ("rome", 0, 7)]
    few = plans.real(disabling=("3",), long=(), placed=("rome",), **real)
    assert few[0].insert == ((2, "3"),)


def test_real_runs_ask_the_model_once_for_its_predicted_edits(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = plans.plan_run(real["model"], "rome", known=True, settings=real["settings"])
    table = measure.denominators(run, out_dir=tmp_path)
    assert "0" not in set(table["case_id"]) and len(table) == 11
    least = table["expected"].median()
    cases = measure.predicted(run, least=least, out_dir=tmp_path)
    assert cases == list(table.loc[table["expected"] >= least, "case_id"]) and len(cases) > 1
    monkeypatch.setattr(measure, "denominators", None)
    assert measure.predicted(run, least=least, out_dir=tmp_path) == cases
    monkeypatch.setattr(measure, "predicted", lambda run: ["7"] if run.known else None)
    runs = plans.real(**real)
    assert {run.leave_out for run in runs} == {("7",)}
    folders = loop.execute_all(runs[:1], tmp_path)
    assert results.runs(folders)["known_facts"].tolist() == [11]
