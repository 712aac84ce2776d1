"""A Run in; facts edited one update after another, measured on the way, and a folder with rows and run.json out.

    folder = execute(Run(editor="rome", n_edits=400))       # takes up where an earlier start was killed
    df = table("results/runs", editor="rome")               # the rows of all finished runs
"""

import dataclasses
import os
import platform
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib import metadata
from multiprocessing import get_context, parent_process
from pathlib import Path

import pandas as pd
import torch

from editcore import checkpoint, inputs, lab, progress
from editcore.checkpoint import Progress
from editcore.delta import Delta
from editcore.editors import configure
from editcore.files import atomic, read_json, write_json
from editcore.inputs import Run, make
from editcore.model import peak_memory, synchronize

__all__ = ["Run", "execute", "execute_all", "make", "runs", "table"]
COLUMNS = ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]
JOINED = ["order", "batch_size", "settings"]    # parameters that `table` puts beside the rows
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # of an edit whose facts were checked before


def execute(run, out_dir="results/runs", keep_going=False):
    """Do a run, or what is missing of it; the folder with its rows. A finished run is left as it is, at once.

    An edit that fails or is not finite ends the run as "stopped", its rows so far written: with keep_going that is a
    result, else a ValueError that names record and step. Bad input is one error before anything is done.
    """
    inputs.check(run)
    paths = inputs.files(run)
    inputs.check_moments(run, configure(run.editor, dict(run.settings), run.model), paths)
    identity = {"the model's files": inputs.model_files_hash(run.model)} | inputs.hashes(paths)
    folder = Path(out_dir) / inputs.run_id(run, identity)
    if _status(folder) in (("finished", "stopped") if keep_going else ("finished",)):
        return folder
    _refuse_changed(folder, identity)
    kept, began = checkpoint.load(folder / "checkpoint"), time.monotonic()
    with torch.random.fork_rng():
        bench = lab.set_up(run, paths, kept[0].contexts if kept else (), Path(out_dir) / "moments")
        identity["the model's weights"] = bench.weights_hash
        if kept:
            checkpoint.check_identity(kept[1], identity, folder / "checkpoint")
        state = _taken_up(bench, kept[0]) if kept else _begin(bench)
        state = replace(state, elapsed=state.elapsed + time.monotonic() - began)
        state, failure = _go_on(bench, state, lambda state: checkpoint.save(folder / "checkpoint", state, identity))
    _finish(bench, state, folder, {"stopped": failure, "hashes": identity, "data": inputs.data_name(paths["facts"])})
    if failure is None:
        checkpoint.remove(folder / "checkpoint")
    elif not keep_going:
        raise ValueError(f"run {folder.name}: {failure}; the rows of the {state.step} edits before it are in {folder}")
    return folder


def execute_all(several, out_dir="results/runs", workers=1, keep_going=True):
    """`execute` for many runs, `workers` at a time in processes of their own that share the machine's threads."""
    if workers <= 1 or len(several) <= 1:
        return [execute(run, out_dir, keep_going) for run in several]
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (threads,)) as pool:
        waiting = [pool.submit(execute, run, out_dir, keep_going) for run in several]
        for done in progress.bar(as_completed(waiting), "runs", len(waiting)):
            done.result()
        return [one.result() for one in waiting]


def runs(out_dir="results/runs", **filters):
    """One row a finished or stopped run: its parameters, status, seconds, hashes and versions.

    filters keep the runs with that value, or one of a list of values, of a column: runs(editor="rome", order=[0, 1]).
    """
    found = [_flat(read_json(path)) for path in sorted(Path(out_dir).glob("*/run.json"))]
    frame = pd.DataFrame(found) if found else pd.DataFrame(columns=["run", "status", *_flat({"parameters": {}})])
    for name, wanted in filters.items():
        if name not in frame.columns:
            raise ValueError(f"runs: there is no {name!r} to choose by, only {', '.join(frame.columns)}")
        frame = frame[frame[name].isin(wanted if isinstance(wanted, (list, set, tuple)) else [wanted])]
    return frame.reset_index(drop=True)


def table(out_dir="results/runs", **filters):
    """The rows of all finished and stopped runs, chosen as in `runs`, in one long table with some parameters beside."""
    parts = [_rows(Path(out_dir) / one["run"] / "rows.parquet").assign(
        **{name: one[name] if name != "settings" else str(one[name]) for name in JOINED})
        for one in runs(out_dir, **filters).to_dict("records")]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS, *JOINED])


def _rows(path):
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); remove its folder to make the run again") from error


def _begin(bench):
    """Progress before the first edit, with the unedited model's abilities and a random state from the run's seed."""
    torch.set_rng_state(torch.Generator().manual_seed(bench.run.seed).get_state())
    rows = _at(0, lab.ability(bench, 0)) if bench.run.downstream_every else []
    return Progress(0, Delta({}), rows, torch.get_rng_state(), contexts=tuple(getattr(bench.prepared, "contexts", ())))


def _taken_up(bench, state):
    """The Progress of a checkpoint, its edits and random state put in place."""
    lab.put(bench, state.total)
    torch.set_rng_state(state.random_state)
    return state


