"""The report on small notebooks made here: parameters, failures, skipping, offline pages."""

import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import sys
import tempfile
from functools import partial

import nbformat
import pandas as pd
import pytest

from editcore import outputs, pages, report, safety

SCRIPT = (pages.TEMPLATES / "report/script.js").read_text("utf-8")

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


def test_pages_load_nothing_and_describe_every_picture(built, page):
    for path in built[1].glob("*.html"):
        text = path.read_text("utf-8")
        assert safety.faults(text, SCRIPT) == [], path.name
        images = re.findall(r"<img\b[^>]*>", re.sub(r"<script>.*?</script>", "", text, flags=re.S))
        assert all(re.search(r'alt="[^"]+"', image) for image in images)
        assert str(report.ROOT) not in text


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


@pytest.fixture
def findings(monkeypatch, tmp_path):
    """An index page that lists the reports alone."""
    (tmp_path / "findings.md").write_text("# What?\n\n<!-- reports -->\n")
    monkeypatch.setattr(pages, "FINDINGS", tmp_path / "findings.md")


KILL = "import os, signal, sys\nprint(sys.executable)\nos.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_kernel_fails_its_page_and_the_index_and_no_other(findings, tmp_path):
    notebook(tmp_path / "nb/10_dead.ipynb", "# Dead?", "1 + 1", KILL)
    notebook(tmp_path / "nb/20_live.ipynb", "# Alive?", "2 + 2")
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="10_dead failed"):
        report.build(tmp_path / "nb", out)
    assert "This notebook failed: " in (out / "10_dead.html").read_text()
    assert ">2</pre>" in (out / "10_dead.html").read_text(), "what ran before is kept"
    assert "This notebook failed: " not in (out / "20_live.html").read_text()
    index = (out / "index.html").read_text()
    assert index.count('class="failed"') == index.count("<td>done</td>") == 1
    with pytest.raises(RuntimeError, match="10_dead.ipynb: Kernel died"):
        report.run_notebook(tmp_path / "nb/10_dead.ipynb", {}, out)


def test_a_start_that_fails_keeps_the_copy_before(findings, tmp_path, monkeypatch):
    path = notebook(tmp_path / "nb/10_a.ipynb", "# Well?", "1 + 1")
    report.build(path.parent, tmp_path / "out")
    before = (tmp_path / "out/10_a.ipynb").read_text()

    def fails(*_, **__):
        raise OSError("no socket")

    with monkeypatch.context() as patch:
        patch.setattr(report.papermill, "execute_notebook", fails)
        patch.setattr(report.processes, "in_processes", lambda work, jobs, workers: (
            (stem, pytest.raises(RuntimeError, list, work(*job)).value)
            for stem, job in jobs.items()))
        with pytest.raises(RuntimeError, match="10_a failed .it could not be executed again: 10_a"):
            report.build(path.parent, tmp_path / "out", force=True)
        with pytest.raises(RuntimeError, match="10_a.ipynb: no socket"):
            report.run_notebook(path, {}, tmp_path / "out", force=True)
    assert (tmp_path / "out/10_a.ipynb").read_text() == before


def test_a_page_that_cannot_be_rendered_costs_no_other(built, tmp_path, monkeypatch, findings):
    for name in ("00_first", "20_last"):
        shutil.copy(built[1] / f"{name}.ipynb", tmp_path)
    page = pages.write_page

    def failing(notebook, path, **more):
        if path.stem == "00_first" and "failure" not in notebook.metadata:
            raise KeyError("broken")
        return page(notebook, path, **more)

    monkeypatch.setattr(pages, "write_page", failing)
    monkeypatch.setattr(pages, "write_rows", None)
    with pytest.raises(RuntimeError, match="00_first failed .it cannot be rendered: 'broken'.; c"):
        pages.write_report([tmp_path / "00_first.ipynb", tmp_path / "20_last.ipynb"], tmp_path)
    index = (tmp_path / "index.html").read_text()
    assert "failed: it cannot be rendered" in index and index.count("<td>done</td>") == 1


@pytest.mark.parametrize("place", ["kernels", "long"])
def test_surroundings_do_not_matter(tmp_path, monkeypatch, place):
    if place == "kernels":
        spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x",
                "language": "python"}
        (tmp_path / "kernels/python3").mkdir(parents=True)
        (tmp_path / "kernels/python3/kernel.json").write_text(json.dumps(spec))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    else:
        folder = tmp_path / ("t" * 120)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
    cell = "import hashlib, sys\nhashlib.sha256(sys.executable.encode()).hexdigest()"
    path = notebook(tmp_path / "nb/10_a.ipynb", "# Well?", cell)
    page = report.run_notebook(path, {}, tmp_path / "out")
    # A page hides the checkout's own path, and so that of an interpreter in it.
    assert hashlib.sha256(sys.executable.encode()).hexdigest() in page.read_text()


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
    pages.write_rows(tmp_path / "cases.html", partial(pages.edited_facts, ["run"]))
    text = (tmp_path / "cases.html").read_text("utf-8")
    assert text.count("<tr") <= pages.N_ROWS + 1 and "&lt;b&gt;" in text and ">ROME<" in text
    assert 'class="dataframe search"' in text and safety.faults(text, SCRIPT) == []
    pages.write_rows(tmp_path / "cases.html", partial(pages.edited_facts, []))
    assert not (tmp_path / "cases.html").exists()


