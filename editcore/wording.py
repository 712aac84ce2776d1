"""Trained editors and test records in; what is tried on them to learn which words of an instruction matter, out.

    cases = said_and_unseen(named, records)     # descriptions trained with, and the one kept for the test
    cases = crossed(named, records)             # one instruction before the edit, another before the questions
    score = score_of(system, "counterfact", loaded("pocket"), "results")    # for `writers.build`
"""

import dataclasses
import itertools
from pathlib import Path

import pandas as pd

from editcore import orderings
from editcore.files import read_json, sha256_text
from editcore.instructedit import contenders, instructions, writers
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.contenders import Case, Trial
from editcore.orderings import Claim

UNSEEN = instructions.SEEN      # number of the description that no editor is trained with
SEEN_AND_UNSEEN = {             # figure 3 of arXiv:2402.16123, GPT2-XL, %: (task, metric) -> seen, unseen
    ("recent", "Rel"): (85.7, 84.7), ("recent", "Gen"): (51.6, 47.4), ("recent", "Loc"): (64.6, 64.9),
    ("recent", "Port"): (47.3, 47.0), ("counterfact", "Rel"): (80.8, 80.4), ("counterfact", "Gen"): (53.2, 49.9),
    ("counterfact", "Loc"): (67.8, 68.2), ("counterfact", "Port"): (50.8, 51.0)}
NUMBERED = ("full", "description")                  # styles in which the number of a description tells
WRONG = ("swapped", "random")   # styles that tell another task, or nothing


def said_and_unseen(named, records):
    """Cases of Named systems with descriptions they were trained with, and with the one kept back ("…, unseen") where

    their style shows it. Systems of one name that differ in their seed draw descriptions and taught replies with it.
    """
    asked = [(one, called, number) for one in named for called, number in
             ((one.name, -1), *([(f"{one.name}, unseen", UNSEEN)] if one.system.style in NUMBERED else []))]
    return [Case(called, Trial(system=one.system, number=number, seed=one.system.seed), tuple(part))
            for one, called, number in asked for part in records.values()]


def crossed(named, records, styles=("full", "none", *WRONG)):
    """Cases "edit → question": every style before the edit with the same before the questions, and with and without.

    With "full" on one side and "none" on the other this is prefix-free querying, both ways.
    """
    made, pairs = [], dict.fromkeys((edit, ask) for edit in styles for ask in (edit, "full", "none"))
    for one, (edit, ask) in itertools.product(named, pairs):
        style = "" if edit == one.system.style else edit        # as other cases say it, so that scores are found again
        trial = Trial(system=one.system, style=style, ask="" if ask == edit else ask, seed=one.system.seed)
        made += [Case(f"{edit} → {ask}", trial, tuple(part)) for part in records.values()]
    return made


def claims(full="full", none="none", tasks=instructions.TITLES):
    """Orderings on the words of instructions: against none, constant and random words; seen against unseen."""
    made = []
    for task in tasks:
        title, metrics = instructions.TITLES[task], ("Rel",) if task == "convsent" else ("Rel", "Gen")
        made += [Claim(f"{title}: instruction > {said}, {metric}", f"Instruction > {said}", task, metric, full, other)
                 for metric in metrics
                 for other, said in ((none, "none"), ("constant", "one for all"), ("random", "random words"))]
        if task != "zsre":      # of which no description was seen
            made.append(Claim(f"{title}: unseen = seen, Rel", "Unseen = seen", task, "Rel", f"{full}, unseen", full,
                              alike=True, paper=_drop(task, "Rel")))
        if task in ("recent", "counterfact"):
            made.append(Claim(f"{title}: seen > unseen, Gen", "Unseen costs generalization", task, "Gen", full,
                              f"{full}, unseen", paper=-_drop(task, "Gen")))
        made.append(Claim(f"{title}: right > swapped, Rel", "A wrong instruction harms", task, "Rel", "full → full",
                          "swapped → swapped"))
    return made


def _drop(task, metric):
    """Unseen less seen in the paper, points; NaN where it shows none."""
    seen, unseen = SEEN_AND_UNSEEN.get((task, metric), (float("nan"),) * 2)
    return unseen - seen


def trial_of(task, model="pocket", data="", examples=0, settings=()):
    """A System of one task that leaves at least a fifth of its training records, up to 40, to score descriptions on."""
    count = len(systems.load_records(model, data, "train")[task])
    return systems.make_config(model=model, data=data, tasks=(task,), examples=examples, settings=settings,
                        counts={task: max(1, count - min(40, max(1, count // 5)))})


def held_out(system, task, count=0):
    """Training records of a task that the System does not learn from (at most `count`): to choose by, not to test.

    ValueError if it learns from all of them: give its `counts` fewer.
    """
    every = systems.load_records(system.model, system.data, "train", system.seed)[task]
    used = {one.case_id for one in systems.training_records(system) if one.task == task}
    left = [one for one in every if one.case_id not in used]
    if not left:
        raise ValueError(f"{task}: all {len(every)} training records are learned from, none is left to score on")
    return tuple(left[:count or None])


def tried_with(system, task, texts, given, results, records=None):
    """{metric: mean} of a System trained with ten descriptions of a task; on its held-out training records, or others.

    Rel and Gen: whole targets; Loc and Port: tokens.
    """
    own = systems.check(dataclasses.replace(system, descriptions=((task, tuple(texts)),)))
    records = held_out(own, task) if records is None else tuple(records)
    rows = contenders.evaluate_all(given, [Case("trial", Trial(system=own), records)], f"{results}/tasks",
                                   f"{results}/editors")
    rows = rows[rows["metric"].isin(orderings.METRICS)]
    return orderings.per_record(rows).mean(axis=1).groupby("metric", observed=True).mean().to_dict()


def loop(system, task, writer, given, results, rounds=4):
    """(Built, table of the rounds) of the propose-and-score loop of one task; each round is written as it ends.

    The trial editor is `system`, trained anew with each round's descriptions and scored on its held-out training
    records. results/wording/<id>.json holds what was asked, answered and scored.
    """
    path = Path(results) / "wording" / f"{task}-{sha256_text(systems.identifier(system), task, rounds)[:12]}.json"
    built = writers.build(task, writer, lambda texts: tried_with(system, task, texts, given, results), rounds,
                          writers.log_to(path))
    rows = [{"task": task, "round": row["round"], **row["scores"], "rose": ", ".join(row["rose"]) or "nothing",
             "kept": set(row["descriptions"]) == set(built.descriptions)} for row in read_json(path)]
    return built, pd.DataFrame(rows)


def checked_on_test(built, system, task, given, results, records):
    """Table of what the loop's choice is worth on test records: metric by first round, best round and our own ten.

    Columns: descriptions, metric, mean.
    """
    sets = {"first round": built.rounds[0]["descriptions"], "best round": built.descriptions,
            "written by hand": instructions.descriptions()[task]}
    return pd.DataFrame([{"task": task, "descriptions": name, "metric": metric, "mean": value}
                         for name, texts in sets.items()
                         for metric, value in tried_with(system, task, texts, given, results, records).items()])
