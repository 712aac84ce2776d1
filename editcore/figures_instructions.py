"""Scores by instruction in, the figures of "do the words matter" out: unseen ones, ablations, wrong ones, the loop.

Tables are those of `orderings.summary` (as the paper counts, shares from 0 to 1), drawn in percent, with 95 %
intervals over test records and training seeds. A metric has one colour and marker everywhere.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from editcore.figures_tasks import HOLLOW, MEANT
from editcore.look import WIDTH, note
from editcore.orderings import TASKS
from editcore.wording import SEEN_AND_UNSEEN

LOOKS = {"Rel": ("#0173b2", "o"), "Gen": ("#d55e00", "s"), "Loc": ("#777777", "^"), "Port": ("#029e73", "D"),
         "z_sent": ("#cc78bc", "P")}
STYLES = {"none": "nothing", "constant": "one text for all tasks", "random": "random words a task",
          "swapped": "another task's", "task": "name of the task", "description": "description", "full": "both"}
ASKED = {"same": "as before the edit", "full": "right instruction", "none": "nothing"}


def cells(table, value="shown"):
    """{(system, task, metric): (mean, low, high)} in percent."""
    rows = table[table["value"] == value]
    return {(one.system, one.task, one.metric): (100 * one.mean, 100 * one.low, 100 * one.high)
            for one in rows.itertuples()}


def point(ax, at, found, metric, **changes):
    """A point with its interval at height `at`; nothing where nothing was asked."""
    if found is not None:
        color, marker = LOOKS[metric]
        ax.plot(found[1:], [at, at], color=color, linewidth=1.3)
        ax.plot(found[0], at, **{"marker": marker, "color": color, "linestyle": "none", "markersize": 5.5} | changes)


def known(table):
    """The tasks of a table, in their order."""
    return [task for task in TASKS if task in set(table["task"])]


def panels(count, rows, each=0.3):
    """(figure, axes) of panels beside each other with so many rows of points."""
    fig, axes = plt.subplots(1, count, figsize=(WIDTH, 1.5 + each * rows), sharey=True, squeeze=False)
    for ax in axes[0]:
        ax.set(xlim=(-4, 104), xticks=[0, 25, 50, 75, 100])
        ax.tick_params(axis="x", labelsize=8.5)
    return fig, axes[0]


def legend(fig, metrics, more=()):
    """One legend over the panels: metrics, then other handles."""
    handles = [Line2D([], [], color=LOOKS[name][0], marker=LOOKS[name][1], linestyle="-",
                      label=MEANT.get(name, name)) for name in metrics]
    fig.legend(handles=[*handles, *more], loc="outside upper center", ncols=6)


def seen(table, name="full"):
    """Descriptions trained with and the one that was not: a panel a task, a row a metric, the paper's beside."""
    tasks, metrics = [task for task in known(table) if task != "zsre"], ("Rel", "Gen", "Loc", "Port")
    fig, axes = panels(len(tasks), 2 * len(metrics), 0.24)
    found = cells(table)
    for ax, task in zip(axes, tasks):
        for row, metric in enumerate(metrics):
            for shift, system, hollow in ((-0.17, name, False), (0.17, f"{name}, unseen", True)):
                look = {"markerfacecolor": "white"} if hollow else {}
                point(ax, row + shift, found.get((system, task, metric)), metric, **look)
                if (task, metric) in SEEN_AND_UNSEEN:
                    ax.plot(SEEN_AND_UNSEEN[task, metric][hollow], row + shift, **HOLLOW)
        ax.set(title=TASKS[task], xlabel="%", ylim=(len(metrics) - 0.5, -0.5))
    axes[0].set_yticks(range(len(metrics)), [MEANT[metric] for metric in metrics], fontsize=9)
    more = [Line2D([], [], color="#444444", marker="o", linestyle="none", label="seen"),
            Line2D([], [], color="#444444", marker="o", linestyle="none", markerfacecolor="white", label="unseen"),
            Line2D([], [], **HOLLOW, label="paper, GPT2-XL")]
    fig.legend(handles=more, loc="outside upper center", ncols=3)
    note(fig, "Upper: one of the nine descriptions that the editor was trained with. Lower: the tenth. Whole targets; "
              "ConvSent: z_sent · z_topic.\nThe paper shows Recent and CounterFact.")
    return fig


def styles(table, metrics=("Rel", "Gen", "Loc")):
    """What stands before a prompt, in training and test alike: a panel a task, a row a style, a point a metric."""
    tasks, names = known(table), [name for name in STYLES if name in set(table["system"])]
    fig, axes = panels(len(tasks), len(names))
    found = cells(table)
    for ax, task in zip(axes, tasks):
        for row, name in enumerate(names):
            for shift, metric in zip(np.linspace(-0.2, 0.2, len(metrics)), metrics):
                point(ax, row + shift, found.get((name, task, metric)), metric)
        ax.set(title=TASKS[task] + (", held out" if task == "zsre" else ""), xlabel="%",
               ylim=(len(names) - 0.5, -0.5))
    axes[0].set_yticks(range(len(names)), [STYLES[name] for name in names], fontsize=9)
    legend(fig, metrics)
    note(fig, "An editor a row, trained and tested with what is named. Locality: tokens; ConvSent: z_sent · z_topic, "
              "no rephrasing.")
    return fig


