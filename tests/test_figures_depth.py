"""Figures of forgetting in depth, drawn from made-up tables with warnings as errors and compared with them."""

import numpy as np
import pandas as pd
import pytest

from editcore import alarms, depth
from editcore import figures_depth as figures
from editcore.foresight import PREDICTORS

METHODS = ("ROME", "MEMIT")


pytestmark = pytest.mark.usefixtures("themed")


def edits(runs=2, end=60):
    """Rows of runs whose edits are re-tested every 20 edits and fail the more often the older they are."""
    draw, out = np.random.default_rng(3), []
    for editor in METHODS:
        for run in range(runs):
            known = {"run": f"{editor}{run}", "model": "m", "editor": editor, "data": "d", "seed": 0}
            for made in range(1, end + 1):
                out.append(known | {"step": made, "fact": str(made), "metric": "ES_exact", "value": 1.0})
                out += [known | {"step": step, "fact": str(made), "metric": "retest_ES_exact",
                                 "value": float(draw.random() < np.exp(-(step - made) / 100))}
                        for step in range(20, end + 1, 20) if step > made]
    return pd.DataFrame(out)


def line(ax, label):
    """The points of the curve with this label."""
    found = next(one for one in ax.get_lines() if one.get_label() == label)
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


def test_matrix_shows_the_shares():
    table = depth.matrix(edits(), width=20)
    fig = figures.matrix(table)
    rome = table[table["editor"] == "ROME"]
    shown = [float(text.get_text()) for text in fig.axes[0].texts]
    assert shown == pytest.approx([100 * value for value in rome["retained"]], abs=0.51) and len(shown) == 6
    assert [ax.get_title(loc="left") for ax in fig.axes[:2]] == ["ROME", "MEMIT"]
    assert "2 runs" in fig.get_supxlabel()


def test_lasting_shows_retention_fit_and_survival():
    df = edits()
    ages, halves = depth.by_age(df, 20), depth.half_lives(df, 20)
    fig = figures.lasting(ages, halves, depth.edit_survival(depth.lifetimes(df)))
    bars = fig.axes[0].containers[0].lines[0]
    rome = ages[ages["editor"] == "ROME"].sort_values("age")
    np.testing.assert_allclose(bars.get_ydata().astype(float), 100 * rome["retained"])
    dotted = next(one for one in fig.axes[0].get_lines() if one.get_linestyle() == ":")
    rate = halves.set_index("editor").loc["ROME", "rate"]
    assert dotted.get_ydata()[-1] == pytest.approx(100 * np.exp(-rate * dotted.get_xdata()[-1]))
    steps, values = line(fig.axes[1], "ROME")
    assert (steps[0], values[0]) == (0, 100) and values[-1] < 100
    assert "over runs" in fig.get_supxlabel()
    one = edits(1)
    fig = figures.lasting(depth.by_age(one, 20), depth.half_lives(one, 20), depth.edit_survival(depth.lifetimes(one)))
    assert "Greenwood" in fig.get_supxlabel()


def test_lives_step_down_where_runs_break():
    table = pd.DataFrame({"editor": "ROME", "until": [20, 40, np.nan, np.nan], "edits": 60})
    fig = figures.lives(dict.fromkeys(("one", "two"), depth.survival(table, "until")), "4 runs a method")
    steps, values = line(fig.axes[0], "ROME")
    assert list(zip(steps, values)) == [(0, 100), (20, 75), (40, 50), (60, 50)]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["one", "two"] and "4 runs" in fig.get_supxlabel()


def test_events_are_the_collapse_and_each_share_of_each_ability():
    phases = pd.DataFrame({"editor": "ROME", "collapse": [20, np.nan], "edits": 60})
    lives = pd.DataFrame([("ROME", ability, share, until, 60) for ability in ("tasks", "facts_prob")
                          for share in (0.01, 0.1) for until in (10, np.nan)],
                         columns=["editor", "ability", "share", "until", "edits"])
    panels = figures.events(phases, lives)
    assert list(panels) == ["collapse", "1 % of few-shot tasks", "10 % of few-shot tasks", "1 % of their probability",
                            "10 % of their probability"]
    assert panels["collapse"].set_index("step").loc[20, "surviving"] == 0.5


