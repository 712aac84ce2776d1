"""Figures of lifetimes are drawn from made-up rows with warnings as errors; points and names are compared with them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from editcore import delay, figures_delay, look

SPEEDS = {"ROME": 0.004, "MEMIT": 0.0002, "AlphaEdit": -0.0001, "FT-L": 0.02}
COLUMNS = ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value", "order"]


pytestmark = pytest.mark.usefixtures("themed")


def rows(speeds, orders=(0, 1)):
    """Runs of 100 edits that lose `speed` of never-edited facts and of perplexity an edit."""
    out = []
    for editor, speed in speeds.items():
        for order in orders:
            head = [f"{editor}{order}", "m", editor, "d", 0]
            for step in range(0, 101, 20):
                gone = min(0.95, step * speed * (1 + 0.2 * order))
                own = [("", "perplexity", 10 * (1 + gone)), ("", "sst2_f1", 1.0), ("0", "untouched_ES_exact", 1.0),
                       ("0", "untouched_ES_prob", 1 - gone)]
                out += [[*head, step, *one, order] for one in own]
            own = {"ES": 1.0, "PS": 0.8, "NS": 0.9, "ES_exact": 0.3 if editor == "FT-L" else 1.0}
            own |= {"edit_evaluations": 9.0}
            out += [[*head, step, str(step), *one, order] for step in range(1, 101) for one in own.items()]
    return pd.DataFrame(out, columns=COLUMNS)


def runs(df):
    own = df.drop_duplicates("run")
    return pd.DataFrame({"run": own["run"], "editor": own["editor"], "status": "finished", "peak_memory": 5e8,
                         "seconds_per_edit": 0.3, "batch_size": 1, "config": [{}] * len(own)})


@pytest.fixture(scope="module")
def data():
    """(rows, `delay.summary`, `delay.table`) of four methods, of which FT-L keeps too few edits."""
    df = rows(SPEEDS)
    return df, delay.summary(delay.lives(df)), delay.table(df, runs(df))


def test_losses_have_a_panel_a_method_and_a_line_an_ability(data):
    fig = figures_delay.losses(delay.lost(data[0]))
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == ["ROME", "MEMIT", "AlphaEdit", "FT-L"]
    line = next(line for line in fig.axes[0].get_lines() if line.get_marker() == "o")
    assert line.get_ydata() == pytest.approx(100 * 0.004 * 1.1 * np.arange(0, 101, 20).clip(0.1 / 0.44))
    gains = next(line for line in fig.axes[2].get_lines() if line.get_marker() == "o")
    assert set(gains.get_ydata()) == {figures_delay.FLOOR}
    assert len([line for line in fig.axes[0].get_lines() if line.get_color() == "#d5d5d5"]) == 3
    fig.canvas.draw()


def test_losses_of_one_method_need_one_panel():
    fig = figures_delay.losses(delay.lost(rows({"MEMIT": 0.001}, orders=(0,))))
    assert [ax.axison for ax in fig.axes] == [True]
    fig.canvas.draw()


def test_lifetimes_stand_where_the_summary_says(data):
    _, own, found = data
    fig = figures_delay.lifetimes(own, list(found.index))
    ax, labels = fig.axes[1], fig.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [look.style(name)["label"] for name in found.index]
    part = own[(own["ability"] == "facts_prob") & (own["editor"] == "ROME")].set_index("share")
    row, points = list(found.index).index("ROME"), {}
    for line in ax.get_lines():
        if len(line.get_xdata()) == 1 and abs(line.get_ydata()[0] - row) < 0.4:
            points[round(line.get_ydata()[0] - row, 2)] = (line.get_xdata()[0], line.get_marker())
    assert points[-0.17] == (pytest.approx(part.loc[0.01, "mean"]), "o")
    assert points[0.17] == (pytest.approx(part.loc[0.10, "mean"]), "o")
    crosses = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "x"]
    assert own.query("ability == 'facts_prob' and editor == 'MEMIT' and share == 0.1")["life"].item() in crosses
    fig.canvas.draw()


def test_choices_ring_what_nothing_beats_and_write_every_name_once(data):
    found = data[2]
    fig = figures_delay.choices(found)
    for ax in fig.axes:
        assert sorted(text.get_text() for text in ax.texts) == sorted(found.index)
    rings = [line for line in fig.axes[0].get_lines() if line.get_markersize() == 15]
    assert len(rings) == sum(bool(ranked) and not beaten for ranked, beaten in zip(found["ranked"], found["beaten_by"]))
    hollow = [line for line in fig.axes[0].get_lines() if line.get_markersize() == 7
              and line.get_markerfacecolor() == "white"]
    assert [line.get_marker() for line in hollow] == [look.style("FT-L")["marker"]]
    fig.canvas.draw()


def test_names_do_not_cover_each_other():
    speeds = {one.label: 0.001 + 0.00001 * i for i, one in enumerate(look.STYLES.values())}
    df = rows(speeds, orders=(0,))
    fig = figures_delay.choices(delay.table(df, runs(df)))
    fig.canvas.draw()
    for ax in fig.axes:
        boxes = [Text.get_window_extent(text) for text in ax.texts]     # without the line to the point
        assert not [1 for i, one in enumerate(boxes) for two in boxes[:i] if one.shrunk(0.9, 0.7).overlaps(
            two.shrunk(0.9, 0.7))]


def test_what_is_not_in_sight_stands_above_by_its_loss(data):
    found = pd.DataFrame({"life": [50.0, np.inf, np.inf, 300.0], "end": [0.2, 0.02, 0.01, 0.03]}, index=list("abcd"))
    height, top = figures_delay.heights(found, 100)
    assert height["a"] == 50 and height["d"] == 300 < top == 390 < height["b"] < height["c"]


def test_sweeps_share_methods_and_keep_their_ticks():
    tables = {}
    for words, values in {"λ": [1.0, 100.0], "layers": [(0,), (0, 1)]}.items():
        df = rows({f"{name} {i}": 0.001 * (i + 1) for name in ("memit", "rome") for i in (0, 1)})
        made = runs(df)
        made = made.assign(config=[{words: values[int(name[-1])]} for name in made["editor"]],
                           method=made["editor"].str[:-2])
        tables[words] = delay.sweep(df, made, [words])
    fig = figures_delay.sweeps(tables)
    assert len(fig.axes) == 8 and [text.get_text() for text in fig.legends[0].get_texts()] == ["MEMIT", "ROME"]
    assert [label.get_text() for label in fig.axes[-1].get_xticklabels()] == ["0", "0, 1"]
    one = figures_delay.sweeps({"λ": tables["λ"]})
    assert len(one.axes) == 4 and one.axes[0].get_xlabel() == "λ"
    line = one.axes[0].containers[0].lines[0]
    assert line.get_ydata() == pytest.approx([11, 22])
    fig.canvas.draw()
    one.canvas.draw()
