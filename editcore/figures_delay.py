"""Tables of `delay` in, figures of what delays a collapse out: losses, lifetimes, what a method costs, and sweeps.

Losses and scores are shares from 0 to 1 in the tables and percent in the figures.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from editcore.delay import ABILITIES
from editcore.figures_old import plain_log
from editcore.look import WIDTH, methods_in, note, style

FLOOR, CEILING = 0.1, 120   # %: losses beyond, and gains, are drawn here on a logarithmic axis
KINDS = {"facts_prob": ("-", "o"), "perplexity": ((0, (4, 1.5)), "s"), "tasks": ((0, (1, 1)), "^")}   # drawn as
TITLES = {"tasks": "Few-shot tasks", "facts_prob": "Never-edited facts", "perplexity": "Perplexity"}
OUTCOMES = {        # of a sweep: column -> (panel's title, factor, limits or None)
    "end": ("Lost at the end, %", 100, None), "kept": ("Edits right at the end, %", 100, (-3, 103)),
    "PS": ("New edits: paraphrases, %", 100, (-3, 103)), "NS": ("New edits: neighbours, %", 100, (-3, 103)),
    "seconds": ("Seconds an edit", 1, None),
}


def losses(lost, ability="facts_prob", shares=(0.01, 0.10)):
    """What each method loses, a panel a method: loss of three abilities against edits, mean over orders and their
    range, log scale; behind them, grey, the loss of `ability` by the other methods. lost: `delay.lost`."""
    methods = methods_in(lost)
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.9 + 1.75 * rows), sharex=True, sharey=True, squeeze=False)
    for ax in axes.ravel()[len(methods):]:
        ax.set_axis_off()
    means = percent(lost).groupby(["editor", "ability", "step"])["lost"].agg(["mean", "min", "max"])
    for ax, method in zip(axes.ravel(), methods):
        for other in methods:
            if other != method and (other, ability) in means.index:
                ax.plot(means.loc[(other, ability), "mean"], color="#d5d5d5", linewidth=0.9, zorder=1)
        _losses_of(ax, means.loc[method], style(method, methods))
        for share in shares:
            ax.axhline(100 * share, color="#444444", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        ax.set(yscale="log", ylim=(0.8 * FLOOR, 1.3 * CEILING), xlim=np.array([-0.03, 1.04]) * lost["step"].max())
        ax.tick_params(labelbottom=True)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    for ax in axes[:, 0]:
        ax.set_ylabel("lost, %")
    for ax in axes.ravel()[:len(methods)][-columns:]:
        ax.set_xlabel("edits made, n")
    shown = [kind for kind in KINDS if kind in set(lost["ability"])]
    lines = [Line2D([], [], color="#333333", linestyle=KINDS[kind][0], marker=KINDS[kind][1], label=ABILITIES[kind])
             for kind in shown]
    fig.legend(handles=lines, loc="outside upper center", ncols=3, handlelength=3)
    note(fig, f"Band: range over the orders. Grey: the other methods, {ABILITIES[ability]}. At {FLOOR} %: less, "
              f"or a gain. At {CEILING} %: more.")
    return fig


def percent(lost):
    """The losses in %, none below FLOOR or above CEILING."""
    return lost.assign(lost=(100 * lost["lost"]).clip(FLOOR, CEILING))


def _losses_of(ax, means, look):
    for kind, (dash, marker) in KINDS.items():
        if kind in means.index:
            table = means.loc[kind]
            ax.plot(table["mean"], color=look["color"], linestyle=dash, marker=marker, markersize=3.5, linewidth=1.4)
            ax.fill_between(table.index, table["min"], table["max"], color=look["color"], alpha=0.15, linewidth=0)
    ax.set_title(look["label"], color=look["color"])


def lifetimes(own, methods):
    """How many edits until a share is lost: a panel an ability, a row a method in the order of `methods`.

    own: `delay.summary`. Point and bar: restricted mean over the orders and its interval; arrow: some or all runs end
    without the loss; cross beyond the end of the runs: extrapolated.
    """
    kinds = [kind for kind in TITLES if kind in set(own["ability"])]
    fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 1.3 + 0.3 * len(methods)), sharey=True, squeeze=False)
    end, shares = own["edits"].max(), sorted(own["share"].unique())
    known = own["life"][np.isfinite(own["life"])]
    right = 1.5 * max(known.max() if len(known) else end, end)
    for ax, kind in zip(axes[0], kinds):
        for row, method in enumerate(methods):
            part = own[(own["editor"] == method) & (own["ability"] == kind)]
            for one in part.to_dict("records"):
                _life(ax, one, row + 0.17 * (2 * shares.index(one["share"]) - len(shares) + 1), style(method, methods))
        ax.axvspan(end, right, color="#f3f3f3", zorder=0)
        ax.axvline(end, color="#777777", linewidth=0.9)
        ax.set(title=TITLES[kind], xscale="log", xlim=(0.8, right), xlabel="edits",
               yticks=range(len(methods)), yticklabels=[style(name, methods)["label"] for name in methods],
               ylim=(len(methods) - 0.5, -0.5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
    upper, lower = (f"{100 * share:g} %" for share in (shares[0], shares[-1]))
    note(fig, f"In each row {upper} lost above, {lower} below. Point: all orders lost it, mean and 95 % interval. "
              "Arrow: not all did, lower bound.\nGrey: longer than the runs. Cross: extrapolated by a straight line, "
              f"no measurement. Orders a method: {' to '.join(map(str, sorted({*own['runs']})))}.")
    return fig


def _life(ax, one, row, look):
    """One row of `delay.summary` on `ax` at height `row`."""
    seen, point = one["events"] == one["runs"], max(1.0, one["mean"])
    ax.plot(point, row, marker=look["marker"] if seen else ">", color=look["color"], linestyle="none",
            markerfacecolor=look["color"] if seen else "white", markersize=5.5, zorder=3)
    if one["high"] > one["low"]:
        ax.plot([max(1.0, one["low"]), max(1.0, one["high"])], [row, row], color=look["color"], linewidth=1.3)
    if not seen and np.isfinite(one["life"]):
        ax.plot([point, one["life"]], [row, row], color=look["color"], linewidth=0.8, linestyle=(0, (1, 2)))
        ax.plot(one["life"], row, marker="x", color=look["color"], markersize=5)


def choices(found, ability="facts_prob"):
    """What a method costs and keeps: edits until the loss against seconds an edit, and against edits right at the end.

    found: `delay.table`. Methods that no ranked one beats are ringed; hollow ones are not ranked.
    """
    methods, end = methods_in(found.reset_index(names="editor")), found["edits"].iloc[0]
    height, top = heights(found, end)
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 5.2), sharey=True)
    panels = (("seconds", 1, "Against time", "seconds an edit"),
              ("kept", 100, "Against the edits' own fate", "edits right at the end, %"))
    for ax, (column, scale, title, words) in zip(axes, panels):
        for method, one in found.iterrows():
            look, x, y = style(method, methods), scale * one[column], height[method]
            if one["ranked"] and not one["beaten_by"]:
                ax.plot(x, y, "o", markersize=15, color="#999999", markerfacecolor="none", zorder=1)
            ax.plot(x, y, marker=look["marker"], color=look["color"], markersize=7, linestyle="none",
                    markerfacecolor=look["color"] if one["ranked"] else "white")
        ax.axhspan(end, 2 * height.max(), color="#f3f3f3", zorder=0)
        ax.set(title=title, xlabel=words, yscale="log", ylim=(max(0.8, 0.4 * height.min()), 1.3 * height.max()))
        plain_log(ax.yaxis)
        if top < height.max():
            ax.axhline(top, color="#777777", linewidth=0.9, linestyle=(0, (2, 2)))
    axes[0].set(ylabel=f"edits until {100 * found['share'].iloc[0]:g} % is lost", xscale="log",
                yticks=[tick for tick in axes[0].get_yticks() if 0.4 * height.min() <= tick <= top],
                xlim=(found["seconds"].min() / 1.4, found["seconds"].max() * 1.4))
    plain_log(axes[0].xaxis)
    fig.canvas.draw()       # the names need to know where the points are
    for ax, (column, scale, _, _) in zip(axes, panels):
        name_points(ax, scale * found[column], height, methods)
    note(fig, f"Lost: {ABILITIES[ability]}. Grey: extrapolated beyond the runs' {end:.0f} edits. Above the dashed "
              "line, if there is one: no loss in sight,\nin the order of the loss at the end. Ringed: beaten by no "
              "ranked method. Hollow: not ranked, too few edits right at the end.")
    return fig


def heights(found, end):
    """(Series of where each method stands on a logarithmic axis of edits, upper end of what is a number): lives that
    are not in sight stand above it, those with the smallest loss at the end highest."""
    known = found["life"][np.isfinite(found["life"])]
    top = 1.3 * max(known.max() if len(known) else end, end)
    unseen = found[np.isinf(found["life"])].sort_values("end", ascending=False).index
    above = pd.Series({method: top * 1.35 ** (1 + place) for place, method in enumerate(unseen)}, dtype=float)
    return found["life"].clip(lower=1).where(np.isfinite(found["life"])).fillna(above), top


def name_points(ax, x, y, methods):
    """Write each method's name beside its point, at the nearest place that covers no other name and no point."""
    spots = {method: ax.transData.transform((x[method], y[method])) for method in methods}
    frame = ax.get_window_extent()
    taken = [(px - 7, px + 7, py) for px, py in spots.values()]
    for method in sorted(methods, key=lambda name: -y[name]):
        look = style(method, methods)
        (side, shift), own = _free(spots[method], 5.6 * len(look["label"]), taken, frame)
        taken.append(own)
        line = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(look["label"], (x[method], y[method]), xytext=(12 * side * 0.72, 0.72 * shift), fontsize=8.5,
                    textcoords="offset points", ha="left" if side > 0 else "right", va="center", color=look["color"],
                    arrowprops=line if abs(shift) > 12 else None)


