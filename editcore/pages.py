"""Render executed notebooks, long tables and the index as HTML pages that load nothing."""

import base64
import copy
import html
import io
import itertools
import logging
import math
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from editcore import figures, safety
from editcore.files import atomic, read_json, write_json
from editcore.outputs import MANIFEST, check_folder, claim, claimed

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "templates"
FINDINGS = ROOT / "data" / "findings.md"    # the index page, written by hand
N_ROWS = 2000       # of a long table on a page: what a browser sorts at once
LONG_WORD = r"\S{20}(?=\S)"        # as broken models write them: a line may end there
PROGRESS = r"^.*: \d+ of \d+, about \d+ s left\n?"       # lines of progress.bar
CASES = {"editor": "method", "order": "order", "step": "step", "subject": "subject",
         "prompt": "prompt", "target_new": "new answer", "answer_before": "answer before",
         "answer_after": "right after", "answer_end": "at the end", "forgotten_at": "forgotten at"}
log = logging.getLogger("editcore")


def write_report(paths, out_dir, folders=(), errors=()):
    """Render the executed notebooks, their long tables and the index; return its path.

    paths: of the notebooks; folders: of the runs; errors: {stem: exception} of those not executed.
    RuntimeError names the notebooks that failed, once all is written.
    """
    notebooks = {path.stem: read_executed(out_dir / path.name) for path in paths}
    for stem, error in dict(errors).items():
        if not failure(notebooks[stem]):    # an earlier copy, which is whole
            notebooks[stem].metadata["failure"] = f"it could not be executed again: {error}"
    stems = ["", *notebooks, ""]
    for before, stem, after in zip(stems, notebooks, stems[2:]):
        log.info("rendering %s", stem)
        around = {"before": before, "after": after}
        try:
            write_page(notebooks[stem], out_dir / f"{stem}.html", **around)
        except Exception as error:
            notebooks[stem] = not_rendered(error)
            write_page(notebooks[stem], out_dir / f"{stem}.html", **around)
    failed = {stem: failure(notebook) for stem, notebook in notebooks.items()}
    tables = {"cases": partial(edited_facts, folders),
              "records": partial(handed_over, notebooks, "records")}
    for name, rows in tables.items():
        try:
            write_rows(out_dir / f"{name}.html", rows)
        except Exception as error:
            failed[name] = failure(not_rendered(error))
    index = write_index(notebooks, out_dir, folders)
    if messages := [f"{stem} failed ({reason})" for stem, reason in failed.items() if reason]:
        raise RuntimeError(f"{'; '.join(messages)}; see {index}")
    return index


def not_rendered(error):
    """Return an empty notebook that says why there is no page."""
    return new_notebook(metadata={"failure": f"it cannot be rendered: {error}"})


def outputs(notebook):
    """Return the outputs of all cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def failure(notebook):
    """Return why an executed notebook is not whole, "" if it is."""
    run = notebook.metadata.get("papermill", {})
    if reason := notebook.metadata.get("failure"):
        return " ".join(reason.split())
    for output in outputs(notebook):
        if output.output_type == "error":
            return f"{output.ename}: {output.evalue}".strip().splitlines()[0]
    whole = run.get("end_time") and not run.get("exception") and "editcore" in notebook.metadata
    return "" if whole else "it did not run to its end"


def read_executed(path):
    """Return an executed notebook, an empty one where it is missing or cut off."""
    try:
        return read_notebook(path)
    except (FileNotFoundError, ValueError):
        return new_notebook()


def read_notebook(path):
    """Read a notebook; FileNotFoundError or ValueError names a file that is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such notebook")
    try:
        with warnings.catch_warnings(action="ignore"):      # of cells without ids
            notebook = nbformat.read(path, as_version=4)
            nbformat.validate(notebook)
    except Exception as error:      # nbformat raises whatever a damaged file makes it stumble on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a notebook, or damaged ({reason[:200]})") from error
    return notebook


