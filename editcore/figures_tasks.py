"""The tables of `orderings` in, the figures of "can one editor do many tasks" out: transfer, contenders, orderings.

A contender looks the same in every figure (`LOOKS`). Shares are drawn in percent; a hollow diamond is the paper's
number (InstructEdit, arXiv:2402.16123, GPT2-XL), which is there to be compared by order, not by value.
"""

import matplotlib.pyplot as plt
import numpy as np

from editcore.look import WIDTH, note
from editcore.orderings import BY_TOKEN, PAPER, TASKS, TRANSFER

LOOKS = {   # name -> colour, marker
    "Base model": ("#777777", "o"), "Base model, instructed": ("#aaaaaa", "h"), "FT-L": ("#029e73", "^"),
    "CaliNet": ("#de8f05", "P"), "KE": ("#ca9161", "v"),
    "MEND, multi-task": ("#d55e00", "s"), "GRACE": ("#cc78bc", "X"), "InstructEdit": ("#0173b2", "D"),
}
MEANT = {"Rel": "Reliability", "Gen": "Generalization", "Loc": "Locality", "Port": "Portability", "Fluency": "Fluency"}
VERDICTS = {"held": "#0173b2", "failed": "#d55e00", "undecided": "#949494"}
HOLLOW = {"marker": "d", "markerfacecolor": "none", "markeredgecolor": "#222222", "linestyle": "none",
          "markersize": 6.5}


