"""The cases of notebooks 30 to 33 as they were called before `scores.Case`."""

from dataclasses import dataclass, replace

import pandas as pd

from editcore.files import read_json
from editcore.instructedit import scores
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.trained_editors import HypernetworkConfig

UNSEEDED = -1       # in place of a training seed, where nothing was trained
NAMES = {"base": "Base model", "ft": "FT-L", "calinet": "CaliNet", "ke": "KE", "mend": "MEND, multi-task",
         "grace": "GRACE", "instructedit": "InstructEdit"}
TOLD = "Base model, instructed"             # no edit, asked behind the instruction: what the words alone do
UNTRAINED = ("ft", "calinet", "grace")      # those that learn at the test, and nothing before
JOINT = ("calinet",)                        # those that learn all records at once


@dataclass(frozen=True)
class Loaded:
    """A model that edits are tried on."""

    name: str


@dataclass(frozen=True)
class Trial:
    """How records are edited and asked."""

    editor: str = ""                # a key of EDITORS; "": no edit, or that of `system`
    system: HypernetworkConfig | None = None    # the trained editor, with its instructions
    settings: tuple = ()            # (field, value) pairs of the editor
    number: int = -1                # the description of all records; -1: drawn for each from those trained with
    style: str = ""                 # of the instruction before the edit; "": the system's, "none" without one
    ask: str = ""                   # of that before the questions; "": as before the edit
    seed: int = 0                   # of the descriptions, ConvSent's taught reply and of sampled text
    fluency: int = 0                # tokens sampled after each prompt; 0: none


@dataclass(frozen=True)
class Case:
    """One cell of a table: who is tried on what."""

    name: str           # of the contender
    trial: Trial
    records: tuple      # EditRecords without instruction
    learned: tuple = () # records that one edit holds together, in place of an edit a record


def loaded(name):
    """The Loaded of "pocket", a folder or a Hugging Face name."""
    return Loaded(name)


def evaluate_all(given, cases, out_dir="results/tasks", editors="results/editors"):
    """DataFrame of `scores.evaluate`, with columns system, value_exact and value_token."""
    rows = scores.evaluate([_case(case) for case in cases], given.name, out_dir=out_dir, editors=editors)
    return rows.rename(columns={"editor": "system", "exact": "value_exact", "token": "value_token"})


def _case(case):
    trial = case.trial
    return scores.Case(case.name, tuple(case.records), network=trial.system, key=trial.editor, settings=trial.settings,
                       style=trial.style, question_style=trial.ask, description=trial.number, seed=trial.seed,
                       fluency=trial.fluency, together=tuple(case.learned))


def table_of(named, records, fluency=48, settings=None):
    """The Cases of the main table: who is compared, on the test records of each task.

    named: Named systems called as in NAMES; several seeds of one may be among them. records: {task: records}. settings:
    {untrained editor: {field: value}}. FT-L, GRACE and the trained editors edit each record; CaliNet learns all
    records of the tasks that were trained on at once. As published, tasks that no system was trained on are asked of
    what FT-L, CaliNet and GRACE learned from the others; in the fair rows (", fair" behind the name) these editors
    learn the asked records, as the trained ones do. TOLD is a control.
    """
    tasks = {task for one in named for task in one.system.tasks}
    others = tuple(one for task, part in records.items() if task in tasks for one in part)
    made, sampled = [], {task: fluency if part[0].topic else 0 for task, part in records.items()}
    told = [one.system.seed for one in named if one.name == NAMES["instructedit"]]      # the same descriptions
    for key, name in NAMES.items():
        trained = [Trial(system=one.system, seed=one.system.seed) for one in named if one.name == name]
        plain = [Trial(key, settings=tuple((settings or {}).get(key, {}).items()))] if key in UNTRAINED else []
        for task, part in records.items():
            for trial in trained or plain or [Trial()] * (key == "base"):
                trial, part = replace(trial, fluency=sampled[task]), tuple(part)
                alone = not plain or (task in tasks and key not in JOINT)
                made.append(Case(name, trial, part, () if alone else others))
                if key == "base":
                    made += [Case(TOLD, replace(trial, style="full", seed=seed), part) for seed in told]
                if plain and task not in tasks:
                    made.append(Case(f"{name}, fair", trial, part, part if key in JOINT else ()))
    return made


def cases_of(named, records):
    """The Cases of every Named system on the records of every task, with its own instructions."""
    return [Case(one.name, Trial(system=one.system, seed=one.system.seed), tuple(part)) for one in named
            for part in records.values()]


def transfer(named, records):
    """The Cases of the transfer table: editors of one task on the test records of every task.

    named: Named systems of one task each; that task is the name of their Cases.
    """
    return cases_of([replace(one, name=one.system.tasks[0]) for one in named], records)


def costs(named, editors="results/editors"):
    """DataFrame: what the training of each Named system took: name, tasks, examples, seconds, peak_mb, parameters."""
    rows = []
    for one in named:
        about = read_json(systems.train(one.system, editors).parent / "train.json")
        rows.append({"name": one.name, "tasks": ", ".join(one.system.tasks)} | {
            key: about[key] for key in ("records", "examples", "seconds", "peak_mb", "parameters")})
    return pd.DataFrame(rows)
