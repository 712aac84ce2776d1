"""A method's name in, the one way it is drawn out: theme, styles, curves with their intervals, legends and notes.

Every figure draws a method in the same colour, with the same marker and the same dash (`STYLES`) and says under its
panels what a line and a band are and for how many runs they stand. Figures are opaque white and 9 inches wide, so that
they read on dark pages and in a README.
"""

import re
from dataclasses import dataclass

import matplotlib.colors
import numpy as np
import pandas as pd
import seaborn as sns
from scipy import stats

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "rte": "RTE"}     # few-shot tasks as they are written
WIDTH = 9.0  # inches: 900 px at 100 dots an inch


@dataclass(frozen=True)
class Style:
    """How one method is drawn, everywhere."""

    label: str   # the name in legends; "" is the editor's own name
    color: str   # of lines and markers
    marker: str  # matplotlib marker
    dash: tuple  # on-off pattern in points; () is a solid line


STYLES = {      # colours stay apart for colour-blind readers; those of a family also by marker and dash
    "rome": Style("ROME", "#0173b2", "o", ()),
    "r-rome": Style("r-ROME", "#56b4e9", "D", (6, 1.5)),
    "p-rome": Style("p-ROME", "#332288", "v", (1, 1)),
    "nas": Style("ROME, norm anchor", "#44aa99", "p", (3, 1)),
    "emmet": Style("EMMET", "#cc78bc", "P", (8, 2)),
    "memit": Style("MEMIT", "#d55e00", "s", (5, 2)),
    "memit-past": Style("MEMIT, past keys", "#de8f05", "X", (4, 1, 1, 1)),
    "encore": Style("ENCORE", "#882255", "<", (7, 2, 1, 2, 1, 2)),
    "alphaedit": Style("AlphaEdit", "#111111", "H", (2, 1)),
    "rect": Style("RECT", "#ca9161", "h", (9, 2, 2, 2)),
    "prune": Style("PRUNE", "#8a8a1e", "d", (1, 2)),
    "ft": Style("FT-L", "#029e73", "^", (5, 1.5, 1, 1.5)),
    "random": Style("random", "#949494", "*", (1, 3)),
}
SPARE = (Style("", "#aa4499", ">", (3, 2)), Style("", "#5c4a1f", "8", (6, 3)), Style("", "#6a6ad8", "4", (2, 2, 4, 2)),
         Style("", "#b8860b", "1", (10, 3)))     # for other methods, in the order of their names
MIX = (0.0, 0.3, -0.25, 0.5, -0.45, 0.65)   # of white (black, where negative) in the colour of a method's variants
VARIED = tuple("oXs^DvP<>d")                # their markers, after the method's own


def theme():
    """Set the one look of the study: white grid, colour-blind palette, opaque white background."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85, rc={
        "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
        "savefig.transparent": False, "figure.dpi": 100, "savefig.dpi": 144, "figure.constrained_layout.use": True,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 10,
        "legend.fontsize": 9.5, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
        "grid.color": "#e4e4e4", "axes.edgecolor": "#888888", "font.family": "DejaVu Sans"})


def style(method, methods=()):
    """Line settings of one method for `Axes.plot`. An editor's key and its label mean the same line of STYLES; a label
    with more behind it ("MEMIT, batch 10", "ROME without openers") is a variant: that method's dash, its colour lighter
    or darker and other markers, in the order of the variants among `methods`. What is unknown takes a spare line."""
    base, methods = base_of(method), {*methods, method}
    others = sorted(name for name in methods if base_of(name) is None)
    chosen = STYLES[base] if base else SPARE[others.index(method) % len(SPARE)]
    color, marker, label = chosen.color, chosen.marker, chosen.label or method
    if base and method not in (base, chosen.label):
        plain = {base, chosen.label}
        variants = sorted((name for name in methods - plain if base_of(name) == base), key=natural)
        place = variants.index(method) + bool(methods & plain)      # the first of them looks like the method itself
        color, label = mixed(color, MIX[place % len(MIX)]), method
        marker = [marker, *(other for other in VARIED if other != marker)][place % len(VARIED)]
    return {"color": matplotlib.colors.to_rgb(color), "marker": marker, "label": label,
            "linestyle": (0, chosen.dash) if chosen.dash else "-"}


def base_of(method):
    """The key of STYLES that a method's name means, or begins with as a word: the longest; None if there is none."""
    found = [(len(start), key) for key, one in STYLES.items() for start in (key, one.label)
             if method == start or re.match(re.escape(start) + r"\W", method) and not method.startswith(start + "-")]
    return max(found)[1] if found else None


