"""editcore.figures_directions: every figure draws from its table, says what it shows and names each source once."""

import numpy as np
import pandas as pd
import pytest

from editcore import figures_directions, separation
from editcore.figures_directions import LOOKS, READINGS, Picture

TASKS = ("recent", "counterfact", "zsre")
GROUPS = tuple(np.repeat(TASKS, 8))


pytestmark = pytest.mark.usefixtures("themed")


def texts(fig):
    """Everything that is written in a figure."""
    fig.canvas.draw()
    found = [fig.findobj(lambda one: hasattr(one, "get_text"))]
    return " | ".join(one.get_text() for part in found for one in part)


def measured(sources, readings=("G~", "u~", "delta~"), maps=("one", "two"), seed=0):
    """A table like that of `atlas.numbers`."""
    draw = np.random.default_rng(seed)
    rows = [(source, reading, site, score, *(draw.uniform(0, 1) + np.array([0, -0.05, 0.05]))) for source in sources
            for reading in readings for site in maps for score in separation.SCORES]
    return pd.DataFrame(rows, columns=["source", "reading", "map", "score", "mean", "low", "high"])


def test_pictures_are_drawn_with_both_editors_and_their_silhouettes():
    points = np.random.default_rng(0).standard_normal((48, 2))
    scores = (0.25, 0.9), (-0.125, 0.4)
    found = [Picture(f"panel {k}", points, GROUPS, ("first", "second"), scores, 0.5) for k in range(4)]
    fig = figures_directions.pictures(found, words="what is seen")
    shown = [ax for ax in fig.axes if ax.axison]
    assert len(shown) == 4 and len(shown[0].collections) == 6
    drawn = np.concatenate([one.get_offsets() for one in shown[0].collections])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, points))
    written = texts(fig)
    assert "● first  +0.25 · 90 %" in written and "▽ second  -0.12 · 40 %" in written
    assert all(word in written for word in ("panel 3", "Recent", "CounterFact", "ZsRE", "what is seen"))


def test_numbers_have_a_panel_a_score_and_reading():
    sources = {"A": ("#0173b2", "o", True), "B": ("#d55e00", "v", False)}
    fig = figures_directions.numbers(measured(sources), sources, {"one": "block 3, in", "two": "block 3, out"})
    assert len(fig.axes) == 12 and all(len(ax.lines) >= 8 for ax in fig.axes)
    words = [*separation.SCORES.values(), "block 3, out", *(words for words, *_ in list(READINGS.values())[1:2])]
    assert all(word in texts(fig) for word in words)


def test_controls_stand_under_their_headings():
    heads = {"Raw": {"gradient, a": "a", "gradient, b": "b"}, "Edits": {"edit": "instruction"}}
    found = pd.concat([measured(["gradient, a", "gradient, b"], ("G", "u", "delta"), ["one"]),
                       measured(["edit"], maps=["one"])])
    fig = figures_directions.controls(found, {"silhouette": (-0.02, 0.01), "probe": (0.3, 0.4)}, heads)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["Raw", "a", "b", "Edits", "instruction"]
    assert [label.get_fontweight() for label in fig.axes[0].get_yticklabels()][:2] == ["bold", "normal"]
    assert len([line for line in fig.axes[0].lines if line.get_marker() not in ("None", None)]) == 9


def test_readings_add_up_to_all_edits():
    shares = pd.DataFrame({"as_told": [0.5, 0.1], "as_is": [0.3, 0.85], "other": [0.2, 0.05], "low": [0.4, 0.05],
                           "high": [0.6, 0.2]}, index=["InstructEdit", "raw"])
    fig = figures_directions.readings(shares)
    ends = [patch.get_x() + patch.get_width() for patch in fig.axes[0].patches]
    assert max(ends) == pytest.approx(100) and "85" in texts(fig) and "names" in texts(fig)


def test_verdicts_have_their_colours():
    found = pd.DataFrame({"text": ["a: one", "control: two"], "more": "x", "less": "y", "mean": [0.2, -0.1],
                          "low": [0.1, -0.2], "high": [0.3, 0.1], "verdict": ["held", "undecided"]})
    fig = figures_directions.verdicts({"silhouette": found, "probe": found})
    assert "a: one" in texts(fig) and "undecided" in texts(fig) and "linear probe" in texts(fig)


def test_scaling_and_success():
    rows = pd.DataFrame([(count, task, metric, 0.2 * count, 0.2 * count - 0.1, 0.2 * count + 0.1) for count in (1, 2, 3)
                         for task in TASKS for metric in ("Rel", "Gen")],
                        columns=["tasks", "task", "metric", "mean", "low", "high"])
    fig = figures_directions.scaling(rows, {("Rel", "recent"): (72.0, 86.0, 85.7)})
    assert "paper, GPT2-XL" in texts(fig) and len(fig.axes) == 2
    table = pd.DataFrame({"task": TASKS * 2, "style": ["full"] * 3 + ["none"] * 3, "silhouette": np.linspace(-1, 1, 6),
                          "Rel": np.linspace(0, 1, 6), "Gen": 0.5})
    fig = figures_directions.success(table, {"Rel": (0.5, 0.1, 0.8), "Gen": (-0.2, -0.5, 0.3)})
    assert "ρ = +0.50 [+0.10, +0.80]" in texts(fig) and all(LOOKS[task][0] in texts(fig) for task in TASKS)
