"""Planned runs in; how far each has come, the missing ones made, and what the notebooks ask for, out."""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from editcore import grid, inputs, slots, study
from editcore.inputs import Run
from editcore.model import gpus, use_gpu
from editcore.results import status


@dataclass(frozen=True)
class Step:
    """A run of a plan."""

    id: str         # name of its folder
    state: str      # "done", "begun" (there is a checkpoint) or "missing"
    run: Run


def steps(planned, out_dir="results/runs"):
    """The Step of every run, each once. FileNotFoundError or ValueError for input that is not there."""
    found, hashed = [], {}
    for run in dict.fromkeys(one.run for one in planned):
        inputs.check(run)
        paths = inputs.files(run)
        key = (run.model, *paths.items())
        if key not in hashed:   # many runs, few files
            hashed[key] = {"the model's files": inputs.model_files_hash(run.model)} | inputs.hashes(paths)
        folder = Path(out_dir) / inputs.run_id(run, hashed[key])
        begun = (folder / "checkpoint" / "checkpoint.json").is_file()
        found.append(Step(folder.name, "done" if status(folder) else "begun" if begun else "missing", run))
    return found


def listing(found):
    """One line a Step: id, state, model, n_edits, order, and the other parameters that are not at their default."""
    plain, always = Run(), ("model", "n_edits", "order")
    return "".join(f"{one.id:<32} {one.state:<7} " + " ".join(
        f"{name}={_said(value)}" for name, value in dataclasses.asdict(one.run).items()
        if value != getattr(plain, name) or name in always) + "\n" for one in found)


def make(found, out_dir="results/runs", workers=1):
    """Make the runs that are not done, on a free GPU if there are any; the number of runs made.

    A run that another process is making, here or on another machine with the same folder, is waited for, not made
    twice: one run locks itself, several lock the whole folder. Where an edit fails the rows before it are the result.
    """
    todo = [one.run for one in found if one.state != "done"]
    locks = Path(out_dir) / ".locks"
    if todo:
        with contextlib.ExitStack() as stack:
            stack.enter_context(slots.held(locks, ["all"], shared=len(found) == 1))
            if len(found) == 1:
                stack.enter_context(slots.held(locks, [found[0].id]))
            if any(not run.device for run in todo) and (cards := gpus()):
                use_gpu(stack.enter_context(slots.held(slots.machine_folder(), cards)))
            study.execute_all(todo, out_dir, workers)
    return len(todo)


def notebooks(path=grid.FILE):
    """{notebook: (its grids, its parameters for the full study)} of a file's tables [full.<notebook>].

    ValueError names one without grids, or with a grid that is not in the file.
    """
    known, found = grid.names(path), {}
    for name, table in grid.tables(path).get("full", {}).items():
        grids = table.get("grids") if isinstance(table, dict) else None
        if not isinstance(grids, list) or not set(grids) <= set(known):
            raise ValueError(f"{path}: full.{name}: grids must be some of {', '.join(known)}, found {grids!r}")
        found[name] = (grids, {key: value for key, value in table.items() if key != "grids"})
    return found


def for_notebook(path, grids, parameters):
    """The Planned runs that a notebook with these parameters (all of them) reads; see `grid.words`."""
    words = grid.words(parameters)
    return [one for name in grids for one in grid.read(path, name, **words)]


def _said(value):
    """A parameter's value as one word."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):     # settings
        return ",".join(f"{name}:{_said(item)}" for name, item in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "_")
