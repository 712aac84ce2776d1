"""Planned runs in; how far each has come, the missing ones made, and what the notebooks ask for, out."""

import ast
import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import nbformat

from editcore.model import gpus, use_gpu
from editcore.study import grid, slots
from editcore.study import loop as study
from editcore.study import run as inputs
from editcore.study.grid import Planned
from editcore.study.results import status
from editcore.study.run import Run

PLANNING = ("grid.read", "study.make")      # what a notebook calls to say which runs it wants


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


def full(path=grid.FILE):
    """{notebook: its parameters in the full study} of tables [full.<notebook>]; ValueError for another form."""
    found = grid.tables(path).get("full", {})
    if strange := [name for name, table in found.items() if not isinstance(table, dict)]:
        raise ValueError(f"{path}: full.{strange[0]} must be a table, [full.{strange[0]}]")
    return found


def of_notebook(path, parameters):
    """The Planned runs that a notebook with these parameters (all of them) will ask for, found without running it.

    They are its calls of grid.read and study.make. Runs that it makes up from rows of these come when it runs.
    ValueError for a call that uses more than parameters.
    """
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    found, known = [], {"grid": grid, "study": study} | parameters
    for node in _plans(ast.parse("\n".join(cells))):
        try:
            value = eval(compile(ast.Expression(node), str(path), "eval"), known | {})
        except NameError as error:
            raise ValueError(f"{path}: {ast.unparse(node)[:60]}... cannot be planned: {error}") from error
        values = value if isinstance(value, list) else [value]
        values = [one for each in values for one in (each if isinstance(each, list) else [each])]
        found += [one if isinstance(one, Planned) else Planned(one.editor, one) for one in values]
    return found


def _plans(node):
    """The outermost calls of grid.read or study.make, or the list comprehensions around them.

    A run of which only the inputs are asked for (inputs.files(study.make(...))) is not wanted.
    """
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "inputs.files":
        return
    inside = [one for one in ast.walk(node) if isinstance(one, ast.Call) and ast.unparse(one.func) in PLANNING]
    if inside and (node in inside or isinstance(node, ast.ListComp)):
        yield node
    elif inside:
        for child in ast.iter_child_nodes(node):
            yield from _plans(child)


def _said(value):
    """A parameter's value as one word."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):     # settings
        return ",".join(f"{name}:{_said(item)}" for name, item in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "_")