def test_a_table_that_is_handed_over_becomes_a_page(tmp_path, findings):
    rows = 'pd.DataFrame({"a": ["<script>", "1, 2", "ab" * 12], "n": [1, 20, 3]})'
    cell = ("import pandas as pd\nfrom editcore import figures\n"
            f"figures.hand_over({rows}, 'records', '# What did they say?')")
    path = notebook(tmp_path / "nb/30_a.ipynb", "# Well?", cell)
    out = tmp_path / "out"
    report.build(path.parent, out)
    text = (out / "records.html").read_text("utf-8")
    assert "<title>What did they say?</title>" in text and "Type to search" in text
    values = re.findall(r"<td>(.*?)</td>", text)
    assert values == ["&lt;script&gt;", "1", "1, 2", "20", "ab" * 10 + "\u200babab", "3"]
    assert 'class="dataframe search"' in text and safety.faults(text, SCRIPT) == []
    assert 'href="records.html"' in (out / "index.html").read_text("utf-8")
    assert "3 rows, for records.html" in (out / "30_a.html").read_text("utf-8")
    report.build(notebook(path, "# Well?", "1 + 1").parent, out)
    assert not (out / "records.html").exists()
    assert "records.html" not in (out / "index.html").read_text("utf-8")


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
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "20_old.html").write_text("mine")
    with pytest.raises(ValueError, match="docs: holds 20_old.html, which is not of a report"):
        pages.publish(whole, docs)
    (docs / "20_old.html").unlink()
    assert pages.publish(whole, docs) == docs / "index.html"
    names = {outputs.MANIFEST, "00_first.html", "forgetting.png", "index.html"}
    assert {path.name for path in docs.iterdir()} == names
    (whole / "00_first.html").rename(whole / "01_first.html")
    assert pages.publish(whole, docs)
    assert {path.name for path in docs.iterdir()} == names - {"00_first.html"} | {"01_first.html"}
    (docs / "thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match="docs: holds thesis.doc"):
        pages.publish(whole, docs)
    assert len(list(docs.iterdir())) == len(names) + 1
    with pytest.raises(FileNotFoundError, match="build the report first"):
        pages.publish(tmp_path / "none", tmp_path / "new")


@pytest.mark.parametrize("target", [".", "..", "/", "~", "{root}", "{root}/..", "{out}", "{out}/x",
                                    "{out}/..", "file", "file/x", "loop", "/proc/x", "{root}/data"])
def test_nothing_is_published_where_other_things_are(tmp_path, monkeypatch, target):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    target = os.path.expanduser(target.format(root=pages.ROOT, out="pages"))
    with pytest.raises(ValueError, match="give|cannot be"):
        pages.check_publish("pages", target)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_overwrites_nothing_that_it_did_not_write(built, tmp_path):
    for name in ("00_first.ipynb", "00_first.html"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name}: is there already and was not written by"):
            report.run_notebook(built[0] / "00_first.ipynb", {}, tmp_path)
        with pytest.raises(ValueError, match=f"{name}: is there already"):
            report.build(built[0], tmp_path)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()


RUNS = [    # what a page must neither run nor load
    "<script>alert(1)</script>", "<SCRIPT SRC=//a.org/b.js></SCRIPT>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://a.org/b.png' alt='b'>", '<svg onload="alert(1)"></svg>',
    '<a href="javascript:alert(1)">a</a>', '<a href=" java\tscript:alert(1)">a</a>',
    '<a href="data:text/html;base64,PHNjcmlwdD4=">a</a>', "<iframe srcdoc='<b>'></iframe>",
    "<object data='a.swf'></object>", "<embed src='a'>", "<base href='https://a.org'>",
    "<link rel=stylesheet href='https://a.org/a.css'>",
    "<p style='background: url(//a.org/b)'>p</p>",
    "<style>@import 'https://a.org/a.css';</style>", "<form action='https://a.org'></form>",
    "<body onload=alert(1)>", "<details ontoggle=alert(1) open>d</details>",
    "<math><mtext><script>alert(1)</script></mtext></math>", "<video src='//a.org/v'></video>",
    "<p class='a'onclick=alert(1)>p</p>", "<input autofocus onfocus=alert(1)>"]


@pytest.mark.parametrize("text", RUNS)
def test_what_would_run_or_load_is_found_and_cleaned(text):
    page = f"<html><body>{text}<script>{SCRIPT}</script></body></html>"
    assert safety.faults(page, SCRIPT), "found"
    assert safety.faults(safety.cleaned(text), SCRIPT) == [], "cleaned"


@pytest.mark.parametrize("text", [
    "<b>bold</b> &lt;script&gt;", '<a href="20_forgetting.html#a">20</a>', "a &amp; b &lt; c",
    '<img src="data:image/png;base64,AAAA" alt="a line">', "<p>javascript: a language</p>",
    '<a download="a.csv" href="data:text/csv;base64,AAAA">Data</a>',
    '<a href="https://arxiv.org/abs/2401.07453">paper</a>', '<p class="a" title="b">a</p>'])
def test_harmless_html_stays_as_it_is(text):
    assert safety.cleaned(text) == text and safety.faults(text, SCRIPT) == []


def test_text_of_the_data_runs_nowhere_on_a_page(tmp_path):
    cells = []
    for text in RUNS:
        data = {"text/html": f"<div>{text}</div>"}
        shown = [nbformat.v4.new_output("display_data", data),
                 nbformat.v4.new_output("display_data", {"text/markdown": f"**a** {text}"}),
                 nbformat.v4.new_output("display_data", {"text/plain": text}),
                 nbformat.v4.new_output("stream", text=text),
                 nbformat.v4.new_output("error", ename=text, evalue=text, traceback=[text])]
        cells += [nbformat.v4.new_markdown_cell(f"# {text}\n\nof {text}"),
                  nbformat.v4.new_code_cell(text, outputs=shown)]
    page = pages.write_page(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.html",
                            before='"><script>', after="<b>")
    text = page.read_text("utf-8")
    assert safety.faults(text, SCRIPT) == []
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert f'content="{html.escape(safety.policy(SCRIPT), quote=False)}"' in html.unescape(text)


@pytest.mark.parametrize("kind, source", [
    ("parameters", "import os\nos.system('touch ran')"), ("parameters", "x = open('ran', 'w')"),
    ("parameters", "x: str = __import__('os').system('touch ran')"), ("plan", "open('ran', 'w')"),
    ("plan", "runs = plans.orders.__globals__"), ("plan", "runs = plans.__class__"),
    ("plan", "runs = ec.load('pocket')"), ("plan", "runs = [x.a for x in [1]]"),
    ("plan", "while 1: 1"), ("plan", "runs = plans.orders(model, n=open('ran', 'w'))"),
    ("plan", "def f(): open('ran', 'w')"),
    ("plan", "import os"), ("plan", "runs = (lambda: 1)()"), ("plan", "runs = 9 ** 9 ** 9"),
    ("plan", "runs = plans.orders(nothing)"), ("plan", "runs = f'{model.a}'"), ("plan", "runs = ["),
    ("plan", "runs = plans.orders(model, bad=1)"), ("plan", "plans = 1\nplans.orders(1)"),
    ("plan", "runs = plans.product"), ("plan", "(plans := [])"), ("parameters", "x = 9 ** 9 ** 9")])
def test_planning_runs_no_code_of_a_notebook(tmp_path, monkeypatch, kind, source):
    monkeypatch.chdir(tmp_path)
    other = ("model: str = 'pocket'", "parameters") if kind == "plan" else ("runs = []", "plan")
    path = notebook(tmp_path / "20_x.ipynb", "# Why?", other, (source, kind))
    with pytest.raises(ValueError, match="20_x.ipynb: plan of its runs: |unknown parameter"):
        report.planned_runs(path, {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["__import__('os').system('touch ran')", "str.__class__", "1 +",
                                  "list[open('ran', 'w')]", "bytes", "(lambda: 1)()"])
def test_types_of_parameters_are_names(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = notebook(tmp_path / "20_x.ipynb", "# Why?", (f"x = 1  # type: {kind}", "parameters"))
    with pytest.raises(ValueError, match="20_x.ipynb: "):
        report.check(path, {"x": "1"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", [
    "[]", "3", "{}", '{"cells": 3}', "{", "", "\0", '{"nbformat": 4, "cells": [3]}', '{"a": NaN}',
    '{"cells": [{"cell_type": "code"}], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_what_is_no_notebook_is_one_line(tmp_path, text):
    (tmp_path / "20_x.ipynb").write_text(text)
    for call in (report.run_notebook, report.parameters, lambda path: report.build(path.parent)):
        with pytest.raises(ValueError, match="20_x.ipynb: not a notebook, or damaged") as error:
            call(tmp_path / "20_x.ipynb")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("cells, message", [
    (["", "a: int = 1", "# Parameters\na = 2\nb = 3\n", "start()"], "unknown parameter 'b'"),
    (["", "# Parameters\nb = 3\n"], "unknown parameter 'b'; known are none"),
    (["", "a: int = 1", "# Parameters\na = 2\n"], None), (["", "a = 1", "b = 2"], None),
    ([], None)])
def test_papermill_itself_hands_over_known_parameters_only(cells, message):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        report.refuse_unknown(cells)
