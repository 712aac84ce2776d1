"""A model, editors trained or not, and test records in; the scores of every record after its edit, kept, out.

    given = loaded("pocket")
    cases = [Case("FT-L", Trial(editor="ft"), records), Case("InstructEdit", Trial(system=system), records)]
    rows = evaluate_all(given, cases)           # the rows of `taskscores.score`, with columns system and seed

An editor edits each record on the model as it is, and only that record's questions see the edit; or, with `learned`
records, one edit of all of those is what every record is asked of.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from editcore.editors import EDITORS, configure
from editcore.files import atomic, read_json, sha256_text
from editcore.instructedit import examples, hypernet, instructions
from editcore.instructedit import scores as taskscores
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.trained_editors import HypernetworkConfig
from editcore.model import load, resolve
from editcore.progress import bar
from editcore.study.run import model_files_hash

FORMAT = 2          # raise it when the same input no longer gives the same scores
UNSEEDED = -1       # in place of a training seed, where nothing was trained
AT_ONCE = 64        # records whose edits are held at a time
# What is compared, in the order of tables: key -> name.
NAMES = {"base": "Base model", "ft": "FT-L", "calinet": "CaliNet", "ke": "KE", "mend": "MEND, multi-task",
         "grace": "GRACE", "instructedit": "InstructEdit"}
TOLD = "Base model, instructed"             # no edit, asked behind the instruction: what the words alone do
UNTRAINED = ("ft", "calinet", "grace")      # those that learn at the test, and nothing before
JOINT = ("calinet",)                        # those that learn all records at once


@dataclass(frozen=True)
class Loaded:
    """A model that edits are tried on."""

    model: object
    tok: object
    name: str       # as given to `loaded`
    digest: str     # hash of its files


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


def loaded(name, device=None):
    """The Loaded of "pocket", a folder or a Hugging Face name."""
    place = resolve(name)
    return Loaded(*load(place, device), name, model_files_hash(name))


def evaluate(given, case, out_dir="results/tasks", editors="results/editors"):
    """The rows of one Case; see `evaluate_all`."""
    return evaluate_all(given, [case], out_dir, editors).drop(columns=["system", "seed"])


def evaluate_all(given, cases, out_dir="results/tasks", editors="results/editors"):
    """DataFrame with the rows of all cases and columns `system`, their names, and `seed`, those of their trials.

    Each case is kept as out_dir/<id>.parquet, where the id tells model, editor, records and instructions; what is
    there is read. Systems are trained first if they are not. ValueError names a case that cannot be tried.
    """
    cases, found, memory = list(cases), [None] * len(cases), {"records": None, "sheets": [], "joint": {}}
    for case in cases:
        if not case.records:
            raise ValueError(f"{case.name}: there are no records")
        _editor(given, case.trial, "")
    order = sorted(range(len(cases)), key=lambda i: sha256_text(*asked(cases[i])))   # equal questions one after another
    for index in bar(order, "evaluating", len(order)):
        path = Path(out_dir) / f"{identifier(given, cases[index], editors)}.parquet"
        if not path.is_file():
            rows = _tried(given, cases[index], editors, memory)
            with atomic(path) as tmp:
                rows.to_parquet(tmp, index=False)
        found[index] = pd.read_parquet(path).assign(system=cases[index].name, seed=_seed(cases[index].trial))
    return pd.concat(found, ignore_index=True)


def _seed(trial):
    """The training seed of a trial, or that of its descriptions, if it has either."""
    return trial.seed if trial.system is not None or trial.style else UNSEEDED


def identifier(given, case, editors="results/editors"):
    """Equal models, editors, records and instructions give the same id, whatever their names and folders are."""
    trial, network = case.trial, ""
    if trial.system is not None:
        network = hypernet.digest(systems.train(trial.system, editors))
    resolved = replace(trial, system=None, settings=(_editor(given, trial, "")[1],))     # with what they leave out
    edited = framed(case.learned or case.records, trial, trial.style)
    parts = FORMAT, given.digest, network, resolved, edited, asked(case), bool(case.learned)
    return f"{trial.editor or (trial.system and trial.system.editor) or 'base'}-{sha256_text(*parts)[:16]}"


def framed(records, trial, style):
    """The records with the trial's instruction in the frame of `style` ("": the trial's own, or none)."""
    system = trial.system
    table = systems.descriptions_of(system) if system else instructions.DESCRIPTIONS
    style = style or trial.style or (system.style if system else "none")
    seen = system.n_descriptions if system else instructions.SEEN
    return tuple(instructions.instructed(
        one, instructions.drawn(one, trial.seed, seen) if trial.number < 0 else trial.number, style, table)
        for one in records)


def asked(case):
    """The records of a Case as they are asked."""
    return framed(case.records, case.trial, case.trial.ask)


def edits_of(given, trial, records, editors="results/editors", together=False):
    """An edit a record (a Delta or a Patch, None for no editor), or with `together` one edit of them all."""
    editor, config = _editor(given, trial, editors)
    if editor is None:
        return None if together else [None] * len(records)
    facts = [examples.asked(one, str, trial.seed) for one in framed(records, trial, trial.style)]
    prepared = editor.prepare(given.model, given.tok, config, None)
    if together:
        return editor.edit(given.model, given.tok, facts, config, prepared)
    return editor.edit_each(given.model, given.tok, facts, config, prepared)


def _editor(given, trial, editors):
    """(Editor, its settings) of a trial, (None, None) without one; editors "": an untrained network in place of the
    system's, for a check."""
    if trial.system is not None:
        if trial.editor:
            raise ValueError(f"trial: editor {trial.editor!r} and a system; give one of them")
        config, _ = systems.configured(systems.check(trial.system))
        config = replace(config, network=str(systems.train(trial.system, editors))) if editors else config
        return EDITORS[trial.system.editor], config
    if not trial.editor:
        return None, None
    return EDITORS.get(trial.editor), configure(trial.editor, dict(trial.settings), given.name)


def _tried(given, case, editors, memory):
    """The rows of one Case; `memory` keeps what the next cases may use as well."""
    model, tok, trial, found = given.model, given.tok, case.trial, []
    for number, (sheet, before) in enumerate(_asked_before(given, asked(case), memory)):
        part = case.records[number * AT_ONCE:(number + 1) * AT_ONCE]
        edits = [_joint(given, case, editors, memory)] * len(part) if case.learned else edits_of(given, trial, part,
                                                                                                 editors)
        plain = all(edit is None for edit in edits)
        found.append(taskscores.score(sheet, before, before if plain else taskscores.read(model, sheet, edits)))
        if trial.fluency:
            found.append(taskscores.fluency(model, tok, sheet.records, edits, trial.seed, trial.fluency))
    return pd.concat(found, ignore_index=True)


def _asked_before(given, records, memory):
    """[(Sheet, what the unedited model says)] of the records in parts; kept for the next case that asks the same."""
    if memory["records"] != records:
        parts = [records[first:first + AT_ONCE] for first in range(0, len(records), AT_ONCE)]
        sheets = [taskscores.prepare(given.model, given.tok, part) for part in parts]
        memory |= {"records": records, "sheets": [(one, taskscores.read(given.model, one)) for one in sheets]}
    return memory["sheets"]


def _joint(given, case, editors, memory):
    """The one edit of a case's learned records, made once for all cases that share it."""
    key = replace(case.trial, fluency=0), case.learned
    if key not in memory["joint"]:
        memory["joint"][key] = edits_of(given, case.trial, case.learned, editors, True)
    return memory["joint"][key]


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
