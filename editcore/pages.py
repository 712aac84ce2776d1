"""Render executed notebooks as HTML pages that load nothing, with an index and a page of cases."""

import base64
import copy
import html
import logging
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from editcore import figures
from editcore.files import atomic, read_json

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "templates"
FINDINGS = ROOT / "data" / "findings.md"    # the index page, written by hand
N_CASES = 2000      # rows on the page of cases: what a browser sorts at once
PROGRESS = r"^.*: \d+ of \d+, about \d+ s left\n?"       # lines of progress.bar
log = logging.getLogger("editcore")


def write_report(paths, out_dir, folders=()):
    """Render the executed notebooks, the cases of their runs and the index; return its path.

    paths: of the notebooks; folders: of the runs. No notebook stops the others. RuntimeError names
    those that failed, once all is written.
    """
    notebooks = {path.stem: executed_copy(path, out_dir) for path in paths}
    stems = list(notebooks)
    for place, (stem, notebook) in enumerate(notebooks.items()):
        log.info("rendering %s (%d of %d)", stem, place + 1, len(stems))
        before = stems[place - 1] if place else ""
        after = stems[place + 1] if place + 1 < len(stems) else ""
        try:
            write_page(notebook, out_dir / f"{stem}.html", before=before, after=after)
        except Exception as error:      # whatever it is, it concerns one page
            notebooks[stem] = broken_notebook(notebook, error)
            write_page(notebooks[stem], out_dir / f"{stem}.html", before=before, after=after)
    write_cases(folders, out_dir)
    index = write_index(notebooks, out_dir, folders)
    failed = {stem: failure(notebook) for stem, notebook in notebooks.items()}
    if messages := [f"{stem} failed ({reason})" for stem, reason in failed.items() if reason]:
        raise RuntimeError(f"{'; '.join(messages)}; see {index}")
    return index


def failure(notebook):
    """Return why an executed notebook is not whole, "" if it is."""
    run = notebook.metadata.get("papermill", {})
    errors = [output for cell in notebook.cells for output in cell.get("outputs", [])
              if output.output_type == "error"]
    if errors:
        return f"{errors[-1].ename}: {errors[-1].evalue}".splitlines()[0]
    whole = run.get("end_time") and not run.get("exception") and "editcore" in notebook.metadata
    return "" if whole else "it did not run to its end"


def executed_copy(path, out_dir):
    """Return the executed notebook, or its source where nothing was executed."""
    executed = out_dir / path.name
    try:
        return nbformat.read(executed, as_version=4)
    except (FileNotFoundError, ValueError):
        return nbformat.read(path, as_version=4)


def broken_notebook(notebook, error):
    """Return what is shown of a notebook that cannot be rendered: its title and why."""
    output = nbformat.v4.new_output("error", ename=type(error).__name__, evalue=str(error))
    cells = [nbformat.v4.new_markdown_cell(f"# {title(notebook)}"),
             nbformat.v4.new_code_cell(outputs=[output])]
    return nbformat.v4.new_notebook(cells=cells)


def render(executed, out_dir):
    """Render one executed notebook as out_dir/<stem>.html and return that path."""
    notebook = nbformat.read(executed, as_version=4)
    return write_page(notebook, Path(out_dir) / f"{Path(executed).stem}.html")


def write_page(notebook, path, *, before="", after="", kind="notebook"):
    """Render a notebook, its figures also as figures/<name>.png; one without end says so."""
    page, _ = exporter().from_notebook_node(shown_part(notebook), {
        "title": title(notebook), "before": before, "after": after, "kind": kind,
        "styles": styles(), "script": (TEMPLATES / "report/script.js").read_text("utf-8"),
        "failure": failure(notebook) if kind == "notebook" else "", "repository": repository()})
    page = page.replace(f"{ROOT}{os.sep}", "")      # where in the repository, not on which disk
    page = re.sub(r"<thead>.*?</thead>", lambda head: scoped(head.group(), "col"), page, flags=re.S)
    page = scoped(page, "row")
    if kind == "notebook":
        page = page.replace("</section>", f"</section>{contents(page)}", 1)
    with atomic(path) as file:
        file.write_text(page, encoding="utf-8")
    for name, output in shown_figures(notebook).items():
        with atomic(path.parent / "figures" / f"{name}.png") as file:
            file.write_bytes(base64.b64decode(output.data["image/png"]))
    return path