def write_page(notebook, path, *, before="", after="", kind="notebook"):
    """Render a notebook, its figures also as figures/<name>.png; one without end says so."""
    script = (TEMPLATES / "report/script.js").read_text("utf-8")
    shown = copy.deepcopy(notebook)
    for output in outputs(shown):
        if output.output_type == "stream":
            output.text = re.sub(PROGRESS, "", output.text, flags=re.M)
    page, _ = exporter().from_notebook_node(shown, {
        "title": title(notebook), "before": before, "after": after, "kind": kind,
        "styles": styles(), "script": script, "policy": safety.policy(script),
        "failure": failure(notebook) if kind == "notebook" else ""})
    page = page.replace(f"{ROOT}{os.sep}", "")      # where in the repository, not on which disk
    page = re.sub(r"<thead>.*?</thead>", lambda head: scoped(head.group(), "col"), page, flags=re.S)
    page = scoped(page, "row")
    if kind == "notebook":
        page = page.replace("</section>", f"</section>{contents(page)}", 1)
    if found := safety.faults(page, script):
        raise ValueError(f"the page would run or load {found[0]}")
    pictures = {f"figures/{name}.png": output for name, output in shown_figures(notebook).items()}
    claim(path.parent, [path.name, *pictures])
    with atomic(path) as file:
        file.write_text(page, encoding="utf-8", errors="replace")
    for name, output in pictures.items():
        with atomic(path.parent / name) as file:
            file.write_bytes(base64.b64decode(output.data["image/png"]))
    return path


def scoped(text, scope):
    """Say of table headers what they head; an empty one is a cell."""
    text = re.sub(r"<th([^>]*)>\s*</th>", r"<td\1></td>", text)
    return re.sub(r"<th(?![^>]*scope=)(?=[\s>])", f'<th scope="{scope}"', text)


def contents(page):
    """Return the list of a page's sections."""
    heads = re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', page, re.S)
    items = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in heads)
    return f'<nav class="contents" aria-label="Contents"><ol>{items}</ol></nav>' if items else ""


