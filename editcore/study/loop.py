"""A Run in; facts edited one update after another, measured on the way, and a folder with rows and run.json out.

    folder = execute(Run(editor="rome", n_edits=400))       # takes up where an earlier start was killed
    folders = execute_all(runs, workers=2)                  # those that differ in order or seed only share every pass
    df = table("results/runs", editor="rome")               # the rows of all finished runs
"""

import dataclasses
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from editcore import progress
from editcore.delta import Delta
from editcore.editors import EDITORS, configure
from editcore.model import synchronize
from editcore.study import checkpoint, results
from editcore.study import measure as lab
from editcore.study import run as inputs
from editcore.study.checkpoint import Progress
from editcore.study.results import COLUMNS, runs, table
from editcore.study.run import Run, make

__all__ = ["COLUMNS", "Run", "execute", "execute_all", "execute_together", "groups", "make", "runs", "table"]
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # of an edit whose facts were checked before
FREE = ("order", "seed", "leave_out")   # parameters in which runs that share their passes may differ


@dataclass(frozen=True)
class Going:
    """A run under way."""

    run: Run
    folder: Path
    paths: dict                     # inputs.files
    identity: dict                  # hashes of all that it is made from
    kept: tuple | None = None       # (Progress, identity) of its checkpoint
    lab: object = None              # its Lab, once set up
    state: Progress | None = None
    failure: str | None = None      # why it ended early


def execute(run, out_dir="results/runs", keep_going=False):
    """Do a run, or what is missing of it; the folder with its rows. A finished run is left as it is, at once.

    An edit that fails or is not finite ends the run as "stopped", its rows so far written: with keep_going that is a
    result, else a ValueError that names record and step. Bad input is one error before anything is done.
    """
    return execute_together([run], out_dir, keep_going)[0]


def execute_together(several, out_dir="results/runs", keep_going=False):
    """`execute` for runs of one model and editor that differ in FREE only: the same rows, fewer passes.

    Their models differ in the edited weights alone, so all runs' facts of one update are optimised together, each row
    of a batch on its own run's weights; what is measured is measured run by run. ValueError if they differ in more.
    """
    if len(set(map(_shared, several))) > 1:
        raise ValueError(f"runs together may differ in {', '.join(FREE)} only")
    opened = [_open(run, Path(out_dir), keep_going) for run in several]
    todo = [one for one in opened if isinstance(one, Going)]
    if todo:
        with torch.random.fork_rng():
            _work(todo, Path(out_dir) / "moments", keep_going)
    return [one.folder if isinstance(one, Going) else one for one in opened]


def execute_all(several, out_dir="results/runs", workers=1, keep_going=True):
    """`execute` for many runs: those that can share their passes together, `workers` groups at a time, each in a
    process of its own with its share of the machine's threads. The folders, in the order of the runs."""
    parts = groups(several, workers)
    if workers <= 1 or len(parts) <= 1:
        found = [execute_together(part, out_dir, keep_going) for part in parts]
    else:
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (threads,)) as pool:
            waiting = [pool.submit(execute_together, part, out_dir, keep_going) for part in parts]
            for done in progress.bar(as_completed(waiting), "runs", len(waiting)):
                done.result()
            found = [one.result() for one in waiting]
    folders = {run: folder for part, folders in zip(parts, found) for run, folder in zip(part, folders)}
    return [folders[run] for run in several]