def shown_part(notebook):
    """Return a notebook without papermill's notes on errors and without lines of progress."""
    cells = []
    for cell in copy.deepcopy(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = re.sub(PROGRESS, "", output.text, flags=re.M)
        if not any(tag.startswith("papermill-error") for tag in cell.metadata.get("tags", [])):
            cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def scoped(text, scope):
    """Say of table headers what they head; an empty one is a cell."""
    text = re.sub(r"<th([^>]*)>\s*</th>", r"<td\1></td>", text)
    return re.sub(r"<th(?![^>]*scope=)(?=[\s>])", f'<th scope="{scope}"', text)


def contents(page):
    """Return the list of a page's sections."""
    heads = re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', page, re.S)
    items = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in heads)
    return f'<nav class="contents" aria-label="Contents"><ol>{items}</ol></nav>' if items else ""


def repository():
    """Return the repository's address as CITATION.cff has it, "" where it has none."""
    file = ROOT / "CITATION.cff"
    citation = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    return citation.get("repository-code", "")


def exporter():
    """Return nbconvert's HTML exporter with the package's own template, which loads nothing."""
    priority = ["text/html", "text/markdown", "image/svg+xml", "image/png", "text/plain"]
    config = Config({"NbConvertBase": {"display_data_priority": priority},
                     "CoalesceStreamsPreprocessor": {"enabled": True}})
    return HTMLExporter(config=config, template_name="report",
                        extra_template_basedirs=[str(TEMPLATES)])


def styles():
    """Return the style sheet and the colours of code, for light and dark screens."""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    light = light.replace("#3D7B7B", "#336666").replace("#A2F", "#9112df")      # contrast
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    sheet = (TEMPLATES / "report/style.css").read_text("utf-8")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{sheet}"


def title(notebook):
    """Return the first heading of a notebook, without its marks."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    heading = re.search(r"^#\s+(.+)$", "\n".join(sources), re.M)
    return heading.group(1).strip() if heading else "Untitled"


def shown_figures(notebook):
    """Return {name: output} of the figures that `figures.show` displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return {output.metadata["editcore"]["figure"]: output for output in outputs
            if "figure" in output.get("metadata", {}).get("editcore", {})}


def write_index(notebooks, out_dir, folders=()):
    """Write the index page: findings.md, in it figures of the notebooks and the list of reports.

    A line <!-- figure NOTEBOOK NAME --> stands for a figure, <!-- reports --> for the list.
    """
    text = FINDINGS.read_text("utf-8") if FINDINGS.is_file() else "# Reports\n<!-- reports -->"
    cells = []
    for part in re.split(r"^(<!-- .+ -->)$", text, flags=re.M):
        words = part.split()[1:-1] if part.startswith("<!--") else []
        if words[:1] == ["figure"]:
            shown = shown_figures(notebooks[words[1]]) if words[1] in notebooks else {}
            missing = nbformat.v4.new_output("stream", text=f"{words[1]} has not shown this figure")
            cells.append(nbformat.v4.new_code_cell(outputs=[shown.get(words[2], missing)]))
        else:
            source = report_list(notebooks, folders) if words == ["reports"] else part
            cells.append(nbformat.v4.new_markdown_cell(source))
    notebook = nbformat.v4.new_notebook(cells=cells)
    return write_page(notebook, out_dir / "index.html", kind="index")


