"""editcore.figures_mixtures: drawn points are the table's numbers, shaded rows those trained on."""

import numpy as np
import pandas as pd
import pytest
from test_figures_instructions import drawn, table, wanted

from editcore import figures_mixtures as figures
from editcore import mixtures

pytestmark = pytest.mark.usefixtures("themed")


def test_subsets():
    rows = table([f"{subset}, {style}" for subset in mixtures.SUBSETS for style in ("full", "none")])
    axes = figures.subsets(rows).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Recent", "CounterFact", "ConvSent", "ZsRE, held out"]
    for ax, task, letter in zip(axes, ("recent", "counterfact", "convsent", "zsre"), "RCSZ"):
        part = rows[(rows["task"] == task) & (rows["metric"] == "Rel")]
        own = [value for name in mixtures.SUBSETS if (value := mixtures.paper(name, task, "Rel")) is not None]
        assert drawn(ax) == sorted(wanted(part) + own)
        shaded = sorted(round(patch.get_y() + 0.45) for patch in ax.patches)
        assert shaded == [row for row, subset in enumerate(mixtures.SUBSETS) if letter in subset]


def test_gains():
    found = pd.DataFrame([{"text": f"{family} {i}", "family": family, "mean": 0.1 * i, "low": 0.1 * i - 0.05,
                           "high": 0.1 * i + 0.05, "paper": 12.5 if i == 1 else np.nan, "verdict": verdict}
                          for family in ("a", "b") for i, verdict in enumerate(("undecided", "held", "failed"))])
    for ax in figures.gains(found).axes:
        assert drawn(ax, "o") == [0, 10, 20] and drawn(ax, "d") == [12.5]
        assert len({line.get_color() for line in ax.lines if line.get_marker() == "o"}) == 3


def test_balance():
    rows = table(["none of it", "some", "all"])
    axes = figures.balance(rows, {"none of it": 0, "some": 25, "all": "all"}).axes
    cell = rows.set_index(["system", "task", "metric"])["mean"]
    line = axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(line, [100 * cell[name, "recent", "Rel"] for name in ("none of it", "some", "all")])
    assert [label.get_text() for label in axes[3].get_xticklabels()] == ["0", "25", "all"]
    assert len(axes[2].lines) == 2      # ConvSent has no rephrasing
