"""Make runs: edit one update after another, measure on the way, and survive being killed.

    folder = execute(make_run(editor="rome", n_edits=400))  # goes on where an earlier start ended
    folders = execute_all(plans.orders("pocket"), workers=2)
    rows = table(folders)
"""

import contextlib
import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from editcore import processes, progress
from editcore.delta import Delta
from editcore.editors import EDITORS
from editcore.model import free_gpu, resolve, synchronize
from editcore.study import checkpoint, measure, results
from editcore.study.checkpoint import RunState
from editcore.study.run import Run, data_name, input_files, input_hashes, run_id, schedule
from editcore.suffix import quick

# What an edit may fail with although its facts were checked before.
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)
SHARED_RUNS_MAY_DIFFER_IN = ("order", "seed", "leave_out", "insert")
SMALL = 200e6   # bytes of weights up to which a second thread gains little and may cost much


@dataclass
class ActiveRun:
    """A run that is being made."""

    run: Run
    folder: Path
    paths: dict                     # its input_files
    identity: dict                  # hashes of all that it is made from
    context: object = None          # its measure.RunContext
    state: RunState | None = None
    failure: str = ""               # why it ended early


def execute(run, out_dir="results/runs"):
    """Make a run, or what is missing of it; returns its folder. A finished run is left as it is.

    An edit that fails or is not finite ends the run as "stopped"; the rows before it are the
    result. Bad input is one error before anything is done.
    """
    return execute_all([run], out_dir)[0]


def execute_all(runs, out_dir="results/runs", workers=1):
    """Make many runs; returns their folders, in the order of the runs.

    Runs that differ in order, seed or left out facts only share their passes where the editor can.
    workers: groups of runs that are made at a time, each in a process of its own. A run that
    another process is making is waited for.
    """
    opened = {run: _open(run, Path(out_dir)) for run in dict.fromkeys(runs)}
    missing = {run: active for run, active in opened.items() if not results.status(active.folder)}
    parts = groups(missing, workers)
    if min(workers, len(parts)) > 1:
        jobs = {", ".join(opened[run].folder.name for run in part): (part, out_dir, workers)
                for part in parts}
        edits = _edits_in_processes(jobs, workers)
    else:
        edits = _edits_one_by_one(parts, out_dir)
    names = Counter(run.editor for run in missing)
    label = ", ".join(f"{name} x {number}" for name, number in names.items())
    left = sum(map(_edits_left, missing.values()))
    with contextlib.closing(edits):     # Ctrl-C ends the workers here
        for _ in progress.bar(edits, f"edits ({label})", left):
            pass
    return [opened[run].folder for run in runs]


