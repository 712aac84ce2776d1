"""Hand-made rows with known answers: forgotten, ability, phases, losses, survival, intervals."""

import numpy as np
import pandas as pd
import pytest

from editcore import analysis
from editcore.analysis import RUN

HEAD = {"run": "r", "editor": "rome", "order": 0}


def rows(*entries, **head):
    """Return a table of (step, fact, metric, value) entries of one run."""
    table = pd.DataFrame(entries, columns=["step", "fact", "metric", "value"])
    return table.assign(**(HEAD | head))[[*RUN, "step", "fact", "metric", "value"]]


@pytest.fixture
def small():
    """Four edits (c fails when made): a is lost at 4 and back at 6; b is lost at 6."""
    made = [("a", 1, 1.0), ("b", 2, 1.0), ("c", 3, 0.0), ("d", 4, 1.0)]
    again = [(2, "a", 1), (4, "a", 0), (4, "b", 1), (4, "c", 1), (6, "a", 1), (6, "b", 0),
             (6, "c", 0), (6, "d", 1)]
    entries = [(step, fact, "ES_exact", value) for fact, step, value in made]
    entries += [(step, fact, "retest_ES_exact", float(value)) for step, fact, value in again]
    return rows(*entries)


def history(lost, relative=None, f1=(), known=()):
    """Return rows of a run whose 100 edits of step 1 fail with the given shares at 20, 40, ...

    f1, known: few-shot score and share right of 100 never-edited facts at 0, 20, ...
    """
    entries = [(1, str(i), name, 1.0) for i in range(100) for name in ("ES", "ES_exact")]
    for k, share in enumerate(lost, 1):
        right = [float(i >= round(100 * share)) for i in range(100)]
        entries += [(20 * k, str(i), "retest_ES_exact", right[i]) for i in range(100)]
        entries += [(20 * k, f"new{k}", "ES", 1.0)]
    far = relative or [k ** 0.5 for k in range(1, len(lost) + 1)]
    entries += [(20 * k, "W", "relative", value) for k, value in enumerate(far, 1)]
    entries += [(20 * k, "W", "update", 3.0 if k == 5 else 1.0) for k in range(1, len(lost) + 1)]
    entries += [(20 * k, str(i), "untouched_ES_exact", float(i < round(100 * share)))
                for k, share in enumerate(known) for i in range(100)]
    return rows(*entries, *[(20 * k, "", "sst2_f1", value) for k, value in enumerate(f1)])


# ── forgotten ───────────────────────────────────────────────────────────────────────────────────

def test_retests_ask_only_edits_that_succeeded(small):
    table = analysis.retests(small)
    assert set(table["fact"]) == {"a", "b", "d"}
    last = table[table["step"] == 6].set_index("fact")
    assert dict(last["age"]) == {"a": 5, "b": 4, "d": 2}
    assert dict(last["right"]) == {"a": 1.0, "b": 0.0, "d": 1.0}


