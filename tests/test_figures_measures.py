"""Every figure is drawn from made-up rows with warnings as errors, and what it shows is compared with the tables."""

import numpy as np
import pandas as pd
import pytest

from editcore import figures_measures, look, measures

MANY = ("ROME", "r-ROME", "p-ROME", "EMMET", "MEMIT", "AlphaEdit", "FT-L", "one of our own")
KEY = ["measure", "editor"]


pytestmark = pytest.mark.usefixtures("themed")


def rows(editors, orders=(0, 1), n=40):
    """Rows of n edits a method and order by chance: ES and PS when made; all of it, and XS, at the end; re-tests."""
    draw, out = np.random.default_rng(5), []
    for editor in editors:
        for order in orders:
            known = {"run": f"{editor}{order}", "editor": editor, "order": order, "seed": 0}
            for metric in (*(f"{kind}{way}" for kind in ("ES", "PS") for way in ("", "_exact")), "ES_greedy",
                           *(f"final_{name}" for name in measures.MEASURES), "retest_ES", "retest_ES_exact"):
                level = 0.95 - 0.1 * ("exact" in metric) - 0.2 * ("greedy" in metric)
                out += [known | {"step": n if "_" in metric[:7] else i + 1, "fact": str(i), "metric": metric,
                                 "value": float(draw.random() < level)} for i in range(n)]
    return pd.DataFrame(out)


@pytest.fixture(scope="module", params=[("ROME", "MEMIT", "FT-L"), MANY], ids=["three", "many"])
def found(request):
    """{title: Compared} right after the edits and at the end."""
    df = rows(request.param)
    return {title: measures.compare(df, moment, n_draws=200) for title, moment in (("Right after", "made"),
                                                                                   ("At the end", "end"))}


def lines(ax, label):
    """Values of the lines with this label, one after the other."""
    return [value for line in ax.get_lines() if line.get_label() == label for value in line.get_ydata()]


def test_slopes_show_the_scores_of_every_measure(found):
    parts = {title: measures.scores(one) for title, one in found.items()}
    fig = figures_measures.slopes(parts)
    for ax, table in zip(fig.axes, parts.values()):
        for method in table["editor"].unique():
            label = look.style(method, list(table["editor"].unique()))["label"]
            wanted = table[table["editor"] == method].set_index("measure")["mean"].reindex(measures.MEASURES).dropna()
            assert lines(ax, label) == pytest.approx(list(100 * wanted))
        low, high = ax.get_ylim()
        assert low <= 100 * table["low"].min() and 100 * table["high"].max() <= high
    assert [label.get_text() for label in fig.axes[1].get_xticklabels()] == ["likelier", "tokens", "all tokens",
                                                                           "written"] * 3
    words = [text.get_text() for text in fig.axes[0].texts]
    assert "XS: the same behind unrelated text (not asked)" in words and "ES: the edited prompt" in words
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert len(labels) == table["editor"].nunique()
    assert figures_measures.slopes({"Right after": parts["Right after"]}).axes[0].get_title(loc="left") == "Right after"


def test_ranks_show_ranks_with_the_best_on_top(found):
    parts = {title: measures.scores(one) for title, one in found.items()}
    fig = figures_measures.ranks(parts, "Made up.")
    assert "Made up." in fig.get_supxlabel()
    for ax, table in zip(fig.axes, parts.values()):
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
        wanted = table[table["editor"] == "ROME"].set_index("measure")["rank"].reindex(figures_measures.CHAIN).dropna()
        assert lines(ax, "ROME") == list(wanted)


def test_legend_of_many_reads_row_by_row():
    parts = {"a": measures.scores(measures.compare(rows(MANY, n=5), n_draws=20))}
    fig = figures_measures.ranks(parts)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]   # filled column by column, two rows
    assert labels[::2] + labels[1::2] == [look.style(one, MANY)["label"] for one in look.methods_in({"editor": MANY})]


def test_verdicts_fill_one_triangle(found):
    parts = {title: measures.swaps(one) for title, one in found.items()}
    fig = figures_measures.verdicts(parts, "ES", "ES_greedy")
    for ax, table in zip(fig.axes, parts.values()):
        part = table[(table["mild"] == "ES") & (table["strict"] == "ES_greedy")]
        methods = look.methods_in({"editor": {*part["editor_a"], *part["editor_b"]}})
        assert len(ax.texts) == len(methods) * (len(methods) - 1) / 2 == len(part)
        signs = {text.get_position(): text.get_text() for text in ax.texts}
        one = part.iloc[0]
        place = tuple(sorted((methods.index(one["editor_a"]), methods.index(one["editor_b"]))))
        assert signs[place] == figures_measures.LOOKS[one["verdict"]][1]
    assert "the edited prompt: written" in fig.get_supxlabel()
    assert set(figures_measures.LOOKS) == set(measures.VERDICTS)


def test_counting_shows_both_ways_of_every_measure():
    df = rows(("ROME", "FT-L"))
    table = measures.lost(df, n_draws=200)
    fig = figures_measures.counting(table)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["ES, likelier", "ES, all tokens", "ES, written"]
    shown = sorted(x for ax in fig.axes for line in ax.get_lines() if line.get_marker() in "o^"
                   for x in np.atleast_1d(line.get_xdata()))
    assert shown == pytest.approx(sorted(100 * table["share"]))
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["ROME", "FT-L"]