def report_list(notebooks, folders):
    """Return the reports as an HTML table: question, notebook, state and time."""
    rows = []
    for stem, notebook in notebooks.items():
        reason = html.escape(failure(notebook))
        seconds = notebook.metadata.get("papermill", {}).get("duration") or 0
        state = f'<span class="failed">failed: {reason}</span>' if reason else "done"
        rows.append(f'<tr><td><a href="{stem}.html">{html.escape(title(notebook))}</a></td>'
                    f"<td>{stem}</td><td>{state}</td><td>{seconds:.0f} s</td></tr>")
    head = "<th>Question</th><th>Report</th><th>State</th><th>Time</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    seconds = sum(read_json(Path(folder) / "run.json")["seconds"] for folder in folders)
    return table + (f"<p>They rest on {len(folders)} runs of {seconds / 60:.1f} minutes, which are "
                    'kept: <a href="cases.html">which facts were edited, and what became of them?'
                    "</a></p>" if folders else "")


def write_cases(folders, out_dir):
    """Write cases.html, a table of the facts edited in runs, to be searched and sorted."""
    (out_dir / "cases.html").unlink(missing_ok=True)
    if not folders:
        return
    from editcore.study import results  # torch, which nothing else here needs

    cases = results.cases(folders)
    if cases.empty:
        return
    shown = cases.iloc[::math.ceil(len(cases) / N_CASES)]
    table = pd.DataFrame({
        "method": shown["editor"].map(figures.label), "order": shown["order"],
        "step": shown["step"], "subject": shown["subject"], "prompt": shown["prompt"],
        "new answer": shown["target_new"], "answer before": shown["answer_before"],
        "right after": shown["answer_after"], "at the end": shown["answer_end"],
        "forgotten at": shown["forgotten_at"].map("{:.0f}".format, na_action="ignore").fillna("")})
    page = table.to_html(index=False, na_rep="", border=0, classes="search")
    intro = (f"# Which facts were edited, and what became of them?\n\n{len(table):,} of "
             f"{len(cases):,} edits of all runs. *Step* counts edits of the run, *forgotten at* is "
             "the first re-test that the edit failed. Type to search, click a heading to sort.")
    output = nbformat.v4.new_output("display_data", {"text/html": page})
    cells = [nbformat.v4.new_markdown_cell(intro), nbformat.v4.new_code_cell(outputs=[output])]
    write_page(nbformat.v4.new_notebook(cells=cells), out_dir / "cases.html", kind="cases")


def publish(out_dir, target):
    """Copy a whole report and its index's figures to a folder that holds nothing else.

    The folder is written beside its place and then swapped. Raises ValueError if a notebook
    failed or the folder holds other files, FileNotFoundError without a report.
    """
    out_dir = Path(out_dir)
    target = Path(target)
    pages = sorted(out_dir.glob("*.html"))
    if out_dir / "index.html" not in pages:
        raise FileNotFoundError(f"{out_dir}: no index.html; build the report first")
    failed = [path.name for path in pages if 'class="failed"' in path.read_text("utf-8")]
    if failed:
        raise ValueError(f"{failed[0]}: a notebook failed; nothing is published")
    names = re.findall(r'<figure id="([^"]+)"', (out_dir / "index.html").read_text("utf-8"))
    files = pages + [out_dir / "figures" / f"{name}.png" for name in names]
    here = {path.name for path in target.iterdir()} if target.is_dir() else set()
    own = {path.name for path in files}
    foreign = sorted(name for name in here - own if not re.fullmatch(r"\d\d_\w+\.html", name))
    if foreign or target.is_file():
        raise ValueError(f"{target}: holds {(foreign or [target.name])[0]}, which is not of a "
                         "report; give another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=target.parent) as folder:
        new = Path(folder, "new")
        new.mkdir()
        for path in files:
            shutil.copy(path, new / path.name)
        if target.is_dir():
            target.rename(Path(folder, "old"))
        new.rename(target)
    return target / "index.html"