def transfer(table, value="shown"):
    """How an editor of one task does on another: a panel a metric, rows trained on, columns tested on."""
    tasks = [task for task in TASKS if task in set(table["system"])]
    cells = table[(table["value"] == value)].set_index(["metric", "system", "task"])["mean"]
    fig, axes = plt.subplots(1, 4, figsize=(WIDTH, 3.4), sharey=True)
    for i, (ax, metric) in enumerate(zip(axes, ("Rel", "Gen", "Port", "Loc"))):
        shown = np.array([[100 * cells.get((metric, row, column), np.nan) for column in tasks] for row in tasks])
        ax.imshow(shown, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for row, column in np.ndindex(shown.shape):
            dark = shown[row, column] > 55
            paper = TRANSFER.get((tasks[row], tasks[column]), ())[i:i + 1]
            ax.text(column, row - 0.1, f"{shown[row, column]:.0f}", ha="center", va="center", fontsize=12,
                    color="white" if dark else "#222222", fontweight="bold" if row == column else "normal")
            ax.text(column, row + 0.24, f"paper {paper[0]:.0f}" if paper else "–", ha="center", va="center",
                    fontsize=8, color="white" if dark else "#555555")
        ax.set(title=MEANT[metric], xlabel="tested on")
        ax.set_xticks(range(len(tasks)), [TASKS[task] for task in tasks], fontsize=8)
        ax.set_yticks(range(len(tasks)), [TASKS[task] for task in tasks], fontsize=9)
        ax.grid(False)
    axes[0].set_ylabel("trained on")
    note(fig, "MEND trained on one task without instructions; % of test records, the whole target exact (portability, "
              "locality:\nof the tokens). Bold: in-task. Small: the paper's on GPT2-XL; –: it prints none.")
    return fig


def contenders(table):
    """The main table: rows tasks, columns metrics, in each panel a point a contender with its interval."""
    tasks = [task for task in TASKS if task in set(table["task"])]
    names = [name for name in LOOKS if name in set(table["system"])]
    fair = {task: _fair(table, task, names) for task in tasks}
    heights = [1.1 + 0.2 * (len(names) + len(fair[task])) for task in tasks]
    fig, axes = plt.subplots(len(tasks), 4, figsize=(WIDTH, sum(heights) + 0.9), squeeze=False,
                             gridspec_kw={"height_ratios": heights})
    for row, task in zip(axes, tasks):
        shown = names + fair[task]
        asked = set(table[table["task"] == task]["metric"])
        metrics = ["Rel", "Gen" if "Gen" in asked else "", "Loc", "Port" if "Port" in asked else "Fluency"]
        for ax, metric in zip(row, metrics):
            part = table[(table["task"] == task) & (table["metric"] == metric)]
            _points(ax, part.set_index(["system", "value"]), (shown, task, metric))
        row[0].set_yticks(range(len(shown)), shown, fontsize=8.5)
        row[0].set_ylabel(TASKS[task], fontweight="bold")
    handles = [plt.Line2D([], [], color="#444444", marker="o", linestyle="-"),
               plt.Line2D([], [], color="#444444", marker="|", linestyle="none", markersize=9),
               plt.Line2D([], [], **HOLLOW)]
    fig.legend(handles, ["as the paper counts, 95 % interval", "the other way", "paper, GPT2-XL"],
               loc="outside upper center", ncols=3)
    note(fig, "%: whole targets, locality and portability by token, and the other way as a bar; fluency: entropy of "
              "sampled text. ConvSent: no\nrephrased or portability question; its reliability is z_sent · z_topic. "
              "Fair: edited with the asked records, as trained editors are;\nwithout the word, FT-L, CaliNet and GRACE "
              "hold the other tasks' edits there, as published.")
    return fig


def _fair(table, task, names):
    """The fair rows of a task, in the order of the names."""
    known = set(table[table["task"] == task]["system"])
    return [f"{name}, fair" for name in names if f"{name}, fair" in known]


def _points(ax, part, what):
    """One panel of `contenders`; part is indexed by system and value, what = (systems, task, metric)."""
    systems, task, metric = what
    if not metric or part.empty:
        ax.set_axis_off() if not metric else None
        ax.set_yticks([])
        return
    scale = 1 if metric == "Fluency" else 100
    for y, name in enumerate(systems):
        color, marker = LOOKS[name.removesuffix(", fair")]
        if (name, "shown") in part.index:
            mean, low, high = scale * part.loc[(name, "shown"), ["mean", "low", "high"]].astype(float)
            ax.plot([low, high], [y, y], color=color, linewidth=1.4)
            ax.plot(mean, y, marker, color=color, markerfacecolor="white" if name.endswith(", fair") else color)
            if metric != "Fluency":
                other = "exact" if metric in BY_TOKEN else "token"
                ax.plot(scale * part.loc[(name, other), "mean"], y, "|", color=color, markersize=9)
        if (paper := PAPER.get(("GPT2-XL", task, metric, name))) is not None:
            ax.plot(paper, y, **HOLLOW)
    ax.set(title=MEANT[metric], ylim=(len(systems) - 0.4, -0.6))
    ax.set_yticks(range(len(systems)), [])
    if metric != "Fluency":
        ax.set(xlim=(-4, 104), xticks=[0, 50, 100])
    ax.tick_params(axis="x", labelsize=8.5)


def orderings(found):
    """Every ordering of the paper: the paired difference here with its interval, coloured by verdict."""
    fig, ax = plt.subplots(figsize=(WIDTH, 1.3 + 0.27 * (len(found) + found["family"].nunique())))
    y, places, words = 0, [], []
    for family, part in found.groupby("family", sort=False):
        ax.text(0.0, y, family, fontsize=9, fontweight="bold", va="center", ha="left",
                transform=ax.get_yaxis_transform())
        y += 1
        for one in part.itertuples():
            color = VERDICTS[one.verdict]
            ax.plot([100 * one.low, 100 * one.high], [y, y], color=color)
            ax.plot(100 * one.mean, y, "o", color=color)
            ax.plot(one.paper, y, **HOLLOW)
            places.append(y)
            words.append(one.text)
            y += 1
    ax.axvline(0, color="#444444", linewidth=1)
    ax.set_yticks(places, words, fontsize=8.5)
    ax.set(ylim=(y - 0.4, -0.8), xlabel="difference in points; to the right as in the claim")
    for name, color in VERDICTS.items():
        ax.plot([], [], "o-", color=color, label=name)
    ax.plot([], [], **HOLLOW, label="paper, GPT2-XL")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    note(fig, "Bars: paired 95 % bootstrap over records and training seeds. Held: all of it above 0 (equality: within\n"
              "2 points); undecided: 0 inside.")
    return fig


def headline(table):
    """Of what the mean gain in reliability is made, here and in the paper."""
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.5 * len(table)))
    bars = {"gpt2_xl": ("paper, GPT2-XL", "#9a9a9a"), "llama_2": ("paper, Llama-2", "#d3d3d3"),
            "gain": ("here, 95 % interval", "#0173b2")}
    for shift, (column, (words, color)) in zip((-0.27, 0.0, 0.27), bars.items()):
        places = np.arange(len(table)) + shift
        ax.barh(places, table[column], 0.24, color=color, label=words)
        ends = table[column].clip(lower=0) if column != "gain" else table[["high", "most"]].max(axis=1).clip(lower=0)
        for y, value, end in zip(places, table[column], ends):
            ax.text(0.6 + np.nan_to_num(end), y, f"{value:+.2f}" if np.isfinite(value) else "not tried", va="center",
                    fontsize=8, color="#333333")
    ax.hlines(places, table["low"], table["high"], color="#222222", linewidth=1.2)
    if (table["least"] < table["most"]).any():
        ax.plot(table[["least", "most"]], places, "|", color="#d55e00", markersize=9, markeredgewidth=1.6)
        ax.plot([], [], "|", color="#d55e00", markersize=9, markeredgewidth=1.6, label="least and most of a seed")
    ax.axhline(sum(name in TASKS.values() for name in table["rows"]) - 0.5, color="#888888", linewidth=1, linestyle=":")
    ax.axvline(0, color="#444444", linewidth=1)
    ax.set_yticks(range(len(table)), table["rows"])
    ax.set(ylim=(len(table) - 0.45, -0.55), xlabel="reliability of InstructEdit − multi-task MEND, points")
    ax.set_xlim(right=1.08 * ax.get_xlim()[1])
    ax.grid(axis="y", visible=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def costs(table):
    """Seconds of training, peak memory and parameters of each hypernetwork."""
    columns = {"seconds": "seconds of training", "peak_mb": "peak memory, MB", "parameters": "parameters, millions"}
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 1.2 + 0.32 * len(table)), sharey=True)
    for ax, (column, words) in zip(axes, columns.items()):
        values = table[column] / (1e6 if column == "parameters" else 1)
        ax.barh(range(len(table)), values, 0.6, color=[LOOKS.get(name, ("#56b4e9",))[0] for name in table["name"]])
        for y, value in enumerate(values):
            ax.text(value, y, f" {value:.3g}" if value < 1000 else f" {value:,.0f}", va="center", fontsize=8.5)
        ax.set(title=words, xlim=(0, 1.25 * max(values)), ylim=(len(table) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(table)), table["name"])
    return fig