def _go_on(bench, state, save):
    """(Progress at the end, None or why an edit failed); `save` is called with the Progress at every checkpoint."""
    run, last = bench.run, len(bench.facts)
    if state.step == 0:
        save(state)
    starts = range(state.step, last, run.batch_size)
    for start in progress.bar(starts, f"{run.editor} edits", start=state.step // run.batch_size):
        state, failure = _advance(bench, state, range(start, min(start + run.batch_size, last)))
        if failure or _due(run.checkpoint_every, start, state.step):
            save(state)
        if failure:
            return state, failure
    return state, None


def _advance(bench, state, group):
    """(Progress after an update of the facts with indices `group`, None), or the same Progress and what went wrong."""
    run, began, step = bench.run, time.monotonic(), group.stop
    facts = [bench.facts[i] for i in group]
    due = {name: _due(getattr(run, f"{name}_every"), group.start, step, len(bench.facts))
           for name in ("measure", "retest", "downstream")}
    rows = lab.before(bench, group) if due["measure"] else []
    try:
        new, seconds = _timed(lab.update, bench, facts)
        total = Delta((state.total + new).dense().changes)
        if not total.is_finite():
            raise ValueError("the sum of all updates is not finite")
    except FAILURES as error:
        return state, f"edit {step} (record {', '.join(str(one.case_id) for one in facts)}): {error}"
    lab.put(bench, total)
    rows += lab.after(bench, group) if due["measure"] else []
    rows += lab.movement(bench, total, new) + lab.reported(facts, new.info)
    if due["retest"] and group.start:
        rows += lab.retest(bench, group.start)
    if due["downstream"]:
        rows += lab.ability(bench, step) + lab.spectra(bench, total)
    if run.final and step == len(bench.facts):
        rows += lab.final(bench)
    return replace(state, step=step, total=total, rows=state.rows + _at(step, rows), random_state=torch.get_rng_state(),
                   seconds=(*state.seconds, seconds), elapsed=state.elapsed + time.monotonic() - began), None


def _due(every, before, after, last=None):
    """True if a multiple of `every` lies in (before, after], or at the last step; never if `every` is 0."""
    return every > 0 and (after // every > before // every or after == last)


def _timed(update, bench, facts):
    """(what update(bench, facts) returns, seconds)."""
    device = next(bench.model.parameters()).device
    synchronize(device)
    began = time.monotonic()
    new = update(bench, facts)
    synchronize(device)
    return new, time.monotonic() - began


def _at(step, rows):
    """Tuples (step, fact, metric, value) of row dicts; a row without a fact gets ""."""
    return [(step, str(row.get("fact", "")), row["metric"], float(row["value"])) for row in rows]


def _finish(bench, state, folder, head):
    """Write rows.parquet, then run.json, which marks the run as done."""
    run = bench.run
    rows = checkpoint.frame(state.rows).assign(run=folder.name, model=inputs.model_name(run.model), editor=run.editor,
                                               data=head["data"], seed=run.seed)
    with atomic(folder / "rows.parquet") as tmp:
        rows[COLUMNS].to_parquet(tmp, index=False)
    device = next(bench.model.parameters()).device
    write_json(folder / "run.json", {
        "run": folder.name, "status": "stopped" if head["stopped"] else "finished", **head,
        "parameters": dataclasses.asdict(run), "config": dataclasses.asdict(bench.config), "edits": state.step,
        "seconds": state.elapsed, "seconds_per_edit": sum(state.seconds) / max(1, state.step),
        "update_seconds": [round(one, 4) for one in state.seconds], "contexts": list(state.contexts),
        "peak_memory": peak_memory(device) or _resident(), "device": str(device), "threads": torch.get_num_threads(),
        **_software()})


def _software():
    """{"commit", "versions"} of the code that made a run; the commit is "unknown" outside a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False).stdout.strip()
    except OSError:     # no git
        answer = ""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "pandas")}
    return {"commit": answer or "unknown", "versions": {"python": platform.python_version(), **versions}}


def _resident():
    """Largest memory held by this process in bytes, 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _status(folder):
    """"finished", "stopped" or "" of a run's folder."""
    done = (folder / "run.json").is_file() and (folder / "rows.parquet").is_file()
    return read_json(folder / "run.json")["status"] if done else ""


def _refuse_changed(folder, identity):
    """ValueError if the same run was begun with other inputs and never ended: they changed under it."""
    for other in folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-*"):
        if other != folder and not _status(other) and (begun := checkpoint.identity_of(other / "checkpoint")):
            known = {name: begun.get(name) for name in identity}
            checkpoint.check_identity(known, identity, other / "checkpoint")


def _flat(record):
    """A run.json as one flat dict: the parameters beside the rest."""
    known = dataclasses.asdict(Run()) | record["parameters"]
    return {name: value for name, value in record.items() if name not in ("parameters", "update_seconds")} | known


def _start_worker(threads):
    torch.set_num_threads(threads)
    progress.to_stderr()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A killed parent must not leave a worker behind that writes the run which the next start takes up."""
    parent_process().join()
    os._exit(1)