def natural(text):
    """Sort key that puts 2 before 10."""
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def mixed(color, share):
    """A colour with `share` of white in it, of black where negative."""
    other = 1.0 if share > 0 else 0.0
    return tuple(part + abs(share) * (other - part) for part in matplotlib.colors.to_rgb(color))


def methods_in(df):
    """The editors of a table: those of STYLES and their variants in its order, then the others."""
    places = {name: place for place, name in enumerate(STYLES)}
    return sorted(set(df["editor"]), key=lambda name: (places.get(base_of(name), len(places)), natural(name)))


def curves(df, metric, window=1, scale=100.0):
    """{editor: table with index step, columns mean, low, high} of scale · `metric`, averaged over `window` steps.

    With three runs or more low and high are the 95 % interval of the mean over runs (Student's t); with two they equal
    the mean, for nothing can be said; with one they are the interval (1.96 errors) over the values inside the window.
    """
    out, rows = {}, df[df["metric"] == metric]
    for editor in methods_in(rows):
        part = rows[rows["editor"] == editor]
        table = scale * part.pivot_table(index="step", columns="run", values="value", aggfunc="mean")
        rolled = table.rolling(window, min_periods=(window + 1) // 2).mean()
        if table.shape[1] > 1:
            n = rolled.count(axis=1)
            mean, error = rolled.mean(axis=1), rolled.std(axis=1) / np.sqrt(n)
            error = error.where(n > 2) * stats.t.ppf(0.975, n.clip(lower=2) - 1)
        else:
            values = table.iloc[:, 0].rolling(window, min_periods=2 if window > 1 else 1)
            mean, error = rolled.iloc[:, 0], 1.96 * values.std() / np.sqrt(values.count())
        error = error.fillna(0.0)
        out[editor] = pd.DataFrame({"mean": mean, "low": mean - error, "high": mean + error})
    return out


def span(df, window):
    """The rolling window that a run of this length allows: at most an eighth of it."""
    return int(max(1, min(window, df["step"].max() // 8)))


def draw(ax, table, method, methods, band=True, **changes):
    """One curve of `curves` on `ax` with its band; `changes` are Line2D settings that replace the method's."""
    settings = style(method, methods) | {"markevery": max(1, len(table) // 8)} | changes
    ax.plot(table.index, table["mean"], **settings)
    if band and (table["high"] > table["low"]).any():
        ax.fill_between(table.index, table["low"], table["high"], color=settings["color"], alpha=0.15, linewidth=0)


def panel(ax, df, metric, window=1, scale=100.0):
    """Draw one metric's curves, a line a method, on `ax`, shares within 0 to 100; a panel without data says so."""
    found, methods = curves(df, metric, window, scale), methods_in(df)
    for method, table in found.items():
        draw(ax, table.clip(0, 100 if scale == 100 else None), method, methods)
    if not found:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color="#777777")


def note(fig, text):
    """Small grey line under the panels: what a line and a band are."""
    fig.supxlabel(text, fontsize=8.5, color="#555555", x=0.01, ha="left")


def legend(fig, axes, **settings):
    """One legend over the panels, each label once."""
    found = {}
    for ax in np.ravel(axes):
        for handle, label in zip(*ax.get_legend_handles_labels()):
            found.setdefault(label, handle)
    fig.legend(found.values(), found.keys(), loc="outside upper center", ncols=min(len(found), 6), handlelength=3.2,
               **settings)


def mean_interval(mean, sem):
    """Half-widths (below, above) of the 95 % interval of a mean of shares (1.96 errors), kept within 0 and 1."""
    error = 1.96 * np.nan_to_num(np.asarray(sem, dtype=float))
    mean = np.asarray(mean, dtype=float)
    return np.minimum([error, error], [mean, 1 - mean])


def share_interval(share, n):
    """Half-widths (below, above) of the 95 % Wilson interval of shares of n trials; wide even at 0 and 1."""
    share, z = np.asarray(share, dtype=float), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.stack([share - (middle - half), middle + half - share]).clip(min=0)


def runs_in(df):
    """'1 run a method, 1 fact an update', '1 to 5 runs a method' (without a column batch_size) and the like."""
    runs = df.groupby("editor")["run"].nunique()
    low, high = runs.min(), runs.max()
    text = f"{low if low == high else f'{low} to {high}'} run{'s' if high > 1 else ''} a method"
    sizes = sorted({int(size) for size in df["batch_size"].dropna()}) if "batch_size" in df else []
    return f"{text}, {sizes[0]} fact{'s' if sizes[0] > 1 else ''} an update" if len(sizes) == 1 else text


def points(share):
    """'1.2' of 0.012, and never '-0.0'."""
    return f"{round(100 * share, 1) + 0.0:.1f}"