def test_forgotten_by_hand(small):
    table = analysis.forgotten(small).set_index("step")
    assert list(table["edits"]) == [2, 3, 3]        # b at 2 and d at 4 are the newest: not asked
    np.testing.assert_allclose(table["now"], [0, 1 / 3, 1 / 3])
    np.testing.assert_allclose(table["ever"], [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(table["recovered"], [np.nan, np.nan, 1.0])   # a is back at 6


def test_forgotten_keeps_runs_apart(small):
    other = small.assign(run="s", editor="memit", value=1.0)
    table = analysis.forgotten(pd.concat([small, other]))
    assert set(table["run"]) == {"r", "s"}
    assert (table.loc[table["run"] == "s", "ever"] == 0).all()


def test_ever_forgotten_falls_only_by_dilution():
    draw = np.random.default_rng(0)
    entries = [(i + 1, str(i), "ES_exact", 1.0) for i in range(40)]
    for step in range(5, 45, 5):
        entries += [(step, str(i), "retest_ES_exact", float(draw.random() < 0.8))
                    for i in range(step - 1)]
    table = analysis.forgotten(rows(*entries))
    assert (np.diff(table["ever"] * table["edits"]) >= -1e-9).all()
    assert (table["ever"] >= table["now"]).all() and (table["ever"] > table["now"]).any()


# ── ability and what was never edited ───────────────────────────────────────────────────────────

def test_ability_is_the_margin_above_chance():
    table = rows((0, "", "sst2_f1", 1.0), (10, "", "sst2_f1", 2 / 3), (0, "", "sst2_prob_f1", 0.9))
    found = analysis.ability(table)
    np.testing.assert_allclose(found["ability"], [1.0, 0.5])
    assert list(analysis.few_shot(table)["task"]) == ["sst2", "sst2"]


def test_ability_is_that_of_tasks_above_chance():
    table = rows(*scores({0: 0.8, 10: 0.6}), *scores({0: 0.42, 10: 0.0}, "rte_f1"))
    assert list(analysis.ability(table)["f1"]) == [0.8, 0.6]
    assert analysis.ability(rows(*scores({0: 0.42, 10: 0.2}))).empty


def test_untouched_counts_only_what_was_known():
    values = [(0, "a", 1), (0, "b", 0), (0, "c", 1), (20, "a", 1), (20, "b", 1), (20, "c", 0)]
    table = rows(*[(step, fact, "untouched_ES_exact", value * 1.0) for step, fact, value in values])
    assert list(analysis.untouched(table)["value"]) == [1.0, 0.5]


def test_trajectory_is_long_and_without_nan(small):
    more = rows((0, "", "sst2_f1", 0.8), (0, "", "rte_f1", 0.6), (0, "", "perplexity", 9.0),
                (0, "x", "untouched_ES_prob", 0.5), (0, "y", "untouched_ES_prob", 0.7))
    table = analysis.trajectory(pd.concat([small, more]))
    assert list(table.columns) == [*RUN, "step", "metric", "value"] and table["value"].notna().all()
    found = table.set_index(["metric", "step"])["value"]
    assert found["f1", 0] == pytest.approx(0.7) and found["ability", 0] == 1.0
    assert found["forgotten_ever", 6] == pytest.approx(2 / 3) and found["recovered", 6] == 1.0
    assert found["untouched_prob", 0] == pytest.approx(0.6) and found["perplexity", 0] == 9.0


def test_trajectory_of_nothing_is_empty():
    assert analysis.trajectory(rows((1, "a", "ES", 1.0))).empty


# ── distance ────────────────────────────────────────────────────────────────────────────────────

def walk(steps, exponent, matrix="W"):
    """Return rows of a distance that grows as step ** exponent by equal updates."""
    entries = []
    for step in steps:
        entries += [(step, matrix, "relative", 0.5 * step ** exponent),
                    (step, matrix, "distance", 0.01 * step ** exponent),
                    (step, matrix, "update", 2.0)]
    return entries


def test_distance_has_one_row_per_matrix_and_knows_the_norm():
    table = analysis.distance(rows(*walk([1, 2, 4], 0.5), *walk([1, 2, 4], 1, "V.weight"),
                                   (1, "V.bias", "relative", 0.4), (1, "V.bias", "update", 1.0)))
    assert set(table["matrix"]) == {"W", "V.weight"} and len(table) == 6
    total = table[table["matrix"] == "W"].set_index("step")["total"]
    np.testing.assert_allclose(total, [2.0, 2.0 * 2 ** 0.5, 4.0])       # ‖W‖ = 2 / 0.5


def test_growth_of_a_random_walk_and_of_a_straight_line():
    steps = range(1, 41)
    table = pd.concat([rows(*walk(steps, 0.5)), rows(*walk(steps, 1.0), run="s", order=1)])
    found = analysis.growth(table).set_index("run")
    np.testing.assert_allclose(found["exponent"], [0.5, 1.0])
    np.testing.assert_allclose(found["drift"], [1.0, 40 ** 0.5])
    np.testing.assert_allclose(found["largest"], [1.0, 1.0])


def test_growth_of_a_short_run_is_undefined():
    assert np.isnan(analysis.growth(rows(*walk([1, 2, 3], 0.5)))["exponent"].item())


# ── phases ──────────────────────────────────────────────────────────────────────────────────────

SMOOTH = [(k / 20) ** 0.5 for k in range(1, 21)]     # all is lost at last, as the distance grows
SLOPE = [.01, .03, .05, .07, .09, .11, .13]
CLIFF = [.01, .03, .04, .06, .80, .75, .78]
FT = [.10, .18, .32, .51, .59, .62, .70, .78, .80, .82]


@pytest.mark.parametrize("lost, kind, why", [
    (CLIFF, "abrupt", "much at once, and it stands"),
    (SLOPE, "gradual", "little, slowly"),
    (SMOOTH, "eroded", "all of it, smoothly"),
    (FT, "eroded", "fast from the start"),
    ([.01, .10, .19, .28, .37, .56, .60], "eroded", "half, slowly"),
    ([.70, .72, .74, .75, .75, .75], "eroded", "no gradual phase before"),
    ([.01, .70, .74, .75, .75, .75], "eroded", "one test is no phase"),
    ([.01, .03, .50, .06, .07, .08], "gradual", "a dip that recovers"),
    ([.01, .55, .60, .65, .90, .90], "eroded", "half was lost before"),
    ([.01, .03, .04, .06, .80], "cannot tell", "a jump at the last test may recover"),
    ([.01, .02], "cannot tell", "too few tests"),
    ([.90, .90], "cannot tell", "too few tests, much lost"),
    ([.01, .02, .03, .04], "cannot tell", "too short for no loss")])
@pytest.mark.parametrize("leap", [1, 30], ids=["smooth weights", "weights jump"])
def test_phases_go_by_what_is_lost(lost, kind, why, leap):
    far = [step ** 0.5 * (leap if step > 4 else 1) for step in range(1, len(lost) + 1)]
    (phase,) = analysis.phases(history(lost, far)).to_dict("records")
    assert phase["kind"] == kind, why
    assert (phase["collapse"] == 100) if kind == "abrupt" else np.isnan(phase["collapse"])


def test_phases_report_the_weights_at_the_jump():
    (phase,) = analysis.phases(history(CLIFF, [1, 1.4, 1.7, 2, 9, 9.1, 9.2])).to_dict("records")
    assert (phase["before"], phase["at"], phase["cause"]) == (0.06, 0.80, "earlier edits")
    assert (phase["leap"], phase["longest"], phase["moved"]) == (3.0, "new5", 4.5)
    assert (phase["worst"], phase["end"], phase["half"]) == ("earlier edits", 0.78, 100)


@pytest.mark.parametrize("cause, more", [
    ("few-shot tasks", {"f1": [.9, .9, .9, .9, .88, .4, .35, .35]}),
    ("known facts", {"known": [1, .99, .98, .97, .95, .3, .3, .3]})])
def test_phases_see_every_loss(cause, more):
    (phase,) = analysis.phases(history(SLOPE, **more)).to_dict("records")
    assert (phase["kind"], phase["collapse"], phase["cause"]) == ("abrupt", 100, cause)


def test_a_run_that_has_lost_half_of_anything_is_not_gradual_before_a_jump():
    table = history(CLIFF, known=[1, .9, .7, .4, .4, .4, .4, .4])
    (phase,) = analysis.phases(table).to_dict("records")
    assert (phase["kind"], phase["half"]) == ("eroded", 60)


def test_panels_name_model_and_schedule():
    table = pd.DataFrame({"run": ["a", "b", "c"], "model": ["pocket", "x/smollm2", "smollm2"],
                          "insert": [(), [[3, "7"]], []], "leave_out": [(), (), ["7"]]})
    assert analysis.panels(table).to_dict() == {
        "a": "pocket", "b": "smollm2, predicted edits put in",
        "c": "smollm2, predicted edits left out"}


def test_the_rule_can_be_changed():
    table = history([.01, .03, .04, .06, .20, .20])
    assert analysis.phases(table)["kind"].item() == "gradual"
    assert analysis.phases(table, analysis.Rule(jump=0.1))["collapse"].item() == 100


def test_losses_are_shares_of_what_there_was():
    table = history([.1], f1=[1.0, 2 / 3], known=[.5, .4])
    table = pd.concat([table, rows(*scores({0: 10.0, 20: 20.0}, "perplexity"))])
    found = analysis.losses(table).query("step == 20").set_index("what")["lost"]
    assert found.to_dict() == pytest.approx({"earlier edits": 0.1, "few-shot tasks": 0.5,
                                             "known facts": 0.2, "perplexity": 0.5})


# ── losses ──────────────────────────────────────────────────────────────────────────────────────

def scores(values, metric="sst2_f1"):
    return [(step, "", metric, value) for step, value in values.items()]


def test_lost_shares_of_four_abilities():
    table = rows(*scores({0: 1.0, 20: 2 / 3}), *scores({0: 10.0, 20: 15.0}, "perplexity"),
                 *scores({0: 0.8, 20: 0.6}, "untouched_ES_prob"),
                 *scores({0: 1.0, 20: 0.0}, "untouched_ES_exact"))
    found = analysis.lost(table).query("step == 20").set_index("ability")["lost"]
    assert found.to_dict() == pytest.approx({"tasks": 0.5, "facts": 1.0, "facts_prob": 0.25,
                                             "perplexity": 0.5})


def test_edits_until_interpolates_and_needs_a_lasting_loss():
    table = rows(*scores({0: 1.0, 10: 0.9, 20: 1.0, 30: 0.9, 40: 0.85, 50: 0.2}))
    assert analysis.edits_until(table, 0.1)["until"].item() == pytest.approx(20 + 10 * 2 / 3)
    assert analysis.edits_until(table, 0.1, confirm=0)["until"].item() == pytest.approx(20 / 3)
    late = analysis.edits_until(table[table["step"] < 50], 0.5)
    assert np.isnan(late["until"].item()) and late["edits"].item() == 40


def test_perplexity_without_a_finite_value_is_all_lost():
    table = rows(*scores({0: 10.0, 20: 10.0, 40: np.nan}, "perplexity"))
    assert analysis.lost(table)["lost"].max() == analysis.LIMIT
    assert analysis.edits_until(table, 0.1)["until"].item() == 40


# ── statistics ──────────────────────────────────────────────────────────────────────────────────

def test_survival_with_censoring():
    table = pd.DataFrame({"editor": "rome", "collapse": [50, 100, np.nan, np.nan],
                          "edits": [200, 200, 80, 200]})
    found = analysis.survival(table, "collapse").set_index("step")
    np.testing.assert_allclose(found["surviving"], [1, 0.75, 0.75, 0.375, 0.375])
    inside = found.loc[50:]
    assert (inside["low"] < inside["surviving"]).all()
    assert (inside["surviving"] < inside["high"]).all()


def test_survival_without_events_has_no_interval():
    table = pd.DataFrame({"editor": "rome", "collapse": [np.nan, np.nan], "edits": [100, 100]})
    found = analysis.survival(table, "collapse")
    assert list(found["surviving"]) == [1.0, 1.0] and np.isnan(found["low"].iloc[-1])


def test_bootstrap_covers_the_mean_and_draws_whole_units():
    draw = np.random.default_rng(1)
    table = pd.DataFrame({"run": np.repeat(np.arange(50), 4), "editor": np.tile(["a", "b"], 100)})
    table["value"] = draw.normal(size=50)[table["run"]] + (table["editor"] == "b")
    found = analysis.bootstrap(table, "value", "editor", unit="run")
    width = found["high"] - found["low"]
    means = table[table["editor"] == "a"].groupby("run")["value"].mean()
    standard = 2 * 1.96 * means.std() / 50 ** 0.5
    np.testing.assert_allclose(width, standard, rtol=0.15)
    np.testing.assert_allclose(found.loc["b"] - found.loc["a"], [1, 1, 1, 0])   # the same draws
    assert list(found["units"]) == [50, 50]


def test_paired_counts_common_units_only():
    draw = np.random.default_rng(2)
    left = pd.DataFrame({"fact": np.arange(40), "editor": "a", "value": draw.normal(size=40)})
    right = left.assign(editor="b", value=left["value"] - 0.5 + 0.1 * draw.normal(size=40))
    table = pd.concat([left, right[right["fact"] < 30]])
    found = analysis.paired(table, "value", "editor", more="a", less="b", unit="fact")
    assert found["units"] == 30 and found["mean"] == pytest.approx(0.5, abs=0.06)
    assert found["low"] < found["mean"] < found["high"] and found["p"] < 0.01
    same = analysis.paired(pd.concat([left, left.assign(editor="b")]), "value", "editor",
                           more="a", less="b", unit="fact")
    assert same["mean"] == same["low"] == same["high"] == 0 and same["p"] == 1


def test_paired_over_trainings_is_wider_than_over_records():
    draw = np.random.default_rng(3)
    gaps = 0.5 + draw.normal(size=(5, 1)) * 0.3 + 0.1 * draw.normal(size=(5, 40))
    left = pd.DataFrame({"seed": np.repeat(np.arange(5), 40), "fact": np.tile(np.arange(40), 5),
                         "editor": "a", "value": gaps.ravel()})
    table = pd.concat([left, left.assign(editor="b", value=0.0)])
    how = {"more": "a", "less": "b", "unit": "fact"}
    found = analysis.paired(table, "value", "editor", training="seed", **how)
    assert found["mean"] == pytest.approx(gaps.mean()) and list(found[["units", "trainings"]]) == [
        40, 5]
    spread = gaps.mean(1).std() / 5 ** 0.5      # what the drawn means of five trainings have
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.2)
    records = analysis.paired(table, "value", "editor", **how)
    assert records["high"] - records["low"] < 0.3 * (found["high"] - found["low"])
    few = table[(table["seed"] > 0) | (table["fact"] < 30)]     # a training without some records
    assert analysis.paired(few, "value", "editor", training="seed", **how)["mean"] == pytest.approx(
        np.concatenate([gaps[0, :30], gaps[1:].ravel()]).mean())


def test_one_training_has_no_interval():
    table = pd.DataFrame({"seed": 0, "fact": [0, 1, 0, 1], "editor": ["a", "a", "b", "b"],
                          "value": [1.0, 1.0, 0.0, 1.0]})
    found = analysis.paired(table, "value", "editor", training="seed", more="a", less="b",
                            unit="fact")
    assert found["mean"] == 0.5 and found["trainings"] == 1 and np.isnan(found["low"])
