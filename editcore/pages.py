"""Executed notebooks in, offline self-contained HTML pages out; and `show`, the one way a figure gets into them."""

import base64
import html
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
from IPython import get_ipython
from IPython.display import display
from matplotlib import pyplot
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from .files import atomic

DPI = 144           # pixels an inch of the stored figures: sharp on a dense screen
SCREEN = 96         # pixels an inch of a CSS inch: figures appear at their size on paper
FIGURES = "EDITCORE_FIGURES"    # environment variable with the folder for figures, set by report.run_notebook


def home():
    """The repository root: the nearest folder above the working one, else above the package, that has notebooks/."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if (folder / "editcore" / "__init__.py").is_file():
            return folder
    return Path.cwd()


def show(figure, caption, alt, name=None):
    """Show a figure with its caption (the finding) and its alternative text (the shape), and save it as PNG.

    `figure` is a Figure, Axes, an array of Axes or a seaborn grid. One MIME bundle is shown: text/html with the image
    inside, image/png and text/plain beside it. The PNG goes to results/figures/<name>.png; `name` defaults to the
    first words of the caption. The figure is closed, so that nothing is shown twice. Raises ValueError on an empty
    caption or alternative text.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError(f"figure {name or ''}: a caption and an alternative text are needed")
    figure = figure_of(figure)
    png, width = picture(figure)
    words = re.findall(r"[a-z0-9]+", caption.lower())
    path = Path(os.environ.get(FIGURES, "results/figures")) / f"{name or '-'.join(words[:6])}.png"
    with atomic(path) as tmp:
        tmp.write_bytes(png)
    pyplot.close(figure)    # else the notebook's own display would show it a second time
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    page = (f'<figure><img alt="{html.escape(alt)}" src="{source}" width="{width}" style="max-width:100%;height:auto">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    bundle = {"text/html": page, "image/png": base64.b64encode(png).decode(), "text/plain": f"{caption} [{alt}]"}
    emit(bundle, [path], {"image/png": {"alt": alt}})


def declare(*paths):
    """Say which files this notebook made: a line in the report, and the notebook counts as done only while they exist.

    Raises FileNotFoundError when one of them is not there.
    """
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"declared but not made: {', '.join(missing)}")
    emit({"text/plain": "made " + ", ".join(str(relative(path)) for path in paths)}, paths, {})


def emit(bundle, paths, metadata):
    """Display a MIME bundle that carries the names of the files behind it; nothing happens outside a notebook."""
    if get_ipython() is not None:
        files = [str(relative(path)) for path in paths]
        display(bundle, raw=True, metadata={**metadata, "editcore": {"files": files}})


def relative(path):
    """`path` as seen from the working folder when it lies inside it, else unchanged."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


def figure_of(item):
    """The Figure that a Figure, an Axes, an array of Axes or a seaborn grid belongs to."""
    item = np.ravel(item)[0] if isinstance(item, (np.ndarray, list, tuple)) else item
    figure = getattr(item, "figure", item)
    if not hasattr(figure, "savefig"):
        raise ValueError(f"show() needs a figure or axes, not {type(item).__name__}")
    return figure


def picture(figure):
    """The figure as PNG bytes, and the width in CSS pixels at which it has its size on paper."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    png = buffer.getvalue()
    return png, round(int.from_bytes(png[16:20], "big") * SCREEN / DPI)  # bytes 16-19 of a PNG are its width



def render(executed, out_dir, index=None):
    """Write the executed notebook as out_dir/<stem>.html and return that path; `index` is the page it links back to.

    The page loads nothing from outside: styles and pictures are inside it. Raises FileNotFoundError without notebook
    and ValueError when its content would load something else or shows a picture without description.
    """
    executed = Path(executed)
    if not executed.is_file():
        raise FileNotFoundError(f"{executed}: no such notebook")
    return write_page(nbformat.read(executed, as_version=4), Path(out_dir) / f"{executed.stem}.html", index)


def write_page(notebook, path, index=None):
    """Render a notebook node to `path`."""
    text, _ = exporter().from_notebook_node(notebook, resources={
        "title": title(notebook), "index": index, "styles": styles(), "run": notebook.metadata.get("editcore", {}),
        "failure": notebook.metadata.get("papermill", {}).get("exception")})
    text = text.replace(f"{home()}{os.sep}", "")  # tracebacks and paths say where in the repository, not on which disk
    check_page(text, path)
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return path