def exporter():
    """Return nbconvert's HTML exporter with the package's own template, which loads nothing."""
    config = Config({
        "NbConvertBase": {"display_data_priority": ["text/html", "text/markdown", "image/png",
                                                    "text/plain"]},
        "CoalesceStreamsPreprocessor": {"enabled": True},
        "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": [
            "papermill-error-cell-tag"]}})
    exporter = HTMLExporter(config=config, template_name="report",
                            extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("safe_html", safety.cleaned)
    return exporter


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
    return {re.sub(r"[^\w.-]|^\.", "_", output.metadata["editcore"]["figure"]): output
            for output in outputs(notebook) if "figure" in note(output)}


def note(output):
    """Return what `figures` noted of an output: {"figure": name}, or "table" and its text."""
    return output.get("metadata", {}).get("editcore", {})


def write_index(notebooks, out_dir, folders=()):
    """Write the index page: findings.md, where <!-- figure NOTEBOOK NAME --> and <!-- reports -->
    stand for a figure and for the list of reports.
    """
    cells = []
    for part in re.split(r"^(<!-- .+ -->)$", FINDINGS.read_text("utf-8"), flags=re.M):
        words = part.split()[1:-1] if part.startswith("<!--") else []
        if words[:1] == ["figure"]:
            shown = shown_figures(notebooks[words[1]]) if words[1] in notebooks else {}
            missing = new_output("stream", text=f"{words[1]} has not shown this figure")
            cells.append(new_code_cell(outputs=[shown.get(words[2], missing)]))
        else:
            source = report_list(notebooks, folders) if words == ["reports"] else part
            cells.append(new_markdown_cell(source))
    return write_page(new_notebook(cells=cells), out_dir / "index.html", kind="index")


def report_list(notebooks, folders):
    """Return the reports as a Markdown table: question, notebook, state and time."""
    lines = ["| Question | Report | State | Time |", "|--|--|--|--:|"]
    for stem, notebook in notebooks.items():
        reason = html.escape(failure(notebook)).replace("|", "&#124;")
        seconds = notebook.metadata.get("papermill", {}).get("duration") or 0
        state = f'<span class="failed">failed: {reason}</span>' if reason else "done"
        question = html.escape(title(notebook))
        lines.append(f"| [{question}]({stem}.html) | {stem} | {state} | {seconds:.0f} s |")
    if folders:
        seconds = sum(read_json(Path(folder) / "run.json")["seconds"] for folder in folders)
        lines.append(f"\nThey rest on {len(folders)} runs of {seconds / 60:.1f} minutes, which are "
                     "kept: [which facts were edited, and what became of them?](cases.html)")
    if not handed_over(notebooks, "records")[1].empty:
        lines.append("\nSingle records of the trained editors: [what was wanted, and what did the "
                     "model answer?](records.html)")
    return "\n".join(lines)


def edited_facts(folders):
    """Return (text, table) of the facts edited in runs, for cases.html."""
    if not folders:
        return "", pd.DataFrame()
    from editcore.study import results  # torch, which nothing else here needs

    cases = results.cases(folders)
    shown = cases.iloc[::math.ceil(len(cases) / N_ROWS) or 1].reindex(columns=list(CASES))
    text = (f"# Which facts were edited, and what became of them?\n\n{len(shown):,} of "
            f"{len(cases):,} edits of all runs. *Step* counts edits of the run, *forgotten at* is "
            "the first re-test that the edit failed.")
    return text, shown.assign(editor=shown["editor"].map(figures.label)).rename(columns=CASES)


def handed_over(notebooks, name):
    """Return (text, table of texts) of a notebook's `figures.hand_over`, both empty without."""
    for output in itertools.chain.from_iterable(map(outputs, notebooks.values())):
        if note(output).get("table") == name:
            rows = io.StringIO(output.data["text/csv"])
            return note(output)["text"], pd.read_csv(rows, dtype=str, keep_default_na=False)
    return "", pd.DataFrame()


def write_rows(path, rows):
    """Write a page on which a table is searched and sorted; rows() returns (text, table).

    A page of an earlier report goes first, also where the table is empty and there is none.
    """
    if path.name in claimed(path.parent):
        path.unlink(missing_ok=True)
    text, table = rows()
    if table.empty:
        return
    wrapped = table.head(N_ROWS).replace(LONG_WORD, "\\g<0>\u200b", regex=True)
    page = wrapped.to_html(index=False, na_rep="", border=0, classes="search",
                           float_format="{:.0f}".format)
    output = new_output("display_data", {"text/html": page})
    cells = [new_markdown_cell(f"{text}\n\nType to search, click a heading to sort."),
             new_code_cell(outputs=[output])]
    write_page(new_notebook(cells=cells), path, kind="rows")


def publish(out_dir, target):
    """Copy a whole report and its index's figures to a folder that holds nothing else.

    Each file takes its place whole; then what an earlier report left there goes.
    """
    target = check_publish(out_dir, target)
    index = Path(out_dir) / "index.html"
    if not index.is_file():
        raise FileNotFoundError(f"{out_dir}: no index.html; build the report first")
    text = index.read_text("utf-8")
    if 'class="failed"' in text:
        raise ValueError(f"{index}: a notebook failed; nothing is published")
    names = re.findall(r'<figure id="([^"]+)"', text)
    pictures = [index.parent / f"figures/{name}.png" for name in names]
    files = {path.name: path for path in [*index.parent.glob("*.html"), *pictures]}
    earlier = claimed(target)
    claim(target, files)
    for name, path in files.items():
        with atomic(target / name) as file:
            shutil.copyfile(path, file)
    for name in earlier - set(files):
        (target / name).unlink(missing_ok=True)
    write_json(target / MANIFEST, {"files": sorted(files)})
    return target / "index.html"


def check_publish(out_dir, target):
    """Return the folder to publish into; ValueError if it holds, or is, anything but a report."""
    path = check_folder(target)
    for place in (ROOT, Path.cwd(), Path(os.path.expanduser("~"))):
        if path in (place, *place.parents):
            raise ValueError(f"{target}: holds {place}; give a folder that is the report's alone")
    source = Path(out_dir).resolve()
    if path == source or source in path.parents or path in source.parents:
        raise ValueError(f"{target}: is, holds or lies in {out_dir}; give another folder")
    present = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if foreign := sorted(present - claimed(path) - {MANIFEST}):
        raise ValueError(f"{target}: holds {foreign[0]}, which is not of a report; give another "
                         "folder")
    return path