def _free(spot, wide, taken, frame):
    """((side, shift), (start, stop, height)) in pixels of the nearest free place for a name beside a point."""
    px, py = spot
    for shift in (sign * step for step in range(0, 400, 3) for sign in (1, -1)):
        for side in (1, -1):
            start, stop = sorted([px + 12 * side, px + (12 + wide) * side])
            free = all(abs(py + shift - middle) >= 11 or begin >= stop or start >= end for begin, end, middle in taken)
            if free and frame.x0 < start and stop < frame.x1 - 4 and frame.y0 < py + shift < frame.y1:
                return (side, shift), (start, stop, py + shift)
    return (1, 0), (px + 12, px + 12 + wide, py)


def sweeps(tables, outcomes=("end", "kept", "PS", "seconds"), ability="facts_prob"):
    """What one setting does, all else equal: a column of panels a sweep, a row an outcome (OUTCOMES), a line a method.

    tables: {words for the axis: `delay.sweep`}. With one sweep the outcomes stand side by side.
    """
    flat = len(tables) == 1
    shape = (1, len(outcomes)) if flat else (len(outcomes), len(tables))
    fig, axes = plt.subplots(*shape, figsize=(WIDTH, 3.1 if flat else 0.8 + 1.75 * len(outcomes)), squeeze=False,
                             sharey=False if flat else "row", sharex=False if flat else "col")
    methods = sorted({name for table in tables.values() for name in table["method"]})
    for column, (words, table) in enumerate(tables.items()):
        for row, outcome in enumerate(outcomes):
            ax = axes[0, row] if flat else axes[row, column]
            _sweep(ax, table, outcome, methods)
            if flat or column == 0:
                ax.set_title(OUTCOMES[outcome][0])
            if flat or row == len(outcomes) - 1:
                ax.set_xlabel(words)
    handles = {line.get_label(): line for ax in axes.ravel() for line in ax.get_lines() if line.get_label()[0] != "_"}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6, handlelength=3.2)
    note(fig, f"Lost: {ABILITIES[ability]}, after all edits. Bars: 95 % interval over the orders (few: their range).")
    return fig


def _sweep(ax, table, outcome, methods):
    """One outcome of one sweep: a line a method over the values, equally spaced."""
    _, scale, limits = OUTCOMES[outcome]
    for method, part in table.groupby("method"):
        look, values = style(method, methods), scale * part[outcome]
        if outcome == "end":
            error = scale * np.stack([part["end"] - part["low"], part["high"] - part["end"]]).clip(min=0)
            ax.errorbar(part["place"], values, yerr=error, capsize=2, **look)
        else:
            ax.plot(part["place"], values, **look)
    ticks = table.drop_duplicates("place").sort_values("place")
    ax.set(xticks=ticks["place"], xticklabels=ticks["value"], xlim=(-0.4, ticks["place"].max() + 0.4))
    if limits:
        ax.set_ylim(*limits)
    elif outcome == "seconds":
        ax.set_ylim(0, max(ax.get_ylim()[1], 1.1 * table["seconds"].max()))
