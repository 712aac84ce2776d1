"""Cosines and tables of `atlas` in, the figures of the directions of editing gradients out.

A task has one colour and, of the two editors of a picture, the first is drawn as full circles and the second as open
triangles, as in the published figure (InstructEdit, arXiv:2402.16123, figure 4). Distances in a t-SNE picture mean
little; what stands above it is measured on the directions themselves.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from editcore import atlas, separation
from editcore.look import WIDTH, mixed, note
from editcore.separation import SCORES

LOOKS = {   # task -> name, colour: green, blue and red as published, apart for colour-blind readers
    "recent": ("Recent", "#029e73"), "counterfact": ("CounterFact", "#0173b2"), "zsre": ("ZsRE", "#d55e00"),
    "convsent": ("ConvSent", "#cc78bc"),
}
READINGS = {"G": ("gradient, vec G", "#222222", "o"), "u": ("mean input u", "#0173b2", "s"),
            "delta": ("mean output gradient δ", "#d55e00", "^")}
SIDES = ("o", "v")      # markers of the two editors of a picture


@dataclass(frozen=True)
class Picture:
    """One joint picture of the edits of two editors."""

    title: str
    points: np.ndarray      # (2n, 2) those of the first editor, then those of the second
    groups: tuple           # (n,) task of each edit, the same for both
    names: tuple            # of the two
    scores: tuple           # (silhouette, share told by the linear probe) of the two, measured on the directions
    paired: float           # share of edits whose nearest direction is the same record's, edited by the other


def pictures(found, columns=3, words=""):
    """Pictures side by side, the scores of both editors under each."""
    rows = -(-len(found) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.75 + (WIDTH / columns + 0.42) * rows), squeeze=False)
    for ax in axes.ravel()[len(found):]:
        ax.set_axis_off()
    for ax, one in zip(axes.ravel(), found):
        _cloud(ax, one)
    tasks = dict.fromkeys(task for one in found for task in one.groups)
    handles = [Line2D([], [], color=LOOKS[task][1], marker="o", linestyle="none", markersize=7, label=LOOKS[task][0])
               for task in tasks]
    fig.legend(handles=handles, loc="outside upper center", ncols=4, handletextpad=0.2)
    note(fig, words)
    return fig


def pictured(lab, whose, view, asked, how):
    """The Pictures of pairs of sources: t-SNE of their joint cosines, or principal components where perplexity is 0.

    view = (map, reading); asked: {title: (first source, second source)}, those that are not in `whose` are left out;
    how = (perplexity, seed, folder of editors).
    """
    made, (perplexity, seed, editors) = [], how
    for title, names in asked.items():
        if set(names) <= set(whose):
            C, n = atlas.panel(lab, *(whose[name] for name in names), view[0], editors, view[1]), len(lab.records)
            halves = [separation.scored(part, lab.groups) for part in (C[:n, :n], C[n:, n:])]
            points = separation.tsne(C, perplexity, seed) if perplexity else separation.components(C)[0]
            scores = tuple((one["silhouette"].mean(), one["probe"].mean()) for one in halves)
            made.append(Picture(title, points, lab.groups, names, scores, atlas.paired(C)))
    return made


def viewed(lab, whose, pair, views, how):
    """The Pictures of one pair of sources in several views, a row each: components, then t-SNE at each perplexity.

    views = ({(map, reading): name of the map}, perplexities); how as in `pictured`, its perplexity aside.
    """
    return [one for view, words in views[0].items() for perplexity in (0, *views[1])
            for one in pictured(lab, whose, view, {f"{words}, {view[1]}\u0303: {perplexity or 'PCA'}": pair},
                                (perplexity, *how[1:]))]


def _cloud(ax, one):
    """One Picture: triangles of the second editor below, circles of the first above."""
    groups, n = np.array(one.groups), len(one.groups)
    for side in (1, 0):
        part = one.points[side * n:(side + 1) * n]
        for task in dict.fromkeys(one.groups):
            color, own = LOOKS[task][1], part[groups == task]
            face = color if side == 0 else mixed(color, 0.82)
            ax.scatter(*own.T, s=20 if side == 0 else 24, marker=SIDES[side], facecolor=[face], linewidth=0.7,
                       edgecolor=["white" if side == 0 else color], zorder=3 - side)
    ax.set_title(one.title, loc="left")
    said = [f"{mark} {name}  {round(apart, 2) + 0.0:+.2f} · {100 * told:.0f} %" for mark, name, (apart, told) in
            zip("●▽", one.names, one.scores)]
    ax.set_xlabel("\n".join(said), fontsize=8.5, loc="left")
    ax.set(xticks=[], yticks=[])
    ax.margins(0.06)
    ax.set_box_aspect(1)


def numbers(found, pairs, maps):
    """Every score of every map: a column a score, a row a reading; a line a source, with 95 % intervals.

    found: `atlas.numbers`. pairs: {source: (colour, marker, filled)}; maps: {map: short name}.
    """
    found = found.assign(reading=found["reading"].str.rstrip("~"))
    shown = {name: [site for site in maps if site in set(found.loc[found["reading"] == name, "map"])]
             for name in READINGS}
    shown = {name: sites for name, sites in shown.items() if sites}
    fig, axes = plt.subplots(len(shown), len(SCORES), figsize=(WIDTH, 1.1 + 0.43 * sum(map(len, shown.values()))),
                             sharey="row", sharex="col", squeeze=False,
                             gridspec_kw={"height_ratios": [len(sites) for sites in shown.values()]})
    for row, (reading, sites) in zip(axes, shown.items()):
        for ax, score in zip(row, SCORES):
            part = found[(found["score"] == score) & (found["reading"] == reading)]
            for place, (source, look) in enumerate(pairs.items()):
                shift = 0.2 * (place - (len(pairs) - 1) / 2)
                _marks(ax, part[part["source"] == source].set_index("map"), sites, shift, look)
            if score in ("silhouette", "ratio"):    # where tasks do not matter
                ax.axvline(score == "ratio", color="#777777", linewidth=0.9, zorder=1)
            ax.set(ylim=(len(sites) - 0.5, -0.5))
            ax.set_yticks(range(len(sites)), [maps[site] for site in sites])
            ax.set_title(SCORES[score] if ax in axes[0] else "")
        row[0].set_ylabel(READINGS[reading][0].replace(", ", ",\n").replace(" output ", "\noutput "), fontweight="bold")
    handles = [Line2D([], [], color=color, marker=marker, linestyle="none", markersize=6, label=source,
                      markerfacecolor=color if full else "white") for source, (color, marker, full) in pairs.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=4, handletextpad=0.2)
    return fig


def _marks(ax, part, maps, shift, look):
    """Points with intervals of one source, a row a map."""
    color, marker, full = look
    for row, site in enumerate(maps):
        if site in part.index:
            one = part.loc[site]
            ax.plot([one["low"], one["high"]], [row + shift] * 2, color=color, linewidth=1.1, zorder=2)
            ax.plot(one["mean"], row + shift, marker=marker, color=color, markersize=4.6, zorder=3,
                    markerfacecolor=color if full else "white")


def controls(found, chance, heads, scores=("silhouette", "probe")):
    """The null controls: a row a control under its heading, a column a score, a marker a reading.

    found: `atlas.numbers` of one map. chance: {score: (low, high)} of shuffled tasks. heads: {heading: {source: name}}.
    """
    rows, ticks, at = [], [], 0
    for head, named in heads.items():
        ticks.append((at, head, True))
        for place, (source, name) in enumerate(named.items(), 1):
            rows.append((at + place, source))
            ticks.append((at + place, name, False))
        at += len(named) + 1.4
    fig, axes = plt.subplots(1, len(scores), figsize=(WIDTH, 1.2 + 0.27 * at), sharey=True)
    for ax, score in zip(axes, scores):
        part = found[found["score"] == score]
        part = part.assign(reading=part["reading"].str.rstrip("~")).set_index(["source", "reading"])
        ax.axvspan(*chance[score], color="#e9e9e9", zorder=0)
        for row, source in rows:
            for shift, (reading, (_, color, marker)) in zip((-0.22, 0, 0.22), READINGS.items()):
                if (source, reading) in part.index:
                    one = part.loc[(source, reading)]
                    ax.plot([one["low"], one["high"]], [row + shift] * 2, color=color, linewidth=1.2)
                    ax.plot(one["mean"], row + shift, marker=marker, color=color, markersize=5)
        ax.set(title=SCORES[score], ylim=(at - 0.6, -0.6))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks([place for place, *_ in ticks], [name for _, name, _ in ticks])
    for label, (_, _, bold) in zip(axes[0].get_yticklabels(), ticks):
        label.set_fontweight("bold" if bold else "normal")
    handles = [Line2D([], [], color=color, marker=marker, linestyle="none", label=name)
               for name, color, marker in READINGS.values()]
    fig.legend(handles=handles, loc="outside upper center", ncols=3, handletextpad=0.2)
    return fig


def readings(shares):
    """What edits behind another task's instruction are taken for: a bar a source, shares of edits.

    shares: DataFrame indexed by source, columns as_told, as_is, other (0 to 1), low, high (of as_told).
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 1.5 + 0.42 * len(shares)))
    looks = {"as_told": ("the task that the instruction names", "#0173b2"),
             "as_is": ("the task that the fact is of", "#de8f05"), "other": ("the third task", "#c9c9c9")}
    left = np.zeros(len(shares))
    for column, (name, color) in looks.items():
        values = 100 * shares[column].to_numpy()
        ax.barh(range(len(shares)), values, left=left, color=color, height=0.66, label=name)
        for row, (start, value) in enumerate(zip(left, values)):
            if value >= 6:
                ax.text(start + value / 2, row, f"{value:.0f}", ha="center", va="center", fontsize=9,
                        color="#222222" if column == "other" else "white")
        left += values
    for row, (low, high) in enumerate(zip(shares["low"], shares["high"])):
        ax.plot([100 * low, 100 * high], [row + 0.25] * 2, color="#111111", linewidth=1.6, solid_capstyle="butt")
    ax.set(xlim=(0, 100), xlabel="edits taken for a task by a linear probe, %", ylim=(len(shares) - 0.5, -0.5))
    ax.set_yticks(range(len(shares)), list(shares.index))
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=3, handlelength=1.2)
    return fig


