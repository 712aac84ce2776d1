"""The figures of disabling edits are drawn with warnings as errors, and what they show is compared with the tables."""

import numpy as np
import pandas as pd
import pytest

from editcore import analysis_old as analysis
from editcore import figures_disabling, jumps, look

OPENERS = (4, 9)


pytestmark = pytest.mark.usefixtures("themed")


@pytest.fixture
def table():
    size = np.array([3.0 if i in OPENERS else 20.0 + i / 10 for i in range(30)])
    return pd.DataFrame({"case_id": [f"f{i}" for i in range(30)], "subject": [f"S{i}" for i in range(29)] + ["x" * 40],
                         "opener": [i in OPENERS for i in range(30)], "denominator": size, "denominator_r": 21.0,
                         "denominator_p": 22.0, "relative": size / 21, "expected": np.median(size) / size})


def rows(method, name, jump=True):
    known, out = {"run": name, "model": "m", "editor": name, "data": "d", "seed": 0, "method": method}, []
    for step in range(0, 31):
        if step:
            large = jump and step - 1 in OPENERS
            values = {f"f{step - 1}": {"ES_exact": 1, "edit_losses": 0.1},
                      "w": {"update": 8.0 if large else 1 + step / 99, "relative": step / 99}}
            out += [known | {"step": step, "fact": fact, "metric": metric, "value": value}
                    for fact, some in values.items() for metric, value in some.items()]
        if step % 10 == 0:
            out += [known | {"step": step, "fact": f"u{i}", "metric": "untouched_ES_exact",
                             "value": float(i > step / 10)} for i in range(20)]
            out += [known | {"step": step, "fact": f"f{i}", "metric": "retest_ES_exact", "value": float(i > 0)}
                    for i in range(step - 1)]
    return pd.DataFrame(out)


@pytest.fixture
def happened(table):
    df = pd.concat([rows("rome", "ROME"), rows("r-rome", "r-ROME", False), rows("rome", "ROME without openers", False)],
                   ignore_index=True)
    return jumps.happened(jumps.updates(df, table), df), analysis.with_derived(df)


def test_denominators_show_every_fact_and_the_smallest_by_name(table):
    fig = figures_disabling.denominators(table, named=5)
    left, right = fig.axes
    assert sum(patch.get_height() for patch in left.patches) == 30
    assert [text.get_text() for text in right.get_yticklabels()][-2:] == ["S9", "S4"]
    assert "subject is the first token (2)" in [text.get_text() for text in left.get_legend().get_texts()]
    assert figures_disabling.denominators(table[~table["opener"]]).axes     # a tokenizer without any


def test_timeline_rings_what_was_predicted_in_every_panel(happened):
    made, df = happened
    fig = figures_disabling.timeline(made, df)
    panels = fig.axes[:3]
    assert [ax.get_title(loc="left") for ax in panels] == ["ROME", "ROME without openers", "r-ROME"]
    for ax in panels:
        rings = ax.collections[1].get_offsets()
        assert [x for x, _ in rings] == [place + 1 for place in OPENERS]
        assert ax.get_yscale() == "log"
    assert list(panels[0].collections[1].get_offsets()[:, 1]) == pytest.approx(
        made.loc[(made["editor"] == "ROME") & made["told"], "ratio"].tolist())
    assert [text.get_text() for text in panels[0].texts] == [f"{one:.1f}" for one in made.loc[
        (made["editor"] == "ROME") & made["told"], "foretold"]]
    assert not panels[2].texts      # no number where another editor's denominators count
    low = fig.axes[4].lines[0]
    assert low.get_ydata()[0] == 100 and low.get_ydata()[-1] < 100


def test_against_draws_every_edit_over_its_denominator(happened):
    made, _ = happened
    fig = figures_disabling.against(made)
    for ax, method in zip(fig.axes, look.methods_in(made), strict=True):
        points = np.concatenate([one.get_offsets() for one in ax.collections])
        part = made[made["editor"] == method]
        assert sorted(points[:, 0]) == pytest.approx(sorted(1 / part["own"].abs()))
        assert sorted(points[:, 1]) == pytest.approx(sorted(part["update"]))


def test_scores_are_written_beside_their_intervals(happened):
    made, _ = happened
    rome = made[made["editor"] == "ROME"]
    pooled = {event: jumps.score(rome, jumps.rules(), event).query("run == ''") for event in ("jump_3", "disabling")}
    fig = figures_disabling.scored({"as published": pooled, "again": pooled})
    assert len(fig.axes) == 4
    said = [text.get_text() for text in fig.axes[0].texts]
    assert said[:3] == [f"{one.hits} / {one.predicted}" for one in pooled["jump_3"].itertuples()]
    assert said[0] == "2 / 2" and [text.get_text() for text in fig.axes[1].texts][3:] == ["0 / 0"] * 3


def test_cost_puts_every_interval_into_its_class(happened):
    made, df = happened
    table = jumps.intervals(made[made["editor"] == "ROME"], df[df["editor"] == "ROME"])
    fig = figures_disabling.cost(table)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Earlier edits", "Never edited"]
    labels = [text.get_text() for text in fig.axes[1].get_xticklabels()]
    assert labels == ["under 2\nn = 2", "2 to 3\nn = 0", "3 to 5\nn = 0", "5 and more\nn = 1"]
    points = fig.axes[1].collections[0].get_offsets()
    assert sorted(points[:, 1]) == pytest.approx(sorted(100 * table.loc[table["kind"] == "never edited", "lost"]))