def exporter():
    """nbconvert's HTML exporter with this package's own template, which names no script and no style sheet."""
    priority = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
    config = Config({"NbConvertBase": {"display_data_priority": priority},
                     "CoalesceStreamsPreprocessor": {"enabled": True},      # one folded log a cell, not one a line
                     "HTMLExporter": {"exclude_anchor_links": True}})
    return HTMLExporter(config=config, template_name="report",
                        extra_template_basedirs=[str(Path(__file__).parent / "templates")])


def styles():
    """The page's style sheet and the colours of code, for light and dark screens."""
    sheet = (Path(__file__).parent / "templates" / "report" / "style.css").read_text(encoding="utf-8")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    plain = "\n.highlight, .highlight .err { background: none; border: none }\n"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{plain}{sheet}"


def check_page(text, name):
    """ValueError when a page would load something from outside itself or holds a picture without alternative text."""
    tag = r"<(?:script|img|iframe|source|video|audio|embed|link|object)\b[^>]*?\s(?:src|href|srcset|data)\s*="
    loads = re.findall(rf"""(?:{tag}|url\(|@import)\s*["']?((?!data:|[#\s"'])[^\s"')>]+)""", text, re.I)
    if loads:
        raise ValueError(f"{name}: would load {loads[0]}; a report must hold all that it shows")
    bare = [tag[:80] for tag in re.findall(r"<img\b[^>]*>", text, re.I) if not re.search(r'\balt\s*=\s*"[^"]+"', tag)]
    if bare:
        raise ValueError(f"{name}: picture without alternative text ({bare[0]}…); show figures with report.show")


def title(notebook):
    """The first heading of a notebook, without its marks."""
    heading = re.search(r"^#+\s+(.+)$", prose(notebook), re.M)
    return heading.group(1).strip() if heading else "Untitled"


def summary(notebook):
    """The first sentence under the first heading, as Markdown."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", prose(notebook))]
    text = next((" ".join(part.split()) for part in paragraphs if part and not part.startswith("#")), "")
    return re.split(r"(?<=[.?!])\s", text)[0]


def prose(notebook):
    """The first Markdown cell that has a heading."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown" and "papermill-error" not in
             "".join(cell.metadata.get("tags", []))]
    return next((source for source in cells if source.lstrip().startswith("#")), "")


def tagged(notebook, tag):
    """The displayed outputs of the code cells that carry `tag`."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and tag in cell.metadata.get("tags", [])]
    return [output for cell in cells for output in cell.outputs if "data" in output]


def index_page(notebooks, lead, stamp, path):
    """Write the index: `lead` Markdown, what cells tagged `headline` showed, the list of pages, the stamp.

    `notebooks` maps a file stem to its executed notebook, in reading order; `stamp` maps a name to text.
    Returns `path`.
    """
    outputs = [output for notebook in notebooks.values() for output in tagged(notebook, "headline")]
    cells = [nbformat.v4.new_markdown_cell(lead),
             nbformat.v4.new_code_cell("", outputs=outputs, metadata={"transient": {"remove_source": True}}),
             nbformat.v4.new_markdown_cell(contents(notebooks)), nbformat.v4.new_markdown_cell(stamp_table(stamp))]
    write_page(nbformat.v4.new_notebook(cells=cells), path)
    return path


def contents(notebooks):
    """The reports as an HTML table: question, first sentence, wall time; a failed one says so."""
    rows = []
    for stem, notebook in notebooks.items():
        run = notebook.metadata.get("papermill", {})
        failed = run.get("exception") or not run.get("end_time")
        state = "failed" if failed else f"{run.get('duration') or 0:.0f} s"
        rows.append(f'<tr><td><a href="{stem}.html">{html.escape(title(notebook))}</a><br>'
                    f"<small>{html.escape(plain(summary(notebook)))}</small></td><td>{stem}</td><td>{state}</td></tr>")
    head = '<table class="contents"><thead><tr><th>Question</th><th>Notebook</th><th>Wall time</th></tr></thead><tbody>'
    return f"## Reports\n\n{head}{''.join(rows)}</tbody></table>"


def plain(markdown):
    """Markdown without emphasis, code marks and link targets."""
    return re.sub(r"[*`]|(?<!\w)_|_(?!\w)", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown))


def stamp_table(stamp):
    """The provenance as an HTML table of two columns."""
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in stamp.items())
    return f'## Made from\n\n<table class="stamp"><tbody>{rows}</tbody></table>'