def groups(runs, workers=1, most=8):
    """Put runs that can share their passes together, at most `most`, in parts for the workers."""
    alike = {}
    for run in runs:
        editor = EDITORS.get(run.editor)
        key = _shared_parameters(run) if editor and editor.shares_passes else run
        alike.setdefault(key, []).append(run)
    size = min(most, max(1, -(-len(runs) // max(1, workers))))
    return [part[i:i + size] for part in alike.values() for i in range(0, len(part), size)]


def _shared_parameters(run):
    values = dataclasses.asdict(run)
    return tuple(str(values[name]) for name in values if name not in SHARED_RUNS_MAY_DIFFER_IN)


def _open(run, out_dir):
    """Check all of a run that needs no model; ValueError if its inputs changed under it."""
    paths = input_files(run)
    identity = input_hashes(run, paths)
    folder = out_dir / run_id(run, identity)
    for other in out_dir.glob(f"{folder.name.rsplit('-', 1)[0]}-*"):
        before = checkpoint.identity_of(other / "checkpoint")
        if other != folder and before and not results.status(other):
            known = {name: before.get(name) for name in identity}
            checkpoint.check_identity(known, identity, other / "checkpoint")
    return ActiveRun(run, folder, paths, identity)


def _edits_left(active):
    most = dataclasses.replace(active.run, known=False)     # the model is not asked for a number
    every = active.run.n_edits or len(schedule(most, active.paths["facts"])[0])
    return every - (checkpoint.steps(active.folder / "checkpoint") or 0)


def _edits_one_by_one(parts, out_dir):
    for part in parts:
        yield from _edits(part, out_dir)


def _edits_in_processes(jobs, workers):
    """Make each part in a process of its own, `workers` at a time; yields per edited fact.

    What failed is raised once the others are done. jobs: {names of runs: arguments of _edits}.
    """
    failures = []
    with contextlib.closing(processes.in_processes(_edits, jobs, workers)) as items:
        for name, item in items:
            if isinstance(item, Exception):
                failures.append(RuntimeError(f"{name}: {item}"))
            else:
                yield item
    if failures:
        raise failures[0]


def _edits(runs, out_dir, workers=1):
    """Make what is missing of runs that share a model; yields once per edited fact.

    workers: how many processes share the cores.
    """
    with contextlib.ExitStack() as stack:
        active = [_open(run, Path(out_dir)) for run in runs]
        for folder in sorted(each.folder for each in active):   # in one order: no deadlock
            stack.enter_context(_locked(folder))
        active = [each for each in active if not results.status(each.folder)]
        if not active:
            return
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(free_gpu())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        weights = Path(resolve(active[0].run.model)).glob("*.safetensors")
        small = 0 < sum(path.stat().st_size for path in weights) < SMALL
        torch.set_num_threads(1 if small else processes.free_threads(workers))
        _set_up(active, Path(out_dir) / "moments")
        stack.enter_context(quick(active[0].context.model))
        yield from _steps(active)
        for each in active:
            _finish(each, together=len(active))


def _locked(folder):
    """Lock a run; one that another process is making is waited for."""
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"waiting for another process that makes {folder.name}")
        return lock.acquire()


def _set_up(active, cache):
    """Load the model once and prepare every run; then begin it or take it up."""
    began = time.monotonic()
    saved = [checkpoint.load(each.folder / "checkpoint") for each in active]
    if threads := max([found[0].threads for found in saved if found], default=0):
        torch.set_num_threads(threads)      # sums over other shares differ in their last bits
    for each, found in zip(active, saved):
        each.context = measure.set_up(
            each.run, each.paths, contexts=found[0].contexts if found else (), cache=cache,
            shared=active[0].context)
        each.identity["the model's weights"] = each.context.weights_hash
        if found:
            checkpoint.check_identity(found[1], each.identity, each.folder / "checkpoint")
    seconds = time.monotonic() - began
    for each, found in zip(active, saved):
        if found:
            _resume(each, found[0])
        else:
            _begin(each)
        each.state.elapsed += seconds / len(active)


def _begin(active):
    """Measure the unedited model's abilities, with a random state from the run's seed."""
    run, context = active.run, active.context
    torch.set_rng_state(torch.Generator().manual_seed(run.seed).get_state())
    measure.set_weights(context, Delta({}))
    rows = measure.rows_ability(context, 0) if run.downstream_every else []
    contexts = tuple(getattr(context.prepared, "contexts", ()))
    active.state = RunState(0, Delta({}), _at(0, rows), torch.get_rng_state(), contexts,
                            threads=torch.get_num_threads())
    checkpoint.save(active.folder / "checkpoint", active.state, active.identity)


def _resume(active, state):
    """Take a run up as its checkpoint left it; its editor is handed the keys that it remembers."""
    run, context = active.run, active.context
    device = next(context.model.parameters()).device
    changes = {name: change.to(device) for name, change in state.total.changes.items()}
    keys = {name: value.to(device) for name, value in state.total.keys.items()}
    state.total = Delta(changes, keys=keys)
    state.answers += [""] * (state.step - len(state.answers))
    prepared = context.prepared
    for first in range(0, state.step if keys else 0, run.batch_size):
        portion = {name: value[first:first + run.batch_size] for name, value in keys.items()}
        prepared = EDITORS[run.editor].remember(prepared, portion, context.config)
    active.context = dataclasses.replace(context, prepared=prepared)
    active.state = state


def _steps(active):
    """Edit all runs update by update, those that are behind first; yields per edited fact."""
    size = active[0].run.batch_size
    first = min(each.state.step for each in active) // size * size
    last = max(len(each.context.facts) for each in active)
    for step in range(first, last, size):
        live = [each for each in active if each.state.step == step and not each.failure
                and step < len(each.context.facts)]
        if live:
            _advance(live)
        for each in live:
            group = range(step, each.state.step)
            if _due(each.run.checkpoint_every, group):
                checkpoint.save(each.folder / "checkpoint", each.state, each.identity)
            yield from group


def _advance(live):
    """Make the next update of runs that are at the same step."""
    began = time.monotonic()
    size = live[0].run.batch_size
    todo = []
    for active in live:
        context, step = active.context, active.state.step
        group = range(step, min(step + size, len(context.facts)))
        rows = []
        if _due(active.run.measure_every, group, len(context.facts)):
            measure.set_measured_weights(context, active.state.total)
            rows = measure.rows_before(context, group)
        todo.append((active, group, rows))
    edit_began = time.monotonic()
    updates = _updates(live, [group for _, group, _ in todo])
    synchronize(next(live[0].context.model.parameters()).device)
    edit_seconds = (time.monotonic() - edit_began) / len(live)
    shared_seconds = (time.monotonic() - began) / len(live)
    for (active, group, rows), update in zip(todo, updates):
        active.state.elapsed += shared_seconds
        if isinstance(update, str):
            active.failure = update
        else:
            record_update(active, group, update, rows_before=rows, edit_seconds=edit_seconds)


def _updates(live, parts):
    """Return each run's Delta, or why there is none; if a shared edit fails each is tried alone."""
    first = live[0].context
    editor = EDITORS[first.run.editor]
    facts = [[active.context.facts[i] for i in group] for active, group in zip(live, parts)]
    if len(live) > 1:
        measure.set_weights(first, Delta({}))
        prepared = [active.context.prepared for active in live]
        totals = [active.state.total for active in live]
        with contextlib.suppress(*FAILURES):
            deltas = editor.edit_groups(first.model, first.tok, facts, first.config,
                                        prepared=prepared, current=totals)
            return [_attempt(active, group, lambda delta=delta: delta)
                    for active, group, delta in zip(live, parts, deltas)]
    updates = []
    for active, group, batch in zip(live, parts, facts):
        context = active.context
        measure.set_weights(context, active.state.total)
        torch.set_rng_state(active.state.random_state)
        updates.append(_attempt(active, group, lambda context=context, batch=batch: editor.edit(
            context.model, context.tok, batch, context.config, context.prepared)))
        active.state.random_state = torch.get_rng_state()
    return updates


def _attempt(active, group, edit):
    """Return the Delta of `edit`, dense and in order of names, or a sentence why it cannot be."""
    context = active.context
    device = next(context.model.parameters()).device
    try:
        update = edit().dense()
        changes = {name: update.changes[name].to(device) for name in sorted(update.changes)}
        update = dataclasses.replace(update, changes=changes)
        if not update.is_finite():
            raise ValueError("the update is not finite")
        if not (active.state.total + update).is_finite():
            raise ValueError("the sum of all updates is not finite")
        return update
    except FAILURES as error:
        records = ", ".join(str(context.facts[i].case_id) for i in group)
        return f"edit {group.stop} (record {records}): {error}"


def record_update(active, group, update, *, rows_before, edit_seconds):
    """Add an update to a run: its sum, its rows, its answers, and what its editor remembers."""
    began = time.monotonic()
    run, context, state = active.run, active.context, active.state
    last = len(context.facts)
    facts = [context.facts[i] for i in group]
    torch.set_rng_state(state.random_state)
    state.total = (state.total + update).dense()
    measured = measure.set_measured_weights(context, state.total)
    rows = list(rows_before)
    if _due(run.measure_every, group, last):
        rows += measure.rows_after(context, group)
    rows += measure.rows_movement(context, measured, update)
    rows += measure.rows_reported(facts, update.info)
    if _due(run.retest_every, group, last) and group.start:
        rows += measure.rows_retested(context, group.start)
    if _due(run.downstream_every, group, last):
        rows += measure.rows_ability(context, group.stop)
        rows += measure.rows_spectra(context, measured)
    if run.final and group.stop == last:
        rows += measure.rows_final(context)
    if run.answers:
        state.answers += measure.answers(context, facts)
    editor = EDITORS[run.editor]
    prepared = editor.remember(context.prepared, update.keys, context.config)
    active.context = dataclasses.replace(context, prepared=prepared)
    state.step = group.stop
    state.rows += _at(group.stop, rows)
    state.random_state = torch.get_rng_state()
    state.seconds.append(edit_seconds)
    state.elapsed += time.monotonic() - began


def _finish(active, together):
    """Write a run's results and remove its checkpoint."""
    context, state = active.context, active.state
    cases = measure.cases(context, state) if active.run.answers else None
    results.write(active.folder, context, state, cases=cases, head={
        "stopped": active.failure or None, "hashes": active.identity,
        "data": data_name(active.paths["facts"]), "together": together})
    checkpoint.remove(active.folder / "checkpoint")


def _due(every, group, last=None):
    """True if the group passes a multiple of `every` or ends at `last`; never if `every` is 0."""
    passes = every > 0 and group.stop // every > group.start // every
    return passes or every > 0 and group.stop == last


def _at(step, rows):
    """Tuples (step, fact, metric, value) of row dicts; a row without a fact gets ""."""
    return [(step, str(row.get("fact", "")), row["metric"], float(row["value"])) for row in rows]
