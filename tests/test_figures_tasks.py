"""editcore.figures_tasks: what the figures of many tasks show, read back from their axes."""

import numpy as np
import pandas as pd
import pytest

from editcore import figures_tasks as figures
from editcore.instructedit.contenders import TOLD
from editcore.orderings import COLUMNS, claims, headline, summary, verdicts


@pytest.fixture(scope="module")
def rows():
    draw, made = np.random.default_rng(0), []
    names = [*COLUMNS, TOLD, "FT-L, fair", "GRACE, fair", "recent", "counterfact", "zsre"]
    for system in names:
        for task in ("recent", "counterfact", "convsent", "zsre"):
            metrics = ("Rel", "Loc", "Fluency") if task == "convsent" else ("Rel", "Gen", "Loc", "Port")
            if (system.endswith("fair") and task != "zsre") or (system.islower() and task == "convsent"):
                continue
            made += [{"system": system, "task": task, "metric": metric, "case_id": case, "kind": "",
                      "value_exact": float(draw.random() < 0.5), "value_token": draw.random()}
                     for metric in metrics for case in range(8)]
    return pd.DataFrame(made)


pytestmark = pytest.mark.usefixtures("themed")


def test_transfer_prints_every_cell_and_the_papers(rows):
    table = summary(rows, 50)
    fig = figures.transfer(table)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Reliability", "Generalization", "Portability", "Locality"]
    texts = [text.get_text() for text in fig.axes[0].texts]
    value = table.query("system == 'recent' and task == 'zsre' and metric == 'Rel' and value == 'exact'")["mean"].item()
    assert len(texts) == 18 and f"{100 * value:.0f}" in texts and "paper 97" in texts and "–" in texts


def test_contenders_have_a_panel_a_task_and_metric_with_fair_rows_only_where_asked(rows):
    fig = figures.contenders(summary(rows, 50))
    axes = np.array(fig.axes).reshape(4, 4)
    assert [label.get_text() for label in axes[3, 0].get_yticklabels()][-2:] == ["FT-L, fair", "GRACE, fair"]
    assert [label.get_text() for label in axes[0, 0].get_yticklabels()][:2] == ["Base model", TOLD]
    assert len(axes[0, 0].get_yticklabels()) == 8 and axes[2, 3].get_title(loc="left") == "Fluency"
    assert not axes[2, 1].axison and axes[2, 2].get_title(loc="left") == "Locality"
    points = [line for line in axes[0, 0].lines if line.get_marker() == "D" and line.get_markersize() != 6.5]
    assert len(points) == 1, "InstructEdit, once"


def test_orderings_and_headline_show_what_the_tables_say(rows):
    found = verdicts(rows, claims(), n_draws=50)
    (ax,) = figures.orderings(found).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found["text"])
    table = headline(rows, n_draws=50)
    (ax,) = figures.headline(table).axes
    widths = [bar.get_width() for bar in ax.patches[-len(table):]]
    np.testing.assert_allclose(widths, table["gain"])
    assert not [line for line in ax.lines if line.get_marker() == "|"], "one training seed has no spread"
    (ax,) = figures.headline(table.assign(least=table["gain"] - 3, most=table["gain"] + 4)).axes
    marks = [line.get_xdata() for line in ax.lines if line.get_marker() == "|" and len(line.get_xdata())]
    np.testing.assert_allclose(marks, [table["gain"] - 3, table["gain"] + 4])
    assert "+14.86" in [text.get_text() for text in ax.texts] and "not tried" in [text.get_text() for text in ax.texts]


def test_costs_are_three_panels_with_numbers():
    table = pd.DataFrame({"name": ["InstructEdit", "MEND on ZsRE"], "seconds": [50.0, 2000.0], "peak_mb": [900, 910],
                          "parameters": [2_500_000, 2_500_000]})
    fig = figures.costs(table)
    assert [text.get_text() for text in fig.axes[0].texts] == [" 50", " 2,000"]
    assert fig.axes[2].texts[0].get_text() == " 2.5"
