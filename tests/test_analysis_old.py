"""Hand-made rows in; forgetting rates, phases, loss, survival and retention against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from editcore import analysis_old as analysis

HEAD = {"run": "r", "model": "m", "editor": "rome", "data": "d", "seed": 0}


def rows(*entries, **head):
    """A table of (step, fact, metric, value) entries of one run."""
    table = pd.DataFrame(entries, columns=["step", "fact", "metric", "value"])
    return table.assign(**(HEAD | head))[["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]]


@pytest.fixture
def small():
    """Four edits (c fails when made), re-tested at 2 and 4 and 6: a is lost at 4 and back at 6; b is lost at 6."""
    made = [(1, "a", "ES_exact", 1.0), (2, "b", "ES_exact", 1.0), (3, "c", "ES_exact", 0.0), (4, "d", "ES_exact", 1.0)]
    again = [(2, "a", 1), (4, "a", 0), (4, "b", 1), (4, "c", 1), (6, "a", 1), (6, "b", 0), (6, "c", 0), (6, "d", 1)]
    return rows(*made, *[(step, fact, "retest_ES_exact", float(value)) for step, fact, value in again])


def test_forgotten_by_hand(small):
    table = analysis.forgotten(small).set_index("step")
    assert list(table["edits"]) == [1, 2, 3]                        # c never succeeded, so it cannot be forgotten
    np.testing.assert_allclose(table["non_absorbing"], [0, 1 / 2, 1 / 3])
    np.testing.assert_allclose(table["absorbing"], [0, 1 / 2, 2 / 3])
    np.testing.assert_allclose(table["recovered"], [np.nan, np.nan, 1.0])    # at 6, a, seen to fail, is back


def test_absorbing_rate_falls_only_by_dilution():
    draw = np.random.default_rng(0)
    entries = [(i + 1, str(i), "ES_exact", 1.0) for i in range(40)]
    entries += [(step, str(i), "retest_ES_exact", float(draw.random() < 0.8))
                for step in range(5, 45, 5) for i in range(step - 1)]
    table = analysis.forgotten(rows(*entries))
    assert (np.diff(table["absorbing"] * table["edits"]) >= -1e-9).all()
    assert (table["absorbing"] >= table["non_absorbing"]).all() and (table["absorbing"] > table["non_absorbing"]).any()


def test_forgotten_keeps_runs_apart(small):
    other = small.assign(run="s", editor="memit", value=1.0)
    table = analysis.forgotten(pd.concat([small, other]))
    assert set(table["run"]) == {"r", "s"} and (table.loc[table["run"] == "s", "absorbing"] == 0).all()


def test_downstream_counts_margin_above_chance():
    df = rows((0, "", "sst2_f1", 1.0), (10, "", "sst2_f1", 2 / 3), (0, "", "rte_f1", 0.2), (10, "", "rte_f1", 0.9),
              (10, "", "sst2_prob_f1", 0.1), (0, "", "sst2_prob_f1", 0.9))
    table = analysis.downstream(df)
    assert set(table["task"]) == {"sst2"}                           # rte was under chance before any edit
    np.testing.assert_allclose(table["ability"], [1.0, 0.5])
    np.testing.assert_allclose(analysis.downstream(df, "prob_f1")["value"], [0.1, 0.9])


def test_edits_until_needs_a_lasting_loss():
    scores = {0: 1.0, 10: 0.9, 20: 1.0, 30: 0.9, 40: 0.85, 50: 0.2}
    df = rows(*[(step, "", "sst2_f1", value) for step, value in scores.items()])
    assert analysis.edits_until(df, 0.1)["until"].item() == 30      # 10 is made good at 20
    assert analysis.edits_until(df, 0.1, confirm=0)["until"].item() == 10
    assert analysis.edits_until(df, 0.5)["until"].item() == 50
    late = analysis.edits_until(df[df["step"] < 50], 0.5)
    assert np.isnan(late["until"].item()) and late["edits"].item() == 40


def history(lost, relative, f1=None):
    """Rows of a run whose 100 edits made at step 1 fail with the given shares, at steps 20, 40, …"""
    entries = [(1, str(i), "ES_exact", 1.0) for i in range(100)]
    for k, share in enumerate(lost, 1):
        entries += [(20 * k, str(i), "retest_ES_exact", float(i >= round(100 * share))) for i in range(100)]
    entries += [(20 * k, "W", "relative", value) for k, value in enumerate(relative, 1)]
    return rows(*entries, *[(20 * k, "", "sst2_f1", value) for k, value in enumerate(f1 or ())])


def test_phases_find_the_jump():
    table = analysis.phases(history([.01, .03, .04, .06, .80, .75], [1, 1.4, 1.7, 2.0, 9.0, 9.1]))
    assert table["collapse"].item() == 100 and table["reason"].item() == "earlier edits"
    assert (table["forgotten_before"].item(), table["forgotten_after"].item()) == (0.06, 0.80)


@pytest.mark.parametrize("lost, relative, why", [
    ([.01, .10, .19, .28, .37, .46], [1, 1.4, 1.7, 2.0, 2.2, 2.4], "a slow loss is gradual"),
    ([.01, .03, .04, .06, .80, .85], [1, 1.4, 1.7, 2.0, 2.2, 2.4], "the weights did not jump"),
    ([.01, .03, .04, .06, .07, .08], [1, 1.4, 1.7, 2.0, 9.0, 9.1], "nothing was lost"),
    ([.01, .03, .40, .06, .07, .08], [1, 1.4, 9.0, 9.1, 9.2, 9.3], "made good at the next test")])
def test_phases_without_collapse(lost, relative, why):
    table = analysis.phases(history(lost, relative))
    assert np.isnan(table["collapse"].item()), why


def test_phases_see_downstream_loss():
    df = history([.01, .02, .03, .04, .05, .06], [1, 1.4, 1.7, 2.0, 9.0, 9.1], f1=[.9, .9, .9, .88, .87, .4, .35])
    table = analysis.phases(df)
    assert table["collapse"].item() == 100 and table["reason"].item() == "few-shot tasks"


def test_rule_states_itself():
    text = str(analysis.Rule(forgotten=0.3, growth=5))
    assert "30 points" in text and "5 times" in text and "50 %" in text


def test_survival_with_censoring():
    table = pd.DataFrame({"editor": "rome", "collapse": [50, 100, np.nan, np.nan], "edits": [200, 200, 80, 200]})
    found = analysis.survival(table).set_index("step")
    np.testing.assert_allclose(found["surviving"], [1, 0.75, 0.75, 0.375, 0.375])     # 0, 50, 80 (censored), 100, 200
    assert list(found["at_risk"]) == [4, 4, 3, 2, 1]


def test_retention_and_half_life():
    entries = [(1, "a", "ES_exact", 1.0), (11, "b", "ES_exact", 1.0), (12, "c", "ES_exact", 0.0)]
    entries += [(20, "a", "retest_ES_exact", 1.0), (20, "b", "retest_ES_exact", 1.0), (20, "c", "retest_ES_exact", 1.0),
                (40, "a", "retest_ES_exact", 0.0), (40, "b", "retest_ES_exact", 1.0)]
    table = analysis.retention(rows(*entries), width=20)
    assert list(table["age"]) == [10, 30] and list(table["retained"]) == [1.0, 0.5] and list(table["n"]) == [2, 2]
    assert analysis.half_life(table) == {"r": 30.0}
    assert analysis.half_life(table[table["age"] < 20]) == {"r": np.inf}


def test_untouched_counts_only_what_was_known():
    values = {(0, "a"): 1, (0, "b"): 0, (0, "c"): 1, (20, "a"): 1, (20, "b"): 1, (20, "c"): 0}
    df = rows(*[(step, fact, "untouched_ES_exact", float(value)) for (step, fact), value in values.items()])
    assert list(analysis.untouched(df)["value"]) == [1.0, 0.5]


def test_derived_rows_join_the_table(small):
    df = pd.concat([small, rows((0, "", "sst2_f1", 0.8), (0, "", "rte_f1", 0.6), (0, "", "sst2_prob_f1", 0.9))])
    table = analysis.with_derived(df)
    assert list(table.columns) == list(df.columns) and len(table) > len(df)
    found = table[table["fact"] == ""].set_index(["metric", "step"])["value"]
    assert found[("f1", 0)] == pytest.approx(0.7)
    assert found[("forgotten_absorbing", 6)] == pytest.approx(2 / 3) and found[("recovered", 6)] == 1.0
    assert set(table["editor"]) == {"rome"}


def test_distance_has_one_row_a_parameter():
    df = rows((1, "W", "distance", 0.1), (1, "W", "relative", 0.2), (1, "V", "distance", 0.3),
              (1, "V", "relative", 0.4))
    table = analysis.distance(df)
    assert list(table["parameter"]) == ["V", "W"] and list(table["relative"]) == [0.4, 0.2]
