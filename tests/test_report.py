"""The report machinery on small notebooks made here: offline pages, parameters, failures, skipping, publishing."""

import re

import nbformat
import pytest
from matplotlib import pyplot

from editcore import pages, report
from editcore.publish import BEGIN, END, fill_readme, publish, smaller

PARAMETERS = """size: int = 3  # points
name: str = "a"  # label
rate: float = 0.5
layers: list[int] = [1, 2]  # layers"""
FIGURE = """from matplotlib import pyplot
from editcore import report
report.start()
_, axes = pyplot.subplots()
_ = axes.plot(range(size))
report.show(axes, "The finding <b>", "a rising line & nothing else", name="forgetting")"""


def notebook(path, *cells):
    """Write a notebook of cells: Markdown when it starts with #, else code; (source, tag) tags it. Returns `path`."""
    made = []
    for cell in cells:
        source, tag = cell if isinstance(cell, tuple) else (cell, None)
        new = nbformat.v4.new_markdown_cell if source.startswith("#") else nbformat.v4.new_code_cell
        made.append(new(source, metadata={"tags": [tag]} if tag else {}))
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=spec), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A report of two notebooks, built once: (folder of the notebooks, folder of results, index page)."""
    folder = tmp_path_factory.mktemp("study")
    notebook(folder / "nb" / "00_first.ipynb", "# Does it rise?\n\nIt *does*.", (PARAMETERS, "parameters"), FIGURE,
             "import sys\nprint('to the log', file=sys.stderr)\nprint(size, 'points')")
    notebook(folder / "nb" / "90_report.ipynb", "# A study of lines\n\nOne answer.",
             ("import pandas\npandas.DataFrame({'score': [98.5]})", "headline"),
             ("from IPython.display import Markdown, display\ndisplay(Markdown('Lines rose in 98.5 %.'))", "readme"))
    index = report.build(folder / "nb", folder / "results" / "reports", {"00_first": {"size": 5}})
    return folder / "nb", folder / "results", index


def hosts(text):
    """Hosts named anywhere in a page, pictures aside; w3.org names the SVG format and is never asked."""
    text = re.sub(r"base64,[^\"']+", "", text)
    return re.findall(r"(?:https?:)?//(?!www\.w3\.org)[a-z0-9.-]+\.[a-z]{2,}", text, re.I)


def test_pages_name_no_host_and_describe_every_picture(built):
    _, results, index = built
    for page in sorted((results / "reports").glob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert hosts(text) == [], page.name
        assert "<script" not in text and "<link" not in text
    first = (results / "reports" / "00_first.html").read_text(encoding="utf-8")
    assert re.findall(r'<img alt="([^"]*)"', first) == ["a rising line &amp; nothing else"]
    assert first.count("<img") == 1, "the figure is shown once"
    assert "<figcaption>The finding &lt;b&gt;</figcaption>" in first
    assert "5 points" in first and "<summary>log</summary><pre>to the log" in first
    assert str(pages.home()) not in first
    assert index == results / "reports" / "index.html"


def test_index_lists_reports_headline_and_stamp(built):
    text = built[2].read_text(encoding="utf-8")
    assert "A study of lines" in text and "98.5" in text
    assert re.search(r'href="00_first.html">Does it rise\?</a><br/?><small>It does\.', text)
    for word in ("commit", "torch", "device", "wall time"):
        assert word in text


def test_figure_is_saved_beside_the_reports(built):
    png = (built[1] / "figures" / "forgetting.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(smaller(png)) < len(png)


def test_done_notebook_is_skipped_until_something_changes(built, tmp_path):
    folder, results, _ = built
    executed = results / "reports" / "00_first.ipynb"
    before = executed.stat().st_mtime_ns
    assert report.is_done(executed)
    report.run_notebook(folder / executed.name, {"size": 5}, results / "reports")
    assert executed.stat().st_mtime_ns == before
    report.run_notebook(folder / executed.name, {"size": 4}, results / "reports")
    assert executed.stat().st_mtime_ns > before and "4 points" in executed.read_text(encoding="utf-8")


def test_copy_without_its_files_is_not_done(built, tmp_path):
    executed = tmp_path / "reports" / "00_first.ipynb"
    executed.parent.mkdir()
    copy = nbformat.read(built[1] / "reports" / executed.name, as_version=4)
    nbformat.write(copy, executed)
    assert report.is_done(executed) and not report.is_done(executed, "another key")
    shown = next(output for cell in copy.cells for output in cell.get("outputs", [])
                 if "editcore" in output.get("metadata", {}))
    shown.metadata["editcore"]["files"] = [str(tmp_path / "gone.png")]
    nbformat.write(copy, executed)
    assert not report.is_done(executed)


def test_killed_run_is_not_done(built, tmp_path):
    copy = nbformat.read(built[1] / "reports" / "00_first.ipynb", as_version=4)
    copy.metadata.papermill.end_time = None     # what papermill leaves behind when it is killed
    nbformat.write(copy, tmp_path / "00_first.ipynb")
    assert not report.is_done(tmp_path / "00_first.ipynb")
    (tmp_path / "00_first.ipynb").write_text('{"cells": [', encoding="utf-8")
    assert not report.is_done(tmp_path / "00_first.ipynb")


def test_failed_run_names_cell_and_leaves_a_copy(tmp_path):
    path = notebook(tmp_path / "nb" / "10_bad.ipynb", "# Fails", "1 + 1", "raise KeyError('no such fact')")
    notebook(tmp_path / "nb" / "20_good.ipynb", "# Works", "2 + 2")
    with pytest.raises(RuntimeError, match=r"10_bad\.ipynb: cell 2 failed with KeyError: 'no such fact'"):
        report.build(path.parent, tmp_path / "results" / "reports")
    reports = tmp_path / "results" / "reports"
    assert "no such fact" in (reports / "10_bad.html").read_text(encoding="utf-8")
    assert not report.is_done(reports / "10_bad.ipynb") and report.is_done(reports / "20_good.ipynb")
    assert "<td>failed</td>" in (reports / "index.html").read_text(encoding="utf-8")
    (tmp_path / "results" / "figures").mkdir()
    (tmp_path / "results" / "figures" / "forgetting.png").write_bytes(b"")
    with pytest.raises(ValueError, match="did not finish"):
        publish(tmp_path / "results", tmp_path / "docs")


def test_lines_of_a_kernels_children_appear_once_and_in_the_log(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")   # a kernel that sees it leaves its children's output alone
    run = "subprocess.run([sys.executable, '-c', 'raise SystemExit(\"a \" + \"line\")'])"
    path = notebook(tmp_path / "nb" / "10_child.ipynb", "# Why?", f"import subprocess, sys, time\n{run}\ntime.sleep(1)")
    executed = report.run_notebook(path, {}, tmp_path / "reports")
    assert capfd.readouterr().err.splitlines() == ["10_child: a line"]
    assert "a line" in executed.read_text(encoding="utf-8")


@pytest.mark.parametrize("values, message", [
    ({"sise": 3}, r"00_first\.ipynb: unknown parameter 'sise'; known are size: int, name: str, rate: float, layers"),
    ({"size": "many"}, "size must be int, not 'many'"), ({"size": True}, "size must be int, not True"),
    ({"size": 2.5}, "size must be int"), ({"layers": [1, "x"]}, r"layers must be list\[int\]"),
    ({"name": 3}, "name must be str")])
def test_wrong_parameter_is_an_error_before_the_run(built, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        report.run_notebook(built[0] / "00_first.ipynb", values, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words_become_values_of_the_notebooks_types(built):
    path = built[0] / "00_first.ipynb"
    words = {"size": "7", "name": "7", "rate": "1", "layers": "0,1"}
    assert report.typed(path, words) == {"size": 7, "name": "7", "rate": 1, "layers": [0, 1]}
    assert report.parameters(path)["layers"].help == "layers"
    assert report.typed(path, {"layers": "4"}) == {"layers": [4]}
    with pytest.raises(ValueError, match="size must be int"):
        report.typed(path, {"size": "several"})


def test_missing_notebooks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="10_none.ipynb"):
        report.run_notebook(tmp_path / "10_none.ipynb")
    with pytest.raises(FileNotFoundError, match="no notebook named"):
        report.build(tmp_path)
    with pytest.raises(FileNotFoundError, match="10_none.ipynb"):
        report.render(tmp_path / "10_none.ipynb", tmp_path)


def test_page_that_loads_from_outside_or_shows_a_bare_picture_is_refused():
    pages.check_page('<a href="https://example.org">a link loads nothing</a><img alt="x" src="data:,">\n'
                     'the src="a.png" of a <code>&lt;img src="a.png"&gt;</code>', "page")
    for text in ('<script src="https://example.org/a.js">', '<img alt="x" src="//example.org/a.png">',
                 '<img alt="x" src="example.org.png">', "<style>@import 'https://example.org'</style>",
                 "p { background: url(http://example.org/a.png) }"):
        with pytest.raises(ValueError, match="would load .*example.org"):
            pages.check_page(text, "page")
    with pytest.raises(ValueError, match="without alternative text"):
        pages.check_page('<img alt="" src="data:,">', "page")


def test_show_wants_caption_alt_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv(pages.FIGURES, str(tmp_path))
    figure, axes = pyplot.subplots(1, 2)
    with pytest.raises(ValueError, match="caption and an alternative text"):
        pages.show(figure, "caption", " ")
    with pytest.raises(ValueError, match="needs a figure or axes, not str"):
        pages.show("figure", "caption", "shape")
    pages.show(axes, "The finding, in one line", "two empty axes")
    assert [path.name for path in tmp_path.iterdir()] == ["the-finding-in-one-line.png"]
    assert pyplot.get_fignums() == []


def test_declare_wants_files_that_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="rows.parquet"):
        report.declare(tmp_path / "rows.parquet")


def test_publish_copies_within_its_limit_and_fills_the_readme(built, tmp_path):
    docs, readme = tmp_path / "docs", tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    (docs / "old").mkdir(parents=True)
    with pytest.raises(ValueError, match="more than 100"):
        publish(built[1], docs, limit=100)
    assert (docs / "old").exists(), "a refused publication changes nothing"
    assert publish(built[1], docs) == docs / "index.html"
    assert sorted(path.name for path in docs.iterdir()) == ["00_first.html", "90_report.html", "forgetting.png",
                                                            "index.html"]
    before, rest = readme.read_text(encoding="utf-8").split(f"{BEGIN}\n")
    filled, after = rest.split(f"\n{END}")
    assert (before, after) == ("before\n", "\nafter\n")
    assert filled.endswith("\n\nLines rose in 98.5 %.") and "| `00_first` | Does it rise? | 0." in filled
    fill_readme(tmp_path / "none.md", ["text"])
    assert not (tmp_path / "none.md").exists()
    with pytest.raises(FileNotFoundError, match="build the report first"):
        publish(tmp_path, docs)
