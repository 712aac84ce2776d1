"""Signals, events to come, lead times and false alarms on series made by hand."""

import numpy as np
import pandas as pd
import pytest

from editcore import alarms

RULE = alarms.Rule(ahead=10, loss=0.05, window=4, least=3)


def rows(updates, known, run="r", direction="apart", losses=None):
    """Rows of a run: norms of the updates (orthogonal, or all one way), shares of 100 never-edited facts right at
    {step: share}, and losses."""
    updates = np.asarray(updates, dtype=float)
    totals = np.sqrt(np.cumsum(updates ** 2)) if direction == "apart" else np.cumsum(updates)
    entries = [(i + 1, "W", name, value) for i, pair in enumerate(zip(updates, totals / 5, totals / 50))
               for name, value in zip(("update", "relative", "distance"), pair)]
    entries += [(step, str(i), "untouched_ES_exact", float(i < round(100 * share)))
                for step, share in known.items() for i in range(100)]
    entries += [(i + 1, str(i), "edit_losses", value) for i, value in enumerate(losses if losses is not None else [])]
    table = pd.DataFrame(entries, columns=["step", "fact", "metric", "value"])
    return table.assign(run=run, model="m", editor="rome", data="d", seed=0)


def test_signals_by_hand():
    found = alarms.signals(rows([1, 2, 3, 8, 1, 1], {0: 1}, losses=[.1, .1, .1, .4, .1, .1]), RULE)
    assert list(found["update"].round(6))[3:] == pytest.approx([8 / 2, 1 / 2.5, 1 / 2])     # medians 2, 2.5, 2
    assert found["update"].isna().sum() == 3 and list(found["edits"]) == [1, 2, 3, 4, 5, 6]
    assert found["loss"][4] == pytest.approx(4) and "value" not in found and "spectral" not in found
    assert found["drift"].dropna().to_numpy() == pytest.approx(1)       # orthogonal updates are a random walk


def test_a_straight_walk_has_exponent_one_and_grows_too_fast():
    found = alarms.signals(rows(np.ones(30), {0: 1}, direction="straight"), RULE)
    assert found["exponent"].dropna().to_numpy() == pytest.approx(1)
    assert found["drift"][30] == pytest.approx((30 ** 2 - 26 ** 2) / 4)
    calm = alarms.signals(rows(np.ones(30), {0: 1}), RULE)
    assert calm["exponent"].dropna().to_numpy() == pytest.approx(0.5)


def test_the_margin_of_facts_about_to_be_edited_is_a_signal():
    df = rows(np.ones(8), {0: 1})
    margins = pd.DataFrame({"step": np.arange(1, 9), "fact": "1", "metric": "before_ES_prob",
                            "value": [-.9, -.9, -.9, -.9, -.9, -.5, -.5, -.5]})
    found = alarms.signals(pd.concat([df, margins.assign(run="r", model="m", editor="rome", data="d", seed=0)]), RULE)
    assert found["before"][4] == 0 and found["before"][8] == pytest.approx(0.3)


def test_what_lies_ahead_by_hand():
    known = {0: 1.0, 10: 0.98, 20: 0.97, 30: 0.90, 40: 0.90}
    found = alarms.ahead(rows(np.ones(40), known), np.nan, RULE)
    assert list(found.index[found["untouched"] == 1]) == list(range(20, 30))    # only then both tests are within reach
    assert (found["untouched"][:19] == 0).all() and found["untouched"][31:].isna().all()
    assert found["collapse"][:30].eq(0).all() and found["collapse"][30:].isna().all()
    assert alarms.onsets(found["untouched"]) == [30]


def test_ahead_of_a_collapse():
    found = alarms.ahead(rows(np.ones(40), {0: 1.0, 20: 1.0, 40: 1.0}), 25.0, RULE)
    assert list(found.index[found["collapse"] == 1]) == list(range(15, 25))
    assert found["collapse"][:14].eq(0).all() and found["collapse"][24:].isna().all()
    assert found["untouched"][24:].isna().all() and alarms.onsets(found["collapse"]) == [25]


def test_the_fastest_losses_are_those_of_the_run_itself():
    margins = pd.DataFrame([(step, "a", "untouched_ES_prob", value) for step, value in
                            zip(range(0, 70, 10), (.99, .98, .97, .90, .89, .89, .88))],
                           columns=["step", "fact", "metric", "value"])
    df = pd.concat([rows(np.ones(60), {0: 1.0}), margins.assign(run="r", model="m", editor="rome", data="d", seed=0)])
    found = alarms.ahead(df, np.nan, RULE)["fastest"]
    assert list(found.index[found == 1]) == list(range(20, 30)) and found[50:].isna().all()
    assert found[:19].eq(0).all()


def test_scores_count_leads_and_false_alarms():
    updates = np.ones(40)
    updates[[5, 16, 21]] = 9.0      # edits 6 (false), 17 and 22 (within ten edits of the collapse at 25)
    df = pd.concat([rows(updates, {0: 1.0}, run=run) for run in ("a", "b")])
    phases = pd.DataFrame({"run": ["a", "b"], "collapse": [25.0, np.nan]})
    table = alarms.watch(df, phases, RULE)
    found = alarms.scores(table, RULE).set_index(["event", "signal"])
    one = found.loc[("collapse", "update")]
    assert (one["onsets"], one["caught"], one["lead"], one["runs"]) == (1, 1, 8, 2) and one["few"]
    quiet = table[(table["collapse"] == 0) & table["update"].notna()]
    assert one["false"] == pytest.approx(100 * (quiet["update"] >= 3).mean()) and one["false"] > 0
    assert found.loc[("collapse", "drift"), "caught"] == 0 and np.isnan(found.loc[("collapse", "drift"), "lead"])
    part = table[(table["run"] == "a")].dropna(subset=["collapse", "update"])
    high, low = (part.loc[part["collapse"] == value, "update"].to_numpy() for value in (1, 0))
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    assert one["auc"] == pytest.approx(wins)
    assert np.isnan(found.loc[("untouched", "update"), "auc"])          # nothing was ever tested again


def test_rule_states_itself():
    text = str(alarms.Rule(ahead=33, loss=0.07))
    assert "33 edits" in text and "7 points" in text and "3" in text