def scored(names, column, **more):
    """A table of scores, one row a method and name."""
    return pd.DataFrame([{"editor": editor, column: name, "auc": 0.6 + 0.05 * i, "low": 0.5, "high": 0.9,
                          "null_low": 0.4, "null_high": 0.6, "runs": 2} | more
                         for editor in METHODS for i, name in enumerate(names)])


def test_overlap_shows_classes_and_areas():
    shares = pd.DataFrame([{"editor": editor, "group": group, "share": group / 20, "low": group / 30,
                            "high": group / 15, "by_age": 0.2, "n": 12}
                           for editor in METHODS for group in range(1, 11)])
    scores = pd.concat([scored(PREDICTORS, "predictor", outcome="weakened", among=among)
                        for among in ("all edits", "equal age")])
    fig = figures.overlap(shares, scores)
    np.testing.assert_allclose(fig.axes[0].containers[0].lines[0].get_ydata().astype(float), np.arange(1, 11) * 5)
    filled, hollow = fig.axes[2].containers[:2]
    np.testing.assert_allclose(filled.lines[0].get_xdata().astype(float), [0.6, 0.65, 0.7, 0.75])
    assert hollow.lines[0].get_markerfacecolor() == "white" and "2 runs" in fig.get_supxlabel()
    assert len(fig.axes[2].get_yticklabels()) == len(PREDICTORS)


def test_controls_share_an_axis():
    values = {"untouched": 0.9, "perplexity": 11.0, "untouched_ES_prob": 0.8, "relative": 0.3}
    names = ("ROME", *depth.RANDOM.values())
    df = pd.DataFrame([{"run": f"{editor}{run}", "editor": editor, "step": step, "fact": "", "metric": metric,
                        "value": value * (1 - 0.001 * step)}
                       for editor in names for run in range(2) for step in (0, 20, 40)
                       for metric, value in values.items() if step or metric != "relative"])
    fig = figures.controls(df)
    for ax, scale in zip(fig.axes, (90, 11, 0.8, 0.3)):
        for name in names:
            assert line(ax, name)[1][-1] == pytest.approx(scale * 0.96)
    assert fig.axes[3].get_xscale() == "log" and line(fig.axes[3], "ROME")[0][0] == 20
    assert len({(str(one.get_color()), one.get_linestyle()) for one in fig.axes[0].get_lines()}) == 3


def trace():
    """Rows of `alarms.watch`, of which the figure reads drift."""
    return pd.DataFrame([{"editor": editor, "run": f"{editor}{run}", "step": step, "drift": 1 + 0.1 * run}
                         for editor in METHODS for run in range(2) for step in range(1, 21)])


def walks():
    return pd.DataFrame({"editor": METHODS, "runs": 5, "exponent": [0.52, 0.49], "exponent_low": [0.5, np.nan],
                         "exponent_high": [0.54, np.nan]})


def test_warnings_show_walk_exponent_and_areas():
    scores = pd.concat([scored(alarms.SIGNALS, "signal", event=event, few=event == "collapse")
                        for event in alarms.EVENTS])
    scores.loc[scores["editor"] == "MEMIT", "auc"] = np.nan         # nothing happened there
    fig = figures.warnings(trace(), walks(), scores)
    assert line(fig.axes[0], "ROME")[1] == pytest.approx(1.05)
    assert fig.axes[1].containers[0].lines[0].get_xdata()[0] == 0.52
    assert len(fig.axes[2].containers) == 2 and len(fig.axes[2].get_yticklabels()) == len(alarms.SIGNALS)
    assert "5 runs" in fig.get_supxlabel()


def test_warnings_say_when_nothing_happened():
    scores = scored(alarms.SIGNALS, "signal", event="collapse", few=False).assign(auc=np.nan)
    fig = figures.warnings(trace(), walks(), scores)
    assert "too little happened" in fig.axes[2].texts[0].get_text()
