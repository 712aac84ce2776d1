"""A method's name in, the one way it is drawn out: theme, styles, curves with their intervals, legends and notes.

Every figure draws a method in the same colour, with the same marker and the same dash (`STYLES`) and says under its
panels what a line and a band are and for how many runs they stand. Figures are opaque white and 9 inches wide, so that
they read on dark pages and in a README.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "rte": "RTE"}     # few-shot tasks as they are written
WIDTH = 9.0  # inches: 900 px at 100 dots an inch


@dataclass(frozen=True)
class Style:
    """How one method is drawn, everywhere."""

    label: str   # the name in legends; "" is the editor's own name
    color: int   # index into seaborn's "colorblind" palette
    marker: str  # matplotlib marker
    dash: tuple  # on-off pattern in points; () is a solid line


STYLES = {
    "rome": Style("ROME", 0, "o", ()),
    "memit": Style("MEMIT", 3, "s", (5, 2)),
    "ft": Style("FT-L", 2, "^", (5, 1.5, 1, 1.5)),
}
SPARE = (Style("", 4, "D", (1, 1)), Style("", 5, "v", (7, 2, 1, 2, 1, 2)), Style("", 8, "P", (3, 1)),
         Style("", 9, "X", (8, 3)))  # for editors that have no line above, in the order of their names


def theme():
    """Set the one look of the study: white grid, colour-blind palette, opaque white background."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85, rc={
        "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
        "savefig.transparent": False, "figure.dpi": 100, "savefig.dpi": 144, "figure.constrained_layout.use": True,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 10,
        "legend.fontsize": 9.5, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
        "grid.color": "#e4e4e4", "axes.edgecolor": "#888888", "font.family": "DejaVu Sans"})


def style(method, methods=()):
    """Line settings of one method for `Axes.plot`; an editor without a line in STYLES takes a spare one by its name."""
    others = sorted(set(methods) - set(STYLES))
    spare = SPARE[others.index(method) % len(SPARE)] if method in others else SPARE[0]
    chosen = STYLES.get(method, spare)
    return {"color": sns.color_palette("colorblind")[chosen.color], "marker": chosen.marker,
            "linestyle": (0, chosen.dash) if chosen.dash else "-", "label": chosen.label or method}


def methods_in(df):
    """The editors of a table, those of STYLES first and in its order."""
    present = set(df["editor"])
    return [name for name in STYLES if name in present] + sorted(present - set(STYLES))


def curves(df, metric, window=1, scale=100.0):
    """{editor: table with index step, columns mean, low, high} of scale · `metric`, averaged over `window` steps.

    With several runs low and high are the 95 % interval of the mean over runs (1.96 standard errors); with one run
    they are that interval over the values inside the window, and equal to the mean where the window holds one value.
    """
    out, rows = {}, df[df["metric"] == metric]
    for editor in methods_in(rows):
        part = rows[rows["editor"] == editor]
        table = scale * part.pivot_table(index="step", columns="run", values="value", aggfunc="mean")
        rolled = table.rolling(window, min_periods=(window + 1) // 2).mean()
        if table.shape[1] > 1:
            mean, error = rolled.mean(axis=1), rolled.std(axis=1) / np.sqrt(rolled.count(axis=1))
        else:
            values = table.iloc[:, 0].rolling(window, min_periods=2 if window > 1 else 1)
            mean, error = rolled.iloc[:, 0], values.std() / np.sqrt(values.count())
        error = 1.96 * error.fillna(0.0)
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