def groups(several, workers=1, most=8):
    """The runs in groups that `execute_together` takes: at most `most` each, and as many groups as `workers` need."""
    alike = {}
    for run in dict.fromkeys(several):
        key = _shared(run) if run.editor in EDITORS and EDITORS[run.editor].shares_passes else run
        alike.setdefault(key, []).append(run)
    size = min(most, max(1, -(-len(dict.fromkeys(several)) // max(1, workers))))
    return [part[i:i + size] for part in alike.values() for i in range(0, len(part), size)]


def _shared(run):
    return replace(run, **{field.name: field.default for field in dataclasses.fields(Run) if field.name in FREE})


def _open(run, out_dir, keep_going):
    """The Going of a run that has something to do, else its folder; everything that needs no model is checked."""
    inputs.check(run)
    paths = inputs.files(run)
    configure(run.editor, dict(run.settings), run.model)
    inputs.check_editor(run, EDITORS[run.editor], paths)
    identity = inputs.input_hashes(run, paths)
    folder = out_dir / inputs.run_id(run, identity)
    if results.status(folder) in (("finished", "stopped") if keep_going else ("finished",)):
        return folder
    _refuse_changed(folder, identity)
    return Going(run, folder, paths, identity, checkpoint.load(folder / "checkpoint"))


def _work(todo, cache, keep_going):
    """Do what is missing of runs that share a model; their folders are written as each one ends."""
    began, shared = time.monotonic(), None
    for index, one in enumerate(todo):
        made = lab.set_up(one.run, one.paths, one.kept[0].contexts if one.kept else (), cache, shared)
        shared = shared or made
        identity = one.identity | {"the model's weights": shared.weights_hash}
        if one.kept:
            checkpoint.check_identity(one.kept[1], identity, one.folder / "checkpoint")
        todo[index] = replace(one, lab=made, identity=identity)
    spent = (time.monotonic() - began) / len(todo)
    for index, one in enumerate(todo):
        going = _taken_up(one) if one.kept else _begin(one)
        todo[index] = replace(going, state=replace(going.state, elapsed=going.state.elapsed + spent))
    size = todo[0].run.batch_size
    begin = min(one.state.step for one in todo) // size * size     # a run that has ended may have ended between steps
    steps = range(begin, max(len(one.lab.facts) for one in todo), size)
    for step in progress.bar(steps, f"{todo[0].run.editor} edits", start=steps.start // size):
        now = [i for i, one in enumerate(todo) if one.state.step == step and step < len(one.lab.facts)
               and one.failure is None]     # a run that was ahead waits for the others
        for i, one in zip(now, _advance([todo[i] for i in now]) if now else ()):
            todo[i] = _kept(one, step)
    for one in sorted(todo, key=lambda one: one.failure is not None):      # an error must not cost the others' rows
        _close(one, len(todo), keep_going)


def _kept(one, before):
    """The run, its checkpoint written if it is due."""
    if one.failure or _due(one.run.checkpoint_every, before, one.state.step):
        checkpoint.save(one.folder / "checkpoint", one.state, one.identity)
    return one


def _close(one, together, keep_going):
    """Write a run's results; ValueError if it failed and keep_going is off."""
    results.write(one.lab, one.state, one.folder, {
        "stopped": one.failure, "hashes": one.identity, "data": inputs.data_name(one.paths["facts"]),
        "together": together})
    if one.failure is None:
        checkpoint.remove(one.folder / "checkpoint")
    elif not keep_going:
        raise ValueError(f"run {one.folder.name}: {one.failure}; the rows of the {one.state.step} edits before it are "
                         f"in {one.folder}")


def _begin(one):
    """The run before its first edit, with the unedited model's abilities and a random state from the run's seed."""
    torch.set_rng_state(torch.Generator().manual_seed(one.run.seed).get_state())
    lab.put(one.lab, Delta({}))
    rows = _at(0, lab.ability(one.lab, 0)) if one.run.downstream_every else []
    contexts = tuple(getattr(one.lab.prepared, "contexts", ()))
    state = Progress(0, Delta({}), rows, torch.get_rng_state(), contexts=contexts)
    checkpoint.save(one.folder / "checkpoint", state, one.identity)
    return replace(one, state=state)


def _taken_up(one):
    """The run as its checkpoint left it; keys that the editor remembers are handed to it as they were then."""
    state, prepared, size = one.kept[0], one.lab.prepared, one.run.batch_size
    for first in range(0, state.step if state.total.keys else 0, size):
        keys = {name: some[first:first + size] for name, some in state.total.keys.items()}
        prepared = EDITORS[one.run.editor].remember(prepared, keys, one.lab.config)
    lab.put(one.lab, state.total)
    return replace(one, lab=replace(one.lab, prepared=prepared), state=state)


def _advance(now):
    """The runs, all at one step, after their next update; a run whose edit fails keeps its state and says why."""
    groups = [range(one.state.step, min(one.state.step + one.run.batch_size, len(one.lab.facts))) for one in now]
    began, before = time.monotonic(), []
    for one, group in zip(now, groups):
        if _measured(one, "measure", group):
            lab.show(one.lab, one.state.total)
        before.append(lab.before(one.lab, group) if _measured(one, "measure", group) else [])
    if len(now) == 1:       # only an editor that works alone may draw random numbers
        torch.set_rng_state(now[0].state.random_state)
    updates, seconds = _updates(now, groups)
    if len(now) == 1:
        now = [replace(now[0], state=replace(now[0].state, random_state=torch.get_rng_state()))]
    shared = (time.monotonic() - began) / len(now)
    return [replace(one, failure=new) if isinstance(new, str) else _record(one, group, new, (rows, seconds, shared))
            for one, group, new, rows in zip(now, groups, updates, before)]


def _updates(now, groups):
    """([Delta or why there is none, one a run], seconds of each). If a shared update fails, each run is tried alone."""
    began = time.monotonic()
    facts = [[one.lab.facts[i] for i in group] for one, group in zip(now, groups)]
    if len(now) == 1:
        lab.put(now[0].lab, now[0].state.total)     # measured may have been another sum than what is edited
        found = [_tried(now[0], groups[0], lambda: lab.update(now[0].lab, facts[0]))]
    else:
        lab.put(now[0].lab, Delta({}))
        try:
            found = lab.update_together([one.lab for one in now], facts, [one.state.total for one in now])
            found = [_tried(one, group, lambda new=new: lab.checked(new)) for one, group, new in
                     zip(now, groups, found)]
        except FAILURES:
            found = [_updates([one], [group])[0][0] for one, group in zip(now, groups)]
    synchronize(next(now[0].lab.model.parameters()).device)
    return found, (time.monotonic() - began) / len(now)


def _tried(one, group, update):
    """The Delta that `update` gives, or a sentence that names step and records."""
    try:
        new = update()
        if not (one.state.total + new).is_finite():
            raise ValueError("the sum of all updates is not finite")
        return new
    except FAILURES as error:
        names = ", ".join(str(one.lab.facts[i].case_id) for i in group)
        return f"edit {group.stop} (record {names}): {error}"


def _record(one, group, new, given):
    """The run after an update: its sum, its rows, and what its editor remembers."""
    (rows, seconds, shared), step, began, bench = given, group.stop, time.monotonic(), one.lab
    total = (one.state.total + new).dense()
    torch.set_rng_state(one.state.random_state)
    shown = lab.show(bench, total)
    rows = rows + (lab.after(bench, group) if _measured(one, "measure", group) else [])
    rows += lab.movement(bench, shown, new) + lab.reported([bench.facts[i] for i in group], new.info)
    if _measured(one, "retest", group) and group.start:
        rows += lab.retest(bench, group.start)
    if _measured(one, "downstream", group):
        rows += lab.ability(bench, step) + lab.spectra(bench, shown)
    if one.run.final and step == len(bench.facts):
        rows += lab.final(bench)
    prepared = EDITORS[one.run.editor].remember(bench.prepared, new.keys, bench.config)
    state = replace(one.state, step=step, total=total, rows=one.state.rows + _at(step, rows),
                    random_state=torch.get_rng_state(), seconds=(*one.state.seconds, seconds),
                    elapsed=one.state.elapsed + shared + time.monotonic() - began)
    return replace(one, lab=replace(bench, prepared=prepared), state=state)


def _measured(one, name, group):
    return _due(getattr(one.run, f"{name}_every"), group.start, group.stop, len(one.lab.facts))


def _due(every, before, after, last=None):
    """True if a multiple of `every` lies in (before, after], or at the last step; never if `every` is 0."""
    return every > 0 and (after // every > before // every or after == last)


def _at(step, rows):
    """Tuples (step, fact, metric, value) of row dicts; a row without a fact gets ""."""
    return [(step, str(row.get("fact", "")), row["metric"], float(row["value"])) for row in rows]


def _refuse_changed(folder, identity):
    """ValueError if the same run was begun with other inputs and never ended: they changed under it."""
    for other in folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-*"):
        if other != folder and not results.status(other) and (begun := checkpoint.identity_of(other / "checkpoint")):
            known = {name: begun.get(name) for name in identity}
            checkpoint.check_identity(known, identity, other / "checkpoint")


def _start_worker(threads):
    torch.set_num_threads(threads)
    progress.to_stderr()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A killed parent must not leave a worker behind that writes the run which the next start takes up."""
    parent_process().join()
    os._exit(1)
