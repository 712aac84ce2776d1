"""Forgetting in depth against numbers worked out by hand, published survival tables and brute force."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from editcore import depth
from editcore.editors import configure
from editcore.study import run as inputs


def rows(*entries, run="r", editor="rome", seed=0):
    """A table of (step, fact, metric, value) entries of one run."""
    table = pd.DataFrame(entries, columns=["step", "fact", "metric", "value"])
    return table.assign(run=run, model="m", editor=editor, data="d", seed=seed)


@pytest.fixture
def small():
    """Four edits (c fails when made), re-tested at 2, 4 and 6: a is lost at 4 and back at 6; b is lost at 6."""
    made = [(1, "a", "ES_exact", 1.0), (2, "b", "ES_exact", 1.0), (3, "c", "ES_exact", 0.0), (4, "d", "ES_exact", 1.0)]
    again = [(2, "a", 1), (4, "a", 0), (4, "b", 1), (4, "c", 1), (6, "a", 1), (6, "b", 0), (6, "c", 0), (6, "d", 1)]
    return rows(*made, *[(step, fact, "retest_ES_exact", float(value)) for step, fact, value in again])


def test_t_interval_is_students():
    values = [1.0, 2.0, 4.0, 5.0, np.nan]
    mean, low, high = depth.t_interval(values)
    found = stats.ttest_1samp(values[:4], 0).confidence_interval(0.95)
    assert (mean, low, high) == (3.0, pytest.approx(found.low), pytest.approx(found.high))
    assert depth.t_interval([2.0])[0] == 2.0 and np.isnan(depth.t_interval([2.0])[1])
    assert np.isnan(depth.t_interval([])).all()


def test_matrix_by_hand(small):
    table = depth.matrix(small, width=2).set_index(["made", "tested"])
    assert dict(table["retained"]) == {(0, 2): 1.0, (0, 4): 0.5, (0, 6): 0.5, (2, 6): 1.0}  # c never succeeded
    assert dict(table["n"]) == {(0, 2): 1, (0, 4): 2, (0, 6): 2, (2, 6): 1}


def test_matrix_averages_runs(small):
    other = small.assign(run="s", value=1.0)
    table = depth.matrix(pd.concat([small, other]), width=2).set_index(["made", "tested"])
    assert table.loc[(0, 6), "retained"] == pytest.approx(0.75) and table.loc[(0, 6), "runs"] == 2


def test_retention_by_age_has_the_interval_over_runs(small):
    other = small.assign(run="s", value=1.0)
    one = depth.by_age(small, width=2)
    assert one[["low", "high"]].isna().all(axis=None)
    both = depth.by_age(pd.concat([small, other]), width=2)
    merged = both.merge(one, on="age", suffixes=("", "_one"))
    np.testing.assert_allclose(merged["retained"], (merged["retained_one"] + 1) / 2)
    assert (both["low"] >= 0).all() and (both["high"] <= 1).all()


def test_fading_is_the_likeliest_rate():
    draw = np.random.default_rng(0)
    ages = draw.integers(1, 300, 4000)
    kept = draw.random(4000) < np.exp(-0.01 * ages)
    rate = depth.fading(ages, kept)
    grid = np.linspace(0.005, 0.02, 3001)
    likelihood = [(-one * ages[kept]).sum() + np.log(-np.expm1(-one * ages[~kept])).sum() for one in grid]
    assert rate == pytest.approx(grid[np.argmax(likelihood)], abs=1e-5) and rate == pytest.approx(0.01, rel=0.1)
    assert depth.fading([10, 20], [1, 1]) == 0 and depth.fading([10, 20], [0, 0]) == np.inf
    assert np.isnan(depth.fading([], []))


def test_half_lives_say_whether_they_were_seen(small):
    table = depth.half_lives(small, width=2).iloc[0]
    assert (table["runs"], table["reached"], table["oldest"]) == (1, 1, 5)
    ages, kept = [1, 3, 2, 5, 4, 2], [1, 0, 1, 1, 0, 1]
    assert table["rate"] == pytest.approx(depth.fading(ages, kept))
    assert table["half"] == pytest.approx(np.log(2) / table["rate"]) and np.isnan(table["half_low"])
    safe = depth.half_lives(small.assign(value=1.0), width=2).iloc[0]
    assert safe["rate"] == 0 and safe["half"] == np.inf and safe["observed"] == np.inf and safe["misfit"] == 0


def test_lifetimes_by_hand(small):
    table = depth.lifetimes(small).set_index("fact")
    assert set(table.index) == {"a", "b", "d"}
    assert dict(table["failed"].dropna()) == {"a": 3, "b": 4} and dict(table["edits"]) == {"a": 5, "b": 4, "d": 2}


# 6-mercaptopurine arm of Freireich and others (1963); survival and log(-log) bounds as in textbooks
FAILED = [6, 6, 6, 7, 10, 13, 16, 22, 23]
CENSORED = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
PUBLISHED = {6: (0.857, 0.620, 0.952), 7: (0.807, 0.563, 0.923), 10: (0.753, 0.503, 0.889), 13: (0.690, 0.432, 0.849),
             16: (0.627, 0.368, 0.805), 22: (0.538, 0.268, 0.747), 23: (0.448, 0.188, 0.680)}


def test_survival_bounds_are_those_of_a_published_example():
    table = pd.DataFrame({"editor": "rome", "collapse": FAILED + [np.nan] * 12, "edits": FAILED + CENSORED})
    found = depth.survival(table, "collapse").set_index("step")
    for step, expected in PUBLISHED.items():
        assert tuple(found.loc[step, ["surviving", "low", "high"]]) == pytest.approx(expected, abs=1e-3)


def test_survival_without_events_and_without_survivors():
    none = pd.DataFrame({"editor": "rome", "until": [np.nan] * 5, "edits": 100})
    found = depth.survival(none, "until").iloc[-1]
    assert (found["surviving"], found["high"], found["low"]) == (1, 1, pytest.approx(0.025 ** 0.2))
    every = pd.DataFrame({"editor": "rome", "until": [10, 20, 30], "edits": 100})
    found = depth.survival(every, "until").iloc[-1]
    assert (found["surviving"], found["low"]) == (0, 0) and found["high"] == pytest.approx(1 - 0.025 ** (1 / 3))
    assert depth.survival(none.iloc[:0], "until").empty


def test_edit_survival_is_the_mean_of_the_runs_curves():
    table = pd.DataFrame([("a", 10, 40), ("a", np.nan, 40), ("b", np.nan, 40), ("b", 30, 40)],
                         columns=["run", "failed", "edits"]).assign(editor="rome")
    found = depth.edit_survival(table, [0, 10, 29, 30]).set_index("step")
    np.testing.assert_allclose(found["surviving"], [1, 0.75, 0.75, 0.5])
    assert list(found["runs"]) == [2] * 4 and found.loc[30, "low"] == 0.5 and (found["high"] <= 1).all()
    one = depth.edit_survival(table[table["run"] == "a"], [0, 10]).set_index("step")
    assert one.loc[10, "surviving"] == 0.5 and 0 < one.loc[10, "low"] < 0.5 < one.loc[10, "high"]


def wander(updates, run="r", weight=4.0):
    """Rows of a run whose updates are these vectors (n, d); ‖W‖ is `weight`."""
    totals = np.cumsum(updates, axis=0)
    entries = [(i + 1, "W", "update", np.linalg.norm(one)) for i, one in enumerate(updates)]
    entries += [(i + 1, "W", "relative", np.linalg.norm(one) / weight) for i, one in enumerate(totals)]
    entries += [(i + 1, "W", "distance", np.linalg.norm(one) / 9) for i, one in enumerate(totals)]
    return rows(*entries, *[(i + 1, str(100 + i), "edit_losses", 0.1) for i in range(len(updates))], run=run)


def test_walk_tells_orthogonal_from_parallel_updates():
    straight = depth.walk(wander(np.tile([3.0, 4.0, 0.0], (25, 1)))).iloc[0]
    assert straight["drift"] == pytest.approx(5) and straight["exponent"] == pytest.approx(1)
    apart = depth.walk(wander(2 * np.eye(25))).iloc[0]
    assert apart["drift"] == pytest.approx(1) and apart["exponent"] == pytest.approx(0.5)
    assert apart["path"] == pytest.approx(10) and apart["edits"] == 25
    phases = pd.DataFrame({"run": ["r"], "collapse": [5.0]})
    assert depth.walk(wander(2 * np.eye(25)), phases).iloc[0]["edits"] == 4


def test_over_runs_averages_matrices_first():
    walks = pd.DataFrame({"run": ["a", "a", "b"], "editor": "memit", "seed": 0, "exponent": [0.4, 0.6, 0.6],
                          "drift": [1.0, 1.0, 1.2]})
    found = depth.over_runs(walks).iloc[0]
    assert found["runs"] == 2 and found["exponent"] == pytest.approx(0.55) and found["drift"] == pytest.approx(1.1)
    assert found["exponent_low"] == pytest.approx(depth.t_interval([0.5, 0.6])[1])


def test_controls_copy_the_norms_edit_by_edit():
    df, run = wander(np.eye(3) * [1.0, 2.0, 3.0]), inputs.make(n_edits=3, settings={"layer": 1, "clamp": 3.0})
    made = depth.controls(run, df, "v")
    settings = dict(made.settings)
    assert made.editor == "random" and settings["direction"] == "v" and settings["layer"] == 1
    assert settings["norms"] == (("100", 1.0), ("101", 2.0), ("102", 3.0)) and "clamp" not in settings
    assert configure("random", settings, "pocket").norms == settings["norms"]
    with pytest.raises(ValueError, match="3 of its 4 edits"):
        depth.controls(inputs.make(n_edits=4), df, "v")
    twice = pd.concat([df, df[df["metric"] == "update"].assign(fact="V")])
    with pytest.raises(ValueError, match="one matrix"):
        depth.controls(run, twice, "both")


def test_controls_are_compared_order_by_order():
    names = ("ROME", *depth.RANDOM.values())
    entries = [(order, editor, step, metric, base + 0.1 * order + shift * step)
               for order in (0, 1, 2) for editor, shift in zip(names, (0.01, 0.02, 0.03)) for step in (0, 10)
               for metric, base in (("untouched", 0.5), ("perplexity", 9.0))]
    df = pd.DataFrame(entries, columns=["order", "editor", "step", "metric", "value"])
    df = df.assign(run=df["editor"] + df["order"].astype(str), seed=0, fact="")
    table = depth.at_end(df)
    assert len(table) == 9 and table["perplexity"].max() == pytest.approx(9.5)
    found = depth.differences(table, "ROME").set_index(["editor", "metric"])
    one = found.loc[(names[2], "untouched")]
    assert one["mean"] == pytest.approx(0.2) and one["low"] == pytest.approx(one["high"]) == pytest.approx(0.2)
    assert one["method"] == pytest.approx(0.7) and one["orders"] == 3
    words = depth.compared(found.reset_index(), "ROME")
    assert "never-edited facts right, %: ROME 70.0, random values, same keys 80.0 (+10.0, +10.0 to +10.0)" in words


def test_sentences_tell_extrapolated_from_seen(small):
    words = depth.said(depth.half_lives(small, width=2))
    assert "half lost at age 5" in words
    kept = small.assign(value=1.0)
    assert depth.said(depth.half_lives(kept, width=2)) == "rome: nothing lost by age 5"
    late = kept.copy()
    late.loc[(late["metric"] == "retest_ES_exact") & (late["step"] == 6) & (late["fact"] == "b"), "value"] = 0.0
    assert "half not lost by age 5; extrapolated" in depth.said(depth.half_lives(late, width=8))
