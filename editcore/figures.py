"""Give every figure of the study the same look, and show it with a caption, alt text and its data.

A notebook draws with seaborn and hands the editors' looks over by their labels:

    rows["editor"] = rows["editor"].map(figures.label)
    grid = sns.relplot(rows, x="step", y="percent", hue="editor", style="editor", kind="line",
                       **figures.LOOK)
    figures.show(grid, "ROME forgets more than MEMIT.", "Two rising lines over edits made.",
                 name="forgetting", data=rows)
"""

import base64
import gzip
import html
import io
import re

import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import display
from matplotlib import pyplot

WIDTH = 9.0         # inches: a figure's full width
DPI = 144           # pixels per inch of the stored picture: sharp on a dense screen
SCREEN = 96         # CSS pixels per inch: figures appear at their size on paper
ZIPPED = 200_000    # bytes: longer CSV files are offered as .csv.gz, which pandas reads as well

STYLES = {  # editor: label, colour, marker, dashes; told apart without colours by marker and dashes
    "rome": ("ROME", "#0173b2", "o", ""),
    "r-rome": ("r-ROME", "#56b4e9", "D", (6, 1.5)),
    "p-rome": ("p-ROME", "#332288", "v", (1, 1)),
    "nas": ("ROME + norm anchor", "#44aa99", "p", (3, 1)),
    "emmet": ("EMMET", "#cc78bc", "P", (8, 2)),
    "memit": ("MEMIT", "#d55e00", "s", (5, 2)),
    "memit-past": ("MEMIT + past keys", "#de8f05", "X", (4, 1, 1, 1)),
    "encore": ("ENCORE", "#882255", "<", (7, 2, 1, 2, 1, 2)),
    "alphaedit": ("AlphaEdit", "#111111", "H", (2, 1)),
    "rect": ("RECT", "#ca9161", "h", (9, 2, 2, 2)),
    "prune": ("PRUNE", "#8a8a1e", "d", (1, 2)),
    "ft": ("FT-L", "#029e73", "^", (5, 1.5, 1, 1.5)),
    "random": ("random updates", "#949494", "*", (1, 3)),
    "instructedit": ("InstructEdit", "#0173b2", "D", ""),
    "mend-multi": ("MEND multi-task", "#d55e00", "p", (5, 2)),
    "mend": ("MEND", "#aa4499", ">", (3, 2)),
    "ke": ("KE", "#ca9161", "v", (9, 2, 2, 2)),
    "grace": ("GRACE", "#cc78bc", "X", (4, 1, 1, 1)),
    "calinet": ("CaliNet", "#de8f05", "P", (8, 2)),
    "base": ("unedited model", "#777777", "h", (1, 1)),
}
LABELS = {editor: style[0] for editor, style in STYLES.items()}
PALETTE = {style[0]: style[1] for style in STYLES.values()}
MARKERS = {style[0]: style[2] for style in STYLES.values()}
DASHES = {style[0]: style[3] for style in STYLES.values()}
LOOK = {"palette": PALETTE, "markers": MARKERS, "dashes": DASHES}   # for seaborn's line plots
TASK_LABELS = {"recent": "Recent", "counterfact": "CounterFact", "zsre": "ZsRE",
               "convsent": "ConvSent", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA",
               "rte": "RTE"}
TASK_COLORS = {"Recent": "#029e73", "CounterFact": "#0173b2", "ZsRE": "#d55e00",
               "ConvSent": "#cc78bc", "SST-2": "#0173b2", "MRPC": "#de8f05", "CoLA": "#029e73",
               "RTE": "#cc78bc"}


def theme():
    """Set the look of figures (white grid, colour-blind palette) and of tables (three digits)."""
    pd.set_option("display.precision", 3, "display.max_colwidth", None, "display.max_columns", 40)
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.9, rc={
        "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
        "figure.dpi": 100, "axes.titlesize": 10.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.labelsize": 10, "legend.fontsize": 9.5,
        "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
        "grid.color": "#e4e4e4", "axes.edgecolor": "#888888", "font.family": "DejaVu Sans"})


def label(key):
    """Return the name of an editor or a task as figures and tables write it: "ft" is "FT-L"."""
    return LABELS.get(key, TASK_LABELS.get(key, key))


def show(figure, caption, alt, name=None, data=None):
    """Show a figure with its caption, its alt text and a link to the data that it draws.

    figure: Figure, Axes, array of Axes or seaborn grid; it is closed afterwards. caption: the
    finding; alt: what is drawn. name: of the figure's anchor and files; default: the caption's
    first words. data: DataFrame that becomes a CSV download. ValueError on an empty caption or alt
    text.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError(f"figure {name or ''}: a caption and an alt text are needed")
    figure = figure_of(figure)
    name = name or "-".join(re.findall(r"[a-z0-9]+", caption.lower())[:6])
    for axes in figure.axes:
        title = axes.get_title(loc="left")
        if ", predicted" in title:      # of `analysis.panels`, too long for a line
            axes.set_title(title.replace(", predicted", "\npredicted"), loc="left")
    png = picture(figure)
    pyplot.close(figure)    # else the notebook would show it a second time
    link = "" if data is None else download(data, name)
    encoded = base64.b64encode(png).decode()
    width = round(int.from_bytes(png[16:20], "big") * SCREEN / DPI)     # bytes 16-19: pixels across
    page = (f'<figure id="{html.escape(name)}"><img alt="{html.escape(alt)}" width="{width}" '
            f'src="data:image/png;base64,{encoded}" style="max-width:100%;height:auto">'
            f"<figcaption>{html.escape(caption)} {link}</figcaption></figure>")
    bundle = {"text/html": page, "image/png": encoded, "text/plain": f"{caption} [{alt}]"}
    if get_ipython() is not None:
        metadata = {"image/png": {"alt": alt}, "editcore": {"figure": name}}
        display(bundle, raw=True, metadata=metadata)


def hand_over(table, name, text):
    """Give a long table to the report, which makes NAME.html of it under a text in Markdown.

    The text begins with a heading; the table is written as it reads, without its index.
    """
    if get_ipython() is not None:
        bundle = {"text/plain": f"{len(table):,} rows, for {name}.html of the report",
                  "text/csv": table.to_csv(index=False)}
        display(bundle, raw=True, metadata={"editcore": {"table": name, "text": text}})


def figure_of(item):
    """Return the Figure that a Figure, an Axes, an array of Axes or a seaborn grid belongs to."""
    if isinstance(item, (np.ndarray, list, tuple)):
        item = np.ravel(item)[0]
    figure = getattr(item, "figure", item)
    if not hasattr(figure, "savefig"):
        raise ValueError(f"show() needs a figure or axes, not {type(item).__name__}")
    return figure


def picture(figure):
    """Return the figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white",
                   metadata={"Software": None})
    return buffer.getvalue()


def download(data, name):
    """Return an HTML link that holds the table itself, so that it works offline."""
    named = [part for part in data.index.names if part is not None]
    text = data.to_csv(index=bool(named), float_format="%.6g").encode()
    kind = "text/csv"
    if len(text) > ZIPPED:
        text = gzip.compress(text, mtime=0)
        kind = "application/gzip"
    file = f"{name}.csv.gz" if kind == "application/gzip" else f"{name}.csv"
    return (f'<a class="data" download="{html.escape(file)}" '
            f'href="data:{kind};base64,{base64.b64encode(text).decode()}">Data (CSV)</a>')
