"""Tables of `atlas` and answers after the edits in; what a picture of directions may be taken to say, checked, out.

    found = verdicts(rows, "G", name)               # claims and controls: held, failed or undecided
    plain(found, told)                              # one sentence
    success(rows, answers, "G", name)               # how far apart against how well edited
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from editcore import separation
from editcore.atlas import SINGLE
from editcore.orderings import per_record, resampled, verdict

PICTURES = {            # of the published figure: panel -> (circles, triangles)
    "a  instructions or none": ("InstructEdit", "MEND, multi-task"),
    "a  an editor a task": (SINGLE, "MEND, multi-task"),
    "b  trained on one task": ("on Recent", "InstructEdit"),
    "b  trained on two": ("on Recent, CounterFact", "InstructEdit"),
    "d  one-sided mixture": ("on Recent, 25 × ConvSent", "MEND, multi-task"),
    "d  balanced mixture": ("on Recent, 2.5 × ConvSent", "MEND, multi-task"),
}
CLAIMS = (              # what a picture of directions is taken to say: (text, should be further apart, than what)
    ("a: instructions part the tasks", "InstructEdit", "MEND, multi-task"),
    ("a: so do editors of one task each", SINGLE, "MEND, multi-task"),
    ("b: all training tasks more than one", "InstructEdit", "on Recent"),
    ("b: all more than two", "InstructEdit", "on Recent, CounterFact"),
    ("d: balanced mixtures more than one-sided ones", "on Recent, 2.5 × ConvSent", "on Recent, 25 × ConvSent"),
    ("control: more than the same prompts' raw gradients", "InstructEdit", "gradient, instruction"),
    ("control: more than normalising alone", "InstructEdit", "normaliser alone, instruction"),
    ("control: more than without the prefix at the test", "InstructEdit", "InstructEdit, no prefix"),
    ("control: more than asked with random words", "InstructEdit", "InstructEdit, random words"),
    ("control: more than trained with random words", "InstructEdit", "random words"),
    ("control: raw gradients, instruction more than none", "gradient, instruction", "gradient, no prefix"),
    ("control: raw gradients, random words more than none", "gradient, random words", "gradient, no prefix"),
)
PAPER = {               # figure 4 c, %, digitised: (metric, task) -> after one, two and three training tasks
    ("Rel", "recent"): (72.0, 86.0, 85.7), ("Rel", "counterfact"): (23.4, 82.9, 80.8),
    ("Rel", "zsre"): (6.2, 50.0, 82.8), ("Gen", "recent"): (55.5, 46.2, 51.7),
    ("Gen", "counterfact"): (8.8, 56.2, 53.2), ("Gen", "zsre"): (4.5, 43.5, 78.4),
}


def apart(rows, first, second, reading, site):
    """`separation.difference` of two sources (first less second) in one reading and map."""
    parts = [rows[(rows["source"] == name) & (rows["map"] == site) & (rows["reading"].str.rstrip("~") == reading)]
             for name in (first, second)]
    return separation.difference(*parts)


def verdicts(rows, reading, site, score="silhouette", claims=CLAIMS):
    """A row a claim on sources that are in the table: text, more, less, mean difference, low, high, verdict.

    Paired over the edits; "held" if the 95 % interval lies on the claim's side of 0, "failed" if on the other, else
    "undecided". Less is further apart where the score is the ratio.
    """
    known, made = set(rows["source"]), []
    for text, more, less in claims:
        if {more, less} <= known:
            sides = (less, more) if score == "ratio" else (more, less)
            one = apart(rows, *sides, reading, site).loc[score]
            made.append({"text": text, "more": more, "less": less, **one, "verdict": verdict(one["low"], one["high"])})
    return pd.DataFrame(made)


def plain(found, told):
    """The verdict on the published picture in one sentence, from `verdicts` and `swaps` of the editor.

    "Further apart" is said only where it held; what is undecided is said to be not shown.
    """
    state = dict(zip(found["text"], found["verdict"]))
    words, facts = told["probe_as_told"].mean(), told["probe_as_is"].mean()
    return (f"{_what(state)}. Behind another task's instruction {100 * words:.0f} % of the edits look like the task "
            f"that is named, {100 * facts:.0f} % like that of the fact")


def _what(state):
    """The sentence that the verdicts {text: "held", "failed" or "undecided"} allow."""
    def missing(*texts):
        return [f"{text.removeprefix('control: more than ')} ({state.get(text, 'not tried')})" for text in texts
                if state.get(text) != "held"]
    text = missing("control: more than the same prompts' raw gradients", "control: more than normalising alone")
    prefix = missing("control: more than without the prefix at the test")
    sense = missing(*(f"control: more than {how} with random words" for how in ("asked", "trained")))
    if state.get("a: instructions part the tasks") != "held":
        return "the picture does not appear: tasks are not shown to be further apart with instructions than without"
    if text:
        return ("the picture may show the prompts' text alone: tasks are not shown to be further apart than in "
                + " and ".join(text))
    if prefix or sense:
        return ("training parts the tasks, more than their prompts' text, but not shown to be by what the instruction "
                "says: they are not further apart than " + ", ".join(prefix + sense))
    return ("the picture shows learned control: tasks are further apart than in raw gradients of the same prompts, "
            "without the prefix, and behind words without meaning")


def success(rows, answers, reading, site):
    """A row a source and task: silhouette of its edits, and the shares Rel and Gen that are exact after them.

    rows: `table`; answers: `contenders.evaluate_all` of the same sources on the same records.
    """
    part = rows[(rows["map"] == site) & (rows["reading"].str.rstrip("~") == reading)]
    apart = part.groupby(["source", "group"], sort=False)["silhouette"].mean().rename_axis(["system", "task"])
    scores = answers[answers["metric"].isin(("Rel", "Gen"))].groupby(["system", "task", "metric"], observed=True)
    return scores["value_exact"].mean().unstack().join(apart, how="inner").reset_index()


def correlation(found, metric, draws=2000, seed=0):
    """(rho, low, high): Spearman's correlation over systems of silhouette and success, mean over tasks, with the 95 %

    interval over resampled systems; NaN where nothing varies. found: `success`.
    """
    wide = [found.pivot(index="task", columns="system", values=name).to_numpy() for name in ("silhouette", metric)]
    draw = np.random.default_rng(seed).integers(wide[0].shape[1], size=(draws, wide[0].shape[1]))
    drawn = [_spearman(*(one[:, pick] for one in wide)) for pick in draw]
    known = np.array(drawn)[~np.isnan(drawn)]
    return _spearman(*wide), *(np.quantile(known, separation.LEVEL) if len(known) else (np.nan, np.nan))


def _spearman(first, second):
    """Mean over rows of the correlation of ranks, ties sharing the middle; rows without variation are left out."""
    first, second = (rankdata(one, axis=1) - (one.shape[1] + 1) / 2 for one in (first, second))
    size = np.sqrt((first ** 2).sum(1) * (second ** 2).sum(1))
    return float(((first * second).sum(1)[size > 0] / size[size > 0]).mean()) if (size > 0).any() else np.nan


def followed(told):
    """A row a source: shares of its edits that look like the task that is named, that of the fact, or another; low and

    high of the first, 95 % over the edits. told: {name: `atlas.swaps`}.
    """
    made = {}
    for name, rows in told.items():
        flags = rows["probe_as_told"].to_numpy()
        low, high = np.quantile(separation.resampled(rows["group"]) @ flags / len(flags), separation.LEVEL)
        words, facts = flags.mean(), rows["probe_as_is"].mean()
        made[name] = {"as_told": words, "as_is": facts, "other": 1 - words - facts, "low": low, "high": high}
    return pd.DataFrame(made).T


def scaling(answers, counts):
    """A row a number of training tasks, task and metric (Rel, Gen; exact): mean, low, high (95 %, over records).

    counts: {system: number of its training tasks}.
    """
    made = []
    for (system, task, metric), part in per_record(answers, "exact").groupby(level=[0, 1, 2], sort=False):
        if system in counts and metric in ("Rel", "Gen"):
            low, high = np.quantile(resampled(part), separation.LEVEL)
            made.append({"tasks": counts[system], "task": task, "metric": metric, "mean": part.to_numpy().mean(),
                         "low": low, "high": high})
    return pd.DataFrame(made).sort_values(["metric", "tasks"], kind="stable", ignore_index=True)


def singly(rows, answers, lab, reading, site):
    """A row a source and record: run (the source), task, silhouette, and Rel, whether its edit succeeded."""
    part = rows[(rows["map"] == site) & (rows["reading"].str.rstrip("~") == reading)]
    known = pd.DataFrame({"record": range(len(lab.records)), "task": lab.groups,
                          "case_id": [one.case_id for one in lab.records]})
    exact = answers[answers["metric"] == "Rel"][["system", "task", "case_id", "value_exact"]]
    found = part.merge(known, on="record").merge(exact, left_on=["source", "task", "case_id"],
                                                 right_on=["system", "task", "case_id"])
    return found.assign(run=found["source"], Rel=found["value_exact"] == 1)[["run", "task", "silhouette", "Rel"]]
