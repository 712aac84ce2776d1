"""Jumps of made-up runs: what is foretold is scored as it was put in, rankings agree with scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from editcore import jumps, look

DENOMINATORS = {3: 4.0, 7: -2.0, 12: 9.0, 15: 19.0}       # of the facts that are not 20; 20 for all others
OPENERS = (3, 7, 12)
LARGE = {3: 6.0, 7: 12.0, 15: 3.5}      # updates, in medians: 3 and 7 were foretold, 12 did not come, 15 is a surprise


@pytest.fixture
def table():
    """`disabling.denominators` of twenty facts."""
    size = pd.Series([DENOMINATORS.get(i, 20.0) for i in range(1, 21)])
    every = range(1, 21)
    return pd.DataFrame({"case_id": [f"f{i}" for i in every], "subject": [f"Subject {i}" for i in every],
                         "prompt": "{} is", "relation": "P1", "position": 0, "opener": [i in OPENERS for i in every],
                         "denominator": size, "denominator_r": 20.0, "denominator_p": 20.0, "plain_norm": 1.0,
                         "mean_norm": 1.0, "cosine": 1.0, "relative": size / 20, "expected": 20 / size.abs()})


def rows(run="a", editor="ROME", method="rome", large=LARGE, end=20, every=5):
    """One run: edit i of fact f{i}; every 5 edits all earlier ones and 50 others are asked. After edit 7, of the three
    edits that had stood since they were made and are asked again at 10, f1 fails; 10 of the 50 others fail then."""
    known, out = {"run": run, "model": "m", "editor": editor, "data": "d", "seed": 0, "method": method}, []

    def add(step, fact, metric, value):
        out.append(known | {"step": step, "fact": fact, "metric": metric, "value": float(value)})

    for step in range(0, end + 1):
        if step:
            add(step, f"f{step}", "ES_exact", step != 2)
            add(step, f"f{step}", "edit_losses", 0.04)
            add(step, "layer.weight", "update", 2.0 * large.get(step, 1.0))
            add(step, "layer.weight", "relative", 0.01 * step)
            add(step, "layer.bias", "update", 99.0)
        if step % every == 0:
            for i in range(1, step):
                add(step, f"f{i}", "retest_ES_exact", i != 2 and not (i == 1 and step >= 10))
            for i in range(50):
                add(step, f"u{i}", "untouched_ES_exact", not (i < 10 and step >= 10))
    return pd.DataFrame(out)


@pytest.fixture
def made(table):
    df = rows()
    phases = pd.DataFrame({"run": ["a"], "collapse": [np.nan]})
    return jumps.happened(jumps.updates(df, table), df, phases)


def test_updates_stand_beside_what_was_foretold(table):
    df = pd.concat([rows(), rows("b", "p-ROME", "p-rome", {})])
    made = jumps.updates(df, table).set_index(["editor", "step"])
    rome, p_rome = made.loc["ROME"], made.loc["p-ROME"]
    assert rome["ratio"].to_dict() == {i: LARGE.get(i, 1.0) for i in range(1, 21)}
    assert rome.loc[7, ["own", "shrink", "expected", "foretold"]].tolist() == [-2.0, 10.0, 10.0, 10.0]
    assert p_rome.loc[7, ["own", "shrink", "expected", "foretold"]].tolist() == [20.0, 1.0, 1.0, 10.0]
    assert list(rome.index[rome["told"]]) == list(p_rome.index[p_rome["told"]]) == [3, 7, 12]
    assert rome["method"].unique() == ["rome"] and rome.loc[7, "subject"] == "Subject 7"
    named = jumps.updates(rows().drop(columns="method").assign(editor="rome"), table)   # without a column method
    assert set(named["method"]) == set(named["editor"]) == {"rome"}


def test_what_cannot_be_told_is_one_error(table):
    with pytest.raises(ValueError, match="memit divides by no denominator"):
        jumps.updates(rows(method="memit"), table)
    with pytest.raises(ValueError, match="record f20 was edited, but its denominator was not tabulated"):
        jumps.updates(rows(), table[:19])
    twice = pd.concat([rows(), rows().query("metric == 'edit_losses' and step == 4").assign(fact="f99")])
    with pytest.raises(ValueError, match="one fact an update"):
        jumps.updates(twice, table)


def test_losses_are_of_what_was_right_when_last_asked(table):
    found = jumps.intervals(jumps.updates(rows(), table), rows()).set_index(["kind", "step"])
    edits, others = found.loc["earlier edits"], found.loc["never edited"]
    assert edits["n"].tolist() == [3, 8, 12, 17]        # f2 never was right, f1 is not from step 10 on
    assert edits["lost"].tolist() == [0, pytest.approx(1 / 8), 0, 0]
    assert others["lost"].tolist() == [0, 0.2, 0, 0] and others["n"].tolist() == [50, 50, 40, 40]
    assert edits["largest"].tolist() == [6.0, 12.0, 3.5, 1.0] and edits["fact"].tolist() == ["f3", "f7", "f15", "f16"]
    assert edits["start"].tolist() == [0, 5, 10, 15] and edits["jumps"].tolist() == [1, 1, 0, 0]


def test_a_disabling_edit_jumps_leads_its_interval_and_costs(made, table):
    one = made.set_index("step")
    assert list(one.index[one["jump_3"]]) == [3, 7, 15] and list(one.index[one["jump_5"]]) == [3, 7]
    assert list(one.index[one["disabling"]]) == [7] and one.loc[7, "lost"] == 0.2     # 1 of 8 edits is too few to say
    df = rows()
    broken = jumps.happened(jumps.updates(df, table), df, pd.DataFrame({"run": ["a"], "collapse": [5.0]}))
    assert list(broken.loc[broken["disabling"], "step"]) == [3, 7] and broken["broke"].sum() == 1
    strict = jumps.happened(jumps.updates(df, table), df, loss=0.3)
    assert not strict["disabling"].any()


def test_scores_are_counted_by_hand_and_pooled_over_runs(made, table):
    found = jumps.score(made, jumps.rules(), "jump_3").set_index(["rule", "run"])
    opens, under, expected = jumps.rules()
    for run in ("", "a"):
        row = found.loc[(opens.says, run)]
        assert row[["edits", "predicted", "happened", "hits"]].tolist() == [20, 3, 3, 2]
        assert row["precision"] == row["recall"] == pytest.approx(2 / 3)
    assert found.loc[(under.says, ""), "predicted"] == 3 and found.loc[(expected.says, ""), "predicted"] == 2
    assert found.loc[(expected.says, ""), ["precision", "recall"]].tolist() == [1, pytest.approx(2 / 3)]
    below, above = look.share_interval(np.array([2 / 3]), 3)
    row = found.loc[(opens.says, "")]
    assert row["precision_low"] == pytest.approx(2 / 3 - below[0], abs=1e-4)
    assert row["recall_high"] == pytest.approx(2 / 3 + above[0], abs=1e-4)
    other = jumps.updates(rows("b", large={}), table)
    both = pd.concat([made, other.assign(jump_3=False)])
    pooled = jumps.score(both, jumps.rules()[:1], "jump_3").set_index("run")
    assert pooled.loc["", ["predicted", "happened", "hits"]].tolist() == [6, 3, 2] and len(pooled) == 3
    assert np.isnan(pooled.loc["b", "recall"]) and pooled.loc["b", "precision"] == 0


def test_ranking_agrees_with_scikit_learn():
    random = np.random.default_rng(3)
    for levels in (4, 1000):
        values, hits = random.integers(0, levels, 200).astype(float), random.random(200) < 0.15
        area, precision = jumps.ranking(values, hits)
        assert area == pytest.approx(roc_auc_score(hits, values))
        assert precision == pytest.approx(average_precision_score(hits, values))
    assert np.isnan(jumps.ranking([1, 2], [False, False])).all()
    assert jumps.ranking([1, 2, 3], [False, False, True]) == (1.0, 1.0)


def test_slope_and_counts(made):
    exact = made.assign(update=3.0 / made["own"].abs())
    assert jumps.slope(exact) == pytest.approx((1.0, 1.0))
    counts = jumps.counts(made).loc["ROME"]
    assert counts.to_dict() == {"runs": 1, "edits": 20, "openers": 3, "jumps_3": 3, "openers_3": 2, "jumps_5": 2,
                                "openers_5": 2, "largest": 12.0, "disabling": 1}


def test_success_leap_and_words(made, table):
    df = rows()
    found = jumps.success(made, df, ("ES_exact",)).loc["ROME"]
    assert found["ES_exact", "openers"] == 100 and found["ES_exact", "others"] == pytest.approx(100 * 16 / 17)
    assert jumps.price(made, df) == "Openers right just after their edit (every token): ROME 100 %"
    assert jumps.price(made[made["opener"] < 1], df).endswith("none edited")
    leap = jumps.leap(made, df)
    assert leap["subject"] == "Subject 7" and leap["step"] == 7 and leap["ratio"] == 12
    assert (leap["before"], leap["after"]) == pytest.approx((0.06, 0.07))
    first = jumps.leap(made[made["step"] == 1], df)
    assert (first["before"], first["after"]) == pytest.approx((0, 0.01))
    assert jumps.said(jumps.counts(made)) == "ROME: 3 of 20 updates, 2 of them openers, the largest 12.0"
    pooled = {"jump_3": jumps.score(made, jumps.rules(), "jump_3").query("run == ''")}
    lines = jumps.summary(table, made, pooled, "m").splitlines()
    assert "3 of 20" in lines[0] and "2 of 3" in lines[1]
    assert lines[2].startswith("- 1 edit of 20 in 1 run disables") and len(lines) <= 4