def crossed(table, metric="Rel"):
    """One editor; rows: what stood before the edit, columns: what stood before the questions; a panel a task."""
    tasks, found = known(table), cells(table)
    edits = [name for name in STYLES if any(system.startswith(f"{name} → ") for system in set(table["system"]))][::-1]
    fig, axes = plt.subplots(1, len(tasks), figsize=(WIDTH, 1.5 + 0.42 * len(edits)), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        shown = np.array([[found.get((f"{edit} → {edit if ask == 'same' else ask}", task, metric), (np.nan,))[0]
                           for ask in ASKED] for edit in edits])
        ax.imshow(shown, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for row, column in np.ndindex(shown.shape):
            ax.text(column, row, f"{shown[row, column]:.0f}", ha="center", va="center",
                    color="white" if shown[row, column] > 55 else "#222222")
        ax.set_title(TASKS[task])
        ax.set_xticks(range(len(ASKED)), ["same", "right", "nothing"], fontsize=8.5)
        ax.grid(False)
    axes[0, 0].set_yticks(range(len(edits)), [STYLES[edit].replace("both", "right instruction") for edit in edits],
                          fontsize=9)
    axes[0, 0].set_ylabel("before the edit")
    fig.supxlabel(f"before the questions  —  {MEANT[metric]}, %; one editor, trained with the right "
                  "instructions", fontsize=9)
    return fig


def numbers(table, counts, metrics=("Rel", "Gen")):
    """How many descriptions an editor was trained with, tested with those and with the one kept back."""
    tasks, found = [task for task in known(table) if task != "convsent"], cells(table)
    fig, axes = plt.subplots(1, len(tasks), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        for metric in metrics:
            color, marker = LOOKS[metric]
            for end, dash, face in (("", "-", color), (", unseen", (0, (4, 2)), "white")):
                line = np.array([found[f"{name}{end}", task, metric] for name in counts.values()])
                at = np.arange(len(line)) + (0.04 if end else -0.04)
                ax.plot(at, line[:, 0], color=color, marker=marker, linestyle=dash, markerfacecolor=face)
                ax.vlines(at, line[:, 1], line[:, 2], color=color, linewidth=1)
        ax.set_xticks(range(len(counts)), [str(count) for count in counts])
        ax.set(title=TASKS[task] + (", held out" if task == "zsre" else ""), xlabel="descriptions trained with",
               ylim=(-4, 104))
    axes[0, 0].set_ylabel("%")
    legend(fig, metrics, [Line2D([], [], color="#444444", linestyle="-", label="seen"),
                          Line2D([], [], color="#444444", linestyle=(0, (4, 2)), label="unseen")])
    return fig


def rounds(scores, checked):
    """The propose-and-score loop: scores a round on held-out training records, and what the choice does on the test."""
    tasks = list(dict.fromkeys(scores["task"]))
    fig, axes = plt.subplots(len(tasks), 2, figsize=(WIDTH, 0.7 + 2.4 * len(tasks)), sharey=True, squeeze=False)
    for (left, right), task in zip(axes, tasks):
        part = scores[scores["task"] == task]
        metrics = [name for name in LOOKS if name in part and part[name].notna().any()]
        for metric in metrics:
            left.plot(part["round"] + 1, 100 * part[metric], color=LOOKS[metric][0], marker=LOOKS[metric][1])
        for number in part.loc[part["kept"], "round"]:
            left.axvline(number + 1, color="#bbbbbb", linewidth=6, zorder=0, alpha=0.5)
        left.set(title=f"{TASKS[task]}: while writing", xlabel="round", xticks=list(part["round"] + 1), ylim=(-4, 104))
        left.set_ylabel("%")
        test = checked[checked["task"] == task].pivot(index="descriptions", columns="metric", values="mean")
        test = test.loc[list(dict.fromkeys(checked["descriptions"]))]
        for shift, metric in zip(np.linspace(-0.15, 0.15, len(metrics)), metrics):
            right.plot(np.arange(len(test)) + shift, 100 * test[metric], LOOKS[metric][1], color=LOOKS[metric][0])
        right.set_xticks(range(len(test)), test.index)
        right.set(title="on test records", xlim=(-0.5, len(test) - 0.5))
    legend(fig, metrics)
    note(fig, "Grey: the round that is kept. A round trains a small editor with ten new descriptions and scores it on "
              "training records kept back.")
    return fig
