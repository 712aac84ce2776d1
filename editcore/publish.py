"""The rendered reports of a finished run in, a small committed copy of them under docs/ and README's figures out."""

import base64
import io
import re
import shutil
from pathlib import Path

import nbformat
from PIL import Image

from .files import atomic
from .pages import tagged, title

BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"     # the part of README.md that is generated
FIGURE = "forgetting.png"       # the study's main figure, shown in README.md


def publish(results_dir="results", docs_dir="docs", limit=6_000_000):
    """Copy the rendered reports and the main figure to docs_dir and return its index.html.

    Replaces what stands between the two marks of the README.md beside docs_dir with a table of the notebooks and what
    their cells tagged `readme` displayed as Markdown. Raises FileNotFoundError when the index or the main figure is
    missing and ValueError when a notebook did not finish or the copy would be larger than `limit` bytes; docs_dir is
    then as it was.
    """
    results, docs = Path(results_dir), Path(docs_dir)
    reports, figure = results / "reports", results / "figures" / FIGURE
    for needed in (reports / "index.html", figure):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: not there; build the report first")
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in sorted(reports.glob("[0-9][0-9]_*.ipynb"))}
    for notebook in notebooks.values():
        if not notebook.metadata.get("editcore") or notebook.metadata.get("papermill", {}).get("exception"):
            raise ValueError(f"{reports}: a notebook there did not finish; a report is published whole or not at all")
    pages = {page.name: slim(page.read_text(encoding="utf-8")).encode() for page in sorted(reports.glob("*.html"))}
    pages[FIGURE] = smaller(figure.read_bytes())
    if (size := sum(map(len, pages.values()))) > limit:
        largest = max(pages, key=lambda name: len(pages[name]))
        raise ValueError(f"{docs}: {size:,} bytes, more than {limit:,}; the largest is {largest}")
    replace_folder(docs, pages)
    findings = [text for notebook in notebooks.values() for text in markdown(notebook)]
    fill_readme(docs.resolve().parent / "README.md", [table(notebooks, docs.name), *findings])
    return docs / "index.html"


def replace_folder(folder, contents):
    """Make `folder` hold exactly the files {name: bytes}."""
    if folder.exists():
        shutil.rmtree(folder)
    for name, data in contents.items():
        with atomic(folder / name) as tmp:
            tmp.write_bytes(data)


def slim(page):
    """The page with every picture inside it stored with a palette of 256 colours, where that is smaller."""
    return re.sub(r"(?<=data:image/png;base64,)[A-Za-z0-9+/=]+",
                  lambda found: base64.b64encode(smaller(base64.b64decode(found.group()))).decode(), page)


def smaller(png):
    """PNG bytes with a palette of 256 colours, or the same bytes when that is no smaller."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)


def table(notebooks, folder):
    """README's table of the notebooks {stem: executed}; a notebook's metadata may say `full_size`: its run on a GPU."""
    head = "| Notebook | Question | Pocket model on CPU | Full size on GPU | Report |\n| --- | --- | --: | --- | --- |"
    rows = [f"| `{stem}` | {title(notebook)} | {notebook.metadata.papermill.duration / 60:.1f} min | "
            f"{notebook.metadata.get('full_size', 'not run')} | [{stem}.html]({folder}/{stem}.html) |"
            for stem, notebook in notebooks.items()]
    return "\n".join([head, *rows])


def markdown(notebook):
    """What the cells tagged `readme` displayed, as Markdown."""
    return [output.data["text/markdown"] for output in tagged(notebook, "readme") if "text/markdown" in output.data]


def fill_readme(path, texts):
    """Put `texts` between the marks of README.md; a README without marks is left alone."""
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN not in page or END not in page:
        return
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    with atomic(path) as tmp:
        tmp.write_text(f"{before}{BEGIN}\n" + "\n\n".join(texts) + f"\n{END}{after}", encoding="utf-8")
