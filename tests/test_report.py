"""The report on small notebooks made here: parameters, failures, skipping, offline pages."""

import re

import nbformat
import pandas as pd
import pytest

from editcore import pages, report

PARAMETERS = """size: int = 3  # points
name: str = "a"  # label
rate: float = 0.5
layers: list[int] = [1, 2]  # layers
settings: dict = {}"""
FIGURE = """from matplotlib import pyplot
from editcore import figures
_, axes = pyplot.subplots()
_ = axes.plot(range(size))
figures.show(axes, "The finding <b>", "a rising line & nothing else", name="forgetting")"""
TABLE = "import pandas\npandas.DataFrame({'<i>': [98.5], 'text': ['<script>alert(1)</script>']})"


def notebook(path, *cells):
    """Write a notebook of cells: Markdown when it starts with #; (source, tag) tags one."""
    nodes = []
    for cell in cells:
        source, tag = cell if isinstance(cell, tuple) else (cell, None)
        new = nbformat.v4.new_code_cell
        if source.startswith("#"):
            new = nbformat.v4.new_markdown_cell
        nodes.append(new(source, metadata={"tags": [tag]} if tag else {}))
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=nodes, metadata={"kernelspec": spec}), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A report of three notebooks, one of which fails: (folder of notebooks, folder of pages)."""
    folder = tmp_path_factory.mktemp("study")
    notebook(folder / "nb/00_first.ipynb", "# Does it rise?\n\nIt *does*.",
             (PARAMETERS, "parameters"), "## What it shows", FIGURE, TABLE,
             "import sys\nprint('to the log', file=sys.stderr)\nprint(size, 'points')",
             "from editcore import report\nreport.provenance()")
    notebook(folder / "nb/10_bad.ipynb", "# Does it fail?", "1 + 1", "raise KeyError('no <fact>')")
    notebook(folder / "nb/20_last.ipynb", "# What is left?", "2 + 2")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(pages, "FINDINGS", folder / "findings.md")
    pages.FINDINGS.write_text("# What did the study find?\n\n| a | b |\n|--|--|\n| x | y |\n\n"
                              "<!-- figure 00_first forgetting -->\n\n"
                              "<!-- figure 10_bad none -->\n\n## Reports\n\n<!-- reports -->\n")
    with pytest.raises(RuntimeError, match=r"10_bad failed \(KeyError: 'no <fact>'\); see .*index"):
        report.build(folder / "nb", folder / "pages", {"00_first": {"size": 5}})
    monkeypatch.undo()
    return folder / "nb", folder / "pages"


@pytest.fixture
def page(built):
    """Return a function that reads a page."""
    return lambda name: (built[1] / f"{name}.html").read_text("utf-8")


def loads(text):
    """Return what a page would load from outside itself."""
    tag = r"<(?:script|img|iframe|source|video|audio|embed|link|object)\b[^>]*?\s"
    start = rf"(?:{tag}(?:src|href|srcset|data)\s*=|url\(|@import)"
    return re.findall(rf"""{start}\s*["']?((?!data:|[#\s"'])[^\s"')>]+)""", text, re.I)


def test_pages_load_nothing_and_describe_every_picture(built, page):
    for path in built[1].glob("*.html"):
        text = path.read_text("utf-8")
        assert loads(text) == [], path.name
        images = re.findall(r"<img\b[^>]*>", re.sub(r"<script>.*?</script>", "", text, flags=re.S))
        assert all(re.search(r'alt="[^"]+"', image) for image in images)
        assert str(report.ROOT) not in text
    assert loads('<script src="https://a.org/b.js"><p style="background: url(//a.org/b)">')


def test_a_page_has_contents_figure_table_log_and_its_neighbours(page):
    text = page("00_first")
    assert '<li><a href="#What-it-shows">What it shows</a></li>' in text
    assert "<figcaption>The finding &lt;b&gt;" in text and text.count("<img") == 1
    assert '<th scope="col">&lt;i&gt;</th>' in text and '<th scope="row">0</th>' in text
    assert "<td></td>" in text, "an empty header is none"
    assert "5 points" in text and "<summary>Log</summary><pre>to the log" in text
    assert "&lt;script&gt;alert(1)" in text and "<script>alert" not in text
    assert 'href="10_bad.html" rel="next"' in text and 'rel="prev"' not in text
    assert "https://arxiv.org/abs/2401.07453" in text and "https://arxiv.org/abs/2402.16123" in text
    assert "#3d7b7b" not in text.lower() and '<details class="code">' in text
    assert re.search(r"editcore [\d.]+, commit", text), "provenance"


def test_a_failed_notebook_says_so_on_its_page_and_on_the_index(page):
    assert "This notebook failed: KeyError: 'no &lt;fact&gt;'" in page("10_bad")
    assert "papermill-error" not in page("10_bad")
    index = page("index")
    assert re.search(r'href="10_bad.html">Does it fail\?</a></td>\s*<td>10_bad</td>\s*<td>'
                     r'<span class="failed">failed: KeyError', index)
    assert index.count("<td>done</td>") == 2
    assert '<figure id="forgetting">' in index and "What did the study find?" in index


def test_a_damaged_or_missing_copy_is_shown_as_failed(built, tmp_path):
    (tmp_path / "00_first.ipynb").write_text('{"cells": [')
    with pytest.raises(RuntimeError, match="00_first failed .it did not run to its end"):
        pages.write_report(sorted(built[0].glob("*.ipynb")), tmp_path)


def test_a_notebook_is_run_again_only_if_something_changed(built):
    folder, out = built
    executed = out / "00_first.ipynb"
    before = executed.stat().st_mtime_ns
    assert report.is_done(executed) and not report.is_done(out / "10_bad.ipynb")
    page = report.run_notebook(folder / executed.name, {"size": 5}, out)
    assert page == executed.with_suffix(".html")
    assert executed.stat().st_mtime_ns == before
    copy = nbformat.read(executed, as_version=4)
    key = report.notebook_key(folder / executed.name, {"size": 5})
    assert copy.metadata.editcore.key == key
    assert report.notebook_key(folder / executed.name, {"size": 4}) != key
    copy.metadata.papermill.end_time = None     # what papermill leaves behind when it is killed
    assert pages.failure(copy) == "it did not run to its end"


def test_a_failed_cell_is_named(built, tmp_path):
    with pytest.raises(RuntimeError, match="10_bad.ipynb: cell 2 failed with KeyError: 'no <fac"):
        report.run_notebook(built[0] / "10_bad.ipynb", {}, tmp_path)


@pytest.mark.parametrize("values, message", [
    ({"sise": 3}, r"00_first.ipynb: unknown parameter 'sise'; known are size: int, name: str"),
    ({"size": "many"}, "size must be int, not 'many'"), ({"size": True}, "size must be int"),
    ({"size": 2.5}, "size must be int"), ({"layers": [1, "x"]}, r"layers must be list\[int\]"),
    ({"name": 3}, "name must be str"), ({"settings": [1]}, "settings must be dict"),
    ({"layers": "[1"}, "layers must be"), ({"rate": "fast"}, "rate must be float, not 'fast'")])
def test_wrong_parameter_is_an_error_before_the_run(built, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        report.run_notebook(built[0] / "00_first.ipynb", values, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_become_values_of_the_notebooks_types(built):
    path = built[0] / "00_first.ipynb"
    words = {"size": "7", "name": "7", "rate": "1e-3", "layers": "0,1",
             "settings": "{rome: {layer: 3}}"}
    assert report.check(path, words) == {"size": 7, "name": "7", "rate": 0.001, "layers": [0, 1],
                                         "settings": {"rome": {"layer": 3}}}
    assert report.check(path, {"layers": "4"}) == {"layers": [4]}
    assert report.parameters(path)["layers"]["help"] == "layers"


def test_runs_are_planned_without_a_start(tmp_path):
    path = notebook(tmp_path / "20_x.ipynb", "# Why?",
                    ("model: str = 'pocket'\nn_edits: int = 9\nresults: str = 'r'", "parameters"),
                    ("runs = plans.orders(model, n_edits=n_edits)", "plan"))
    folder, runs = report.planned_runs(path, {"n_edits": 4})
    assert folder == "r/runs" and len(runs) == 6 and {run.n_edits for run in runs} == {4}


def test_missing_notebooks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="10_none.ipynb"):
        report.run_notebook(tmp_path / "10_none.ipynb")
    with pytest.raises(FileNotFoundError, match="no notebook named"):
        report.build(tmp_path)
    with pytest.raises(ValueError, match="parameters for 30_y"):
        report.build(notebook(tmp_path / "20_x.ipynb", "# Why?").parent, parameters={"30_y": {}})


def test_cases_are_a_table_of_text(tmp_path, monkeypatch):
    cases = pd.DataFrame({"editor": "rome", "order": 0, "step": range(5000), "subject": "<b>",
                          "prompt": "p", "target_new": "n", "answer_before": "a",
                          "answer_after": "b", "answer_end": "c",
                          "forgotten_at": [None, 20] * 2500})
    monkeypatch.setattr("editcore.study.results.cases", lambda folders: cases)
    pages.write_cases(["run"], tmp_path)
    text = (tmp_path / "cases.html").read_text("utf-8")
    assert text.count("<tr") <= pages.N_CASES + 1 and "&lt;b&gt;" in text and ">ROME<" in text
    assert 'class="dataframe search"' in text and loads(text) == []
    pages.write_cases([], tmp_path)
    assert not (tmp_path / "cases.html").exists()


def test_a_report_is_published_whole_or_not_at_all(built, tmp_path):
    with pytest.raises(ValueError, match="index.html: a notebook failed"):
        pages.publish(built[1], tmp_path / "docs")
    whole = tmp_path / "pages"
    for name in ("index.html", "00_first.html"):
        text = (built[1] / name).read_text("utf-8").replace('class="failed"', "")
        whole.mkdir(exist_ok=True)
        (whole / name).write_text(text)
    (whole / "figures").mkdir()
    (whole / "figures/forgetting.png").write_bytes(b"png")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/20_old.html").write_text("old")
    (tmp_path / "docs/thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match="docs: holds thesis.doc, which is not of a report"):
        pages.publish(whole, tmp_path / "docs")
    (tmp_path / "docs/thesis.doc").unlink()
    assert pages.publish(whole, tmp_path / "docs") == tmp_path / "docs/index.html"
    names = sorted(path.name for path in (tmp_path / "docs").iterdir())
    assert names == ["00_first.html", "forgetting.png", "index.html"]
    with pytest.raises(FileNotFoundError, match="build the report first"):
        pages.publish(tmp_path / "none", tmp_path / "docs")