def scaling(table, paper):
    """Rel and Gen against the number of training tasks, a line a task; hollow: the paper's (GPT2-XL).

    table: columns tasks (1 to 3), task, metric, mean, low, high (0 to 1); paper: {(metric, task): three percentages}.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.7), sharey=True)
    for ax, (metric, title) in zip(axes, (("Rel", "Reliability"), ("Gen", "Generalization"))):
        for place, task in enumerate(dict.fromkeys(table["task"])):
            part = table[(table["task"] == task) & (table["metric"] == metric)].sort_values("tasks")
            name, color = LOOKS[task]
            x, values = part["tasks"] + 0.04 * (place - 1), 100 * part["mean"]
            ends = 100 * np.stack([part["mean"] - part["low"], part["high"] - part["mean"]]).clip(min=0)
            ax.errorbar(x, values, yerr=ends, color=color, marker="o", capsize=2.5, label=name)
            if (metric, task) in paper:
                ax.plot(range(1, 4), paper[metric, task], color=color, marker="d", linestyle=(0, (2, 2)), linewidth=1.1,
                        markerfacecolor="white")
        ax.set(title=title, xticks=(1, 2, 3), xlim=(0.8, 3.2), ylim=(-3, 103))
        ax.set_xlabel("training tasks: Recent, CounterFact, ConvSent")
    axes[0].set_ylabel("whole target exact, %")
    handles = [*axes[0].get_legend_handles_labels()[0],
               Line2D([], [], color="#777777", marker="d", markerfacecolor="white", linestyle=(0, (2, 2)),
                      label="paper, GPT2-XL")]
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    return fig


def success(table, correlations):
    """How far apart an editor's tasks are, against how well it edits them: a point a system and task.

    table: columns task, style, silhouette, Rel, Gen (0 to 1). correlations: {metric: (rho, low, high)} over systems.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.0), sharey=True)
    for ax, (metric, title) in zip(axes, (("Rel", "Reliability"), ("Gen", "Generalization"))):
        for (task, style), part in table.groupby(["task", "style"], sort=False):
            color, full = LOOKS[task][1], style != "none"
            ax.scatter(part["silhouette"], 100 * part[metric], s=34, marker=SIDES[not full], linewidth=0.9, zorder=3,
                       facecolor=[color if full else mixed(color, 0.82)], edgecolor=["white" if full else color])
        rho, low, high = correlations[metric]
        ax.set_title(f"{title}: ρ = {rho:+.2f} [{low:+.2f}, {high:+.2f}]")
        ax.set(xlabel="silhouette of the task's edits", ylim=(100 * table[["Rel", "Gen"]].min().min() - 5, 103))
        ax.axvline(0, color="#777777", linewidth=0.9, zorder=1)
    axes[0].set_ylabel("whole target exact, %")
    tasks = [Line2D([], [], color=LOOKS[task][1], marker="o", linestyle="none", label=LOOKS[task][0], markersize=7)
             for task in dict.fromkeys(table["task"])]
    styles = [Line2D([], [], color="#444444", marker=marker, linestyle="none", markersize=6.5, label=name,
                     markerfacecolor=face)
              for marker, name, face in (("o", "with instruction", "#444444"), ("v", "without", "white"))]
    fig.legend(handles=[*tasks, *styles], loc="outside upper center", ncols=5, handletextpad=0.2)
    return fig


