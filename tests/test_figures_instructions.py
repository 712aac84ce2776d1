"""editcore.figures_instructions: the drawn points are the table's numbers, and what was not asked draws nothing."""

import numpy as np
import pandas as pd
import pytest

from editcore import figures_instructions as figures

pytestmark = pytest.mark.usefixtures("themed")


def table(systems, tasks=("recent", "counterfact", "convsent", "zsre"), metrics=("Rel", "Gen", "Loc", "Port")):
    """A summary with different numbers in all cells; ConvSent has no Gen and no Port."""
    cells = [(system, task, metric) for system in systems for task in tasks for metric in metrics
             if task != "convsent" or metric in ("Rel", "Loc")]
    mean = np.linspace(0.1, 0.8, len(cells))
    return pd.DataFrame(cells, columns=["system", "task", "metric"]).assign(
        mean=mean, low=mean - 0.05, high=mean + 0.05, value="shown", records=9)


def drawn(ax, marker=None):
    """The x of all single points of an axis."""
    return sorted(round(float(line.get_xdata()[0]), 6) for line in ax.lines if len(np.atleast_1d(line.get_xdata())) == 1
                  and (marker is None or line.get_marker() == marker))


def wanted(rows):
    return sorted(round(100 * value, 6) for value in rows["mean"])


def test_seen_and_unseen_points_and_the_papers():
    rows = table(["full", "full, unseen", "none"])
    fig = figures.seen(rows)
    axes = fig.axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Recent", "CounterFact", "ConvSent"]
    shown = rows[(rows["task"] == "recent") & (rows["system"] != "none")]
    paper = [51.6, 47.4, 85.7, 84.7, 64.6, 64.9, 47.3, 47.0]
    assert drawn(axes[0]) == sorted(wanted(shown) + paper)
    assert len(drawn(axes[2])) == 4


def test_styles_draw_every_editor_and_metric():
    rows = table(["none", "constant", "random", "full"])
    axes = figures.styles(rows).axes
    assert len(axes) == 4 and [label.get_text() for label in axes[0].get_yticklabels()] == [
        "nothing", "one text for all tasks", "random words a task", "both"]
    for ax, task in zip(axes, ("recent", "counterfact", "convsent", "zsre")):
        part = rows[(rows["task"] == task) & (rows["metric"] != "Port")]
        assert drawn(ax) == wanted(part)


def test_crossed_cells_hold_the_numbers():
    names = ["full → full", "full → none", "none → none", "none → full", "swapped → swapped", "swapped → full",
             "swapped → none"]
    rows = table(names, metrics=("Rel",))
    axes = figures.crossed(rows).axes
    found = rows[rows["task"] == "zsre"].set_index("system")["mean"]
    texts = [text.get_text() for text in axes[3].texts]
    assert texts == [f"{100 * found[name]:.0f}" for edit in ("full", "swapped", "none")
                     for name in (f"{edit} → {edit}", f"{edit} → full", f"{edit} → none")]


def test_numbers_are_lines_over_counts():
    rows = table([f"{count}{end}" for count in (1, 3, 9) for end in ("", ", unseen")])
    axes = figures.numbers(rows, {1: "1", 3: "3", 9: "9"}).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Recent", "CounterFact", "ZsRE, held out"]
    cell = rows.set_index(["system", "task", "metric"])["mean"]
    lines = [line.get_ydata() for line in axes[0].lines]
    np.testing.assert_allclose(lines[1], [100 * cell[f"{n}, unseen", "recent", "Rel"] for n in (1, 3, 9)])
    assert len(lines) == 4


def test_rounds_and_their_test():
    scores = pd.DataFrame({"task": "counterfact", "round": [0, 1, 2], "Rel": [.1, .4, .3], "Gen": [.2, .2, .5],
                           "rose": "", "kept": [False, True, False]})
    checked = pd.DataFrame([{"task": "counterfact", "descriptions": name, "metric": metric, "mean": 0.5}
                            for name in ("first round", "best round", "written by hand") for metric in ("Rel", "Gen")])
    left, right = figures.rounds(scores, checked).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [10, 40, 30])
    assert left.lines[-1].get_xdata()[0] == 2 and len(right.lines) == 2
    assert [label.get_text() for label in right.get_xticklabels()] == ["first round", "best round", "written by hand"]
