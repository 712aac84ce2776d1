"""Figures: looks that seaborn takes, and `show` with caption, alt text and data."""

import base64
import gzip
import io
import re

import pandas as pd
import pytest
import seaborn as sns
from matplotlib import pyplot

from editcore import figures
from editcore.editors import EDITORS

pytestmark = pytest.mark.usefixtures("themed")


@pytest.fixture
def rows():
    """Two points per editor, by label."""
    return pd.DataFrame([{"editor": label, "step": step, "percent": place + step / 2}
                         for place, label in enumerate(figures.PALETTE) for step in (0, 1)])


@pytest.fixture
def displayed(monkeypatch):
    """Return what `show` displays, as in a notebook."""
    bundles = []
    monkeypatch.setattr(figures, "get_ipython", lambda: True)
    monkeypatch.setattr(figures, "display", lambda bundle, **_: bundles.append(bundle))
    return bundles


def test_every_editor_has_its_own_look():
    assert set(EDITORS) <= set(figures.LABELS)
    looks = {(color, figures.MARKERS[label]) for label, color in figures.PALETTE.items()}
    assert len(looks) == len(figures.PALETTE), "told apart by marker where a colour is used twice"
    assert not any("," in label for label in figures.PALETTE)
    assert figures.label("ft") == "FT-L" and figures.label("sst2") == "SST-2"
    assert figures.label("something else") == "something else"


def test_looks_work_in_seaborn(rows):
    sns.relplot(rows, x="step", y="percent", hue="editor", style="editor", kind="line",
                **figures.LOOK)
    pyplot.figure()
    sns.scatterplot(rows, x="step", y="percent", hue="editor", style="editor",
                    palette=figures.PALETTE, markers=figures.MARKERS)
    pyplot.figure()
    axes = sns.pointplot(rows, x="percent", y="editor", hue="editor", palette=figures.PALETTE)
    assert len(axes.get_yticklabels()) == len(figures.PALETTE)


@pytest.mark.parametrize("kind", ["figure", "axes", "array", "grid"])
def test_show_takes_figure_axes_and_grid(kind, rows, displayed):
    if kind == "grid":
        item = sns.relplot(rows, x="step", y="percent")
    else:
        figure, axes = pyplot.subplots(1, 2)
        item = {"figure": figure, "axes": axes[0], "array": axes}[kind]
    figures.show(item, "What it <b>finds</b>.", 'Two "lines".', name="both")
    page = displayed[0]["text/html"]
    assert 'alt="Two &quot;lines&quot;."' in page and "finds&lt;/b&gt;" in page
    assert '<figure id="both">' in page and "download" not in page
    assert displayed[0]["image/png"] in page
    assert base64.b64decode(displayed[0]["image/png"]).startswith(b"\x89PNG")
    assert pyplot.get_fignums() == [], "else the notebook shows it twice"


def test_the_data_comes_with_the_figure(rows, displayed):
    figures.show(pyplot.figure(), "A finding.", "Lines.", data=rows)
    page = displayed[0]["text/html"]
    link = re.search(r'download="a-finding.csv" href="data:text/csv;base64,([^"]+)"', page).group(1)
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(base64.b64decode(link))), rows)
    many = pd.concat([rows] * 500).set_index("editor")
    figures.show(pyplot.figure(), "A finding.", "Lines.", data=many)
    link = re.search(r'a-finding.csv.gz" href="data:[^,]+,([^"]+)"', displayed[1]["text/html"])
    text = gzip.decompress(base64.b64decode(link.group(1)))
    assert pd.read_csv(io.BytesIO(text), index_col="editor").shape == many.shape


@pytest.mark.parametrize("caption, alt, item, message", [
    (" ", "lines", None, "a caption and an alt text are needed"),
    ("finding", "", None, "a caption and an alt text are needed"),
    ("finding", "lines", "text", "needs a figure or axes, not str")])
def test_what_show_refuses(caption, alt, item, message):
    with pytest.raises(ValueError, match=message):
        figures.show(item or pyplot.figure(), caption, alt)


def test_the_title_of_a_panel_of_runs_breaks():
    figure, axes = pyplot.subplots(1, 2)
    axes[0].set_title("smollm2, predicted edits put in", loc="left")
    axes[1].set_title("pocket, FT-L", loc="left")
    figures.show(figure, "A finding.", "Two panels.")
    titles = [panel.get_title(loc="left") for panel in axes]
    assert titles == ["smollm2\npredicted edits put in", "pocket, FT-L"]