def verdicts(parts):
    """What the pictures are taken to say: a row a claim, a column a score, the difference with its paired interval.

    parts: {score: `parting.verdicts` by that score}, the same claims in each.
    """
    colors = {"held": "#0173b2", "failed": "#d55e00", "undecided": "#8a8a8a"}
    count = max(map(len, parts.values()))
    fig, axes = plt.subplots(1, len(parts), figsize=(WIDTH, 1.3 + 0.34 * count), sharey=True, squeeze=False)
    for ax, (score, found) in zip(axes[0], parts.items()):
        for row, one in enumerate(found.to_dict("records")):
            color = colors[one["verdict"]]
            ax.plot([one["low"], one["high"]], [row] * 2, color=color, linewidth=1.8)
            ax.plot(one["mean"], row, marker="o", color=color, markersize=6.5,
                    markerfacecolor="white" if one["verdict"] == "undecided" else color)
        ax.axvline(0, color="#444444", linewidth=0.9, zorder=1)
        ax.set(ylim=(count - 0.5, -0.5), title=SCORES[score], xlabel="difference, 95 % interval over edits")
    axes[0, 0].set_yticks(range(count), list(next(iter(parts.values()))["text"]))
    handles = [Line2D([], [], color=color, marker="o", markersize=6.5, label=name,
                      markerfacecolor="white" if name == "undecided" else color) for name, color in colors.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig
