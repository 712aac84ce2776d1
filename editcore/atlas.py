"""Trained editors and test records in; the directions of their edits, compared in pairs and in numbers, out.

    lab = opened("pocket", records=80)
    whose = sources(lineups.read(lineups.FILE, "directions"))       # who edits, and what stands before the prompts
    rows = table(lab, whose)                                        # every score of every edit, kept
    C = panel(lab, whose["InstructEdit"], whose["MEND, multi-task"], name)   # of one joint picture
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from editcore import separation
from editcore.files import atomic, sha256_text
from editcore.instructedit import directions, instructions, mend
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.records import load_records, records_folder
from editcore.model import files_hash, load
from editcore.progress import bar

FORMAT = 2      # raise it when the same input no longer gives the same scores
TASKS = ("recent", "counterfact", "zsre")       # those of the published figure
EDITOR, NEUTRAL, RAW = "edit", "start", "raw"   # a hypernetwork's edit; its normaliser alone; the gradient as it is
SINGLE = "MEND, single-task"                    # each task edited by the editor of that task
SAID = {"none": "no prefix", "constant": "one constant prefix", "random": "random words", "swapped": "another task's",
        "full": "instruction"}

HEADS = {               # the null controls as they are listed: heading -> {source: what it is asked with, or is}
    "Raw gradients": {f"gradient, {said}": said for said in SAID.values()},
    "Not trained": {"normaliser alone, instruction": "normaliser alone"},
    "InstructEdit, asked with": {f"InstructEdit, {said}": said for said in SAID.values()},
    "Others": {"random words": "trained with random words", "MEND, multi-task": "multi-task MEND",
               SINGLE: "single-task MEND"},
}


@dataclass(frozen=True)
class Lab:
    """A model and the records that are edited."""

    model: object
    tok: object
    name: str           # as given to `opened`
    records: tuple
    groups: tuple       # the task of each


@dataclass(frozen=True)
class Source:
    """Whose edits are looked at."""

    systems: tuple          # (task, System) pairs
    style: str = "none"     # of what stands before the prompts
    made: str = EDITOR      # EDITOR, NEUTRAL or RAW


def opened(name="pocket", data="", records=80, tasks=TASKS, seed=0):
    """The Lab of a model and as many test records a task as asked for, or as the smallest task has."""
    every = load_records(name, data, "test")
    if missing := [task for task in tasks if task not in every]:
        raise FileNotFoundError(f"{records_folder(name, data)}: no {missing[0]}_test.json")
    count = min(records, *(len(every[task]) for task in tasks))
    if count < separation.FOLDS:
        raise ValueError(f"atlas: {count} records a task, but {separation.FOLDS} are needed")
    some = [one for task in tasks for one in random.Random(f"{seed} atlas {task}").sample(every[task], count)]
    return Lab(*load(name), name, tuple(some), tuple(one.task for one in some))


def sources(named, tasks=TASKS):
    """{name: Source} of Named systems with their own instructions; if there is an editor without instruction for each

    single task, one more, SINGLE: each task edited by its own.
    """
    made = {one.name: Source(tuple((task, one.system) for task in tasks), one.system.style) for one in named}
    single = {one.system.tasks[0]: one.system for one in named
              if len(one.system.tasks) == 1 and one.system.style == "none" and one.system.editor == "mend"}
    if set(tasks) <= set(single):
        made[SINGLE] = Source(tuple((task, single[task]) for task in tasks), "none")
    return made


def controls(full, plain):
    """{name: Source} of the null controls of a Source with instructions, and one without."""
    made = {f"gradient, {said}": replace(full, style=style, made=RAW) for style, said in SAID.items()}
    made["normaliser alone, instruction"] = replace(full, made=NEUTRAL)
    made |= {f"InstructEdit, {said}": replace(full, style=style) for style, said in SAID.items()}
    return made | {"MEND, no prefix": plain}


def edits(lab, source, editors="results/editors", site=None):
    """The `directions.Edits` of all records by the source; systems that are not trained are trained now."""
    stage = {RAW: "raw", NEUTRAL: "untrained", EDITOR: "trained"}[source.made]
    of_task, first = dict(source.systems), source.systems[0][1]
    parts = {}
    for system in dict.fromkeys(of_task.values()):
        found = directions.gradients(
            lab.model, lab.tok, lab.records, replace(system, style=source.style, seed=first.seed), stage="raw")
        parts[system] = found if stage == "raw" else _through(system, stage, editors, found)
    factors = tuple(parts[of_task[task]].factors[i] for i, task in enumerate(lab.groups))
    return replace(parts[first], factors=factors)


def _through(system, stage, editors, found):
    network = directions._network(system, stage, editors)
    with torch.no_grad():
        return replace(found, factors=tuple(directions._transformed(network, one) for one in found.factors))


def maps(lab, source):
    """{name: words} of the maps that a source edits, in the order of the blocks, which are counted from 0."""
    config, _ = systems.configured(source.systems[0][1])
    names = [site.name for site in mend.sites(lab.model, config.layers, config.parts)]
    blocks = mend.layer_numbers(lab.model, config.layers)
    each = len(names) // len(blocks)
    parts = ("in", "gate", "out") if each == 3 else ("in", "out") if each == 2 else (config.parts.removeprefix("mlp_"),)
    return {name: f"block {block}, {part}" for name, (block, part) in
            zip(names, ((block, part) for block in blocks for part in parts), strict=True)}


def table(lab, whose, out_dir="results/directions", editors="results/editors"):
    """DataFrame with a row an edit and view: source, reading, map, record and the columns of `separation.scored`.

    whose: {name: Source}. Each source's rows are kept as out_dir/<id>.parquet, where the id tells model, records,
    editors and prefixes; what is there is read. ValueError names a record that cannot be asked.
    """
    order, found = sorted(whose, key=lambda name: whose[name].style), {}     # equal prefixes one after another
    for name in bar(order, "directions", len(order)):
        path = Path(out_dir) / f"{identifier(lab, whose[name], editors)}.parquet"
        if not path.is_file():
            own, mark = edits(lab, whose[name], editors), "" if whose[name].made == RAW else "~"
            rows = [separation.scored(directions.cosines(own, one, part), lab.groups).assign(
                reading=part + mark, map=one or "together", record=range(len(own)))
                for one in (*own.maps, "") for part in (("u", "delta", "G") if one else ("G",))]
            with atomic(path) as tmp:
                pd.concat(rows, ignore_index=True).to_parquet(tmp, index=False)
        found[name] = pd.read_parquet(path).assign(source=name)
    return pd.concat([found[name] for name in whose], ignore_index=True)


def identifier(lab, source, editors="results/editors"):
    """Equal models, records, trained editors and prefixes give the same id, whatever their names and folders are."""
    if source.made == RAW:
        who = list(maps(lab, source))
    else:
        who = [(task, systems.train(one, editors).parent.name) for task, one in source.systems]
    return f"{source.made}-{sha256_text(FORMAT, files_hash(lab.name), lab.records, who, source.style)[:16]}"


def cosines(lab, source, site, editors="results/editors"):
    """Cosines (n, n) of the edits of a Source in one map."""
    return directions.cosines(edits(lab, source, editors), site)


def panel(lab, first, second, site, editors="results/editors", reading="G"):
    """Cosines (2n, 2n) of the edits of two Sources in one map: those of the first, then those of the second."""
    return directions.cosines(edits(lab, first, editors) + edits(lab, second, editors), site, reading)


def paired(C):
    """Share of the edits of a `panel` whose nearest direction is that of the same record, edited by the other."""
    far, n = C - 3 * np.eye(len(C)), len(C) // 2
    return float((far.argmax(1) == (np.arange(2 * n) + n) % (2 * n)).mean())


def swaps(lab, source, site, editors="results/editors"):
    """Which task edits behind another task's instruction look like: `separation.swapped_reading` of a Source's edits in

    one map, those whose instruction names a task that is compared.
    """
    C, n = panel(lab, source, replace(source, style="swapped"), site, editors), len(lab.records)
    tasks = list(instructions.TITLES)
    said = [tasks[(tasks.index(task) + 1) % len(tasks)] for task in lab.groups]     # as instructions.swapped does
    rows = separation.swapped_reading(C[:n, :n], C[n:, :n], lab.groups, said)
    return rows[rows["said"].isin(lab.groups)].reset_index(drop=True)


def numbers(rows):
    """DataFrame with a row a source, reading, map and score: mean, low, high (95 %, over edits)."""
    key, parts = ["source", "reading", "map"], []
    for values, part in rows.groupby(key, sort=False):
        parts.append(separation.summary(part).rename_axis("score").reset_index().assign(**dict(zip(key, values))))
    return pd.concat(parts, ignore_index=True)[[*key, "score", "mean", "low", "high"]]
