"""Notebooks and their parameters in, executed notebooks and an offline HTML report with an index page out."""

import ast
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
import papermill
from tqdm import tqdm
from traitlets.config import Config

from . import progress
from .files import atomic, sha256, sha256_text
from .pages import FIGURES, declare, home, index_page, prose, render, show
from .publish import publish

__all__ = ["build", "declare", "home", "is_done", "parameters", "publish", "render", "run_notebook", "show", "start",
           "typed"]

KERNEL = "python3"      # the interpreter that runs this module, whatever the notebook's author called it
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells, {elapsed}{postfix}"
# A kernel repeats what its child processes write on the terminal that it was started from; Console shows it already.
ONCE = "import os, sys; os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys.stderr, '_original_stdstream_copy', 2))"
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": (list, tuple), "tuple": (list, tuple),
         "dict": dict}
DATA = (".safetensors", ".json", ".toml", ".txt")   # what a run may depend on; training's own files are left out
STAMPED = ("torch", "transformers", "numpy", "pandas", "matplotlib", "papermill")   # versions shown with a report


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell."""

    name: str
    type: str           # its annotation, else the type of its default
    default: object     # None when the default is not a literal
    help: str           # its comment


@dataclass(frozen=True)
class Console:
    """What a running notebook writes to standard error: beside its bar in a terminal, else line by line in the log."""

    name: str           # of the notebook
    bar: tqdm           # its code cells; disabled outside a terminal

    def write(self, text):
        """Show the last line of `text` behind the bar, or print each line after the notebook's name."""
        lines = [line for line in text.splitlines() if line.strip()]
        if not self.bar.disable:
            self.bar.set_postfix_str(lines[-1] if lines else "")
            return
        for line in lines:
            tqdm.write(f"{self.name}: {line}", file=sys.stderr)

    def flush(self):
        """Standard error is not buffered."""


def start():
    """Call it first in a notebook: makes the repository root the working folder and lets log lines through.

    Relative paths (data/pocket, results) then mean the same from notebooks/, from the root and in batch. Returns the
    root.
    """
    os.chdir(home())
    progress.to_stderr()
    return home()


def parameters(path):
    """{name: Parameter} of the notebook's cell tagged `parameters`. Raises FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such notebook")
    found = {}
    for name, line in papermill.inspect_notebook(str(path)).items():
        try:
            default = ast.literal_eval(line["default"])
        except (ValueError, SyntaxError):
            default = None
        declared = line["inferred_type_name"]
        kind = type(default).__name__ if declared in ("None", "") else declared
        found[name] = Parameter(name, kind, default, line["help"])
    return found


def check(path, values):
    """ValueError for a parameter that the notebook does not have, or one of another type; names the known ones."""
    known = parameters(path)
    for name, value in values.items():
        if name not in known:
            listed = ", ".join(f"{p.name}: {p.type}" for p in known.values()) or "none"
            raise ValueError(f"{Path(path).name}: unknown parameter {name!r}; known are {listed}")
        if not fits(value, known[name].type):
            raise ValueError(f"{Path(path).name}: parameter {name} must be {known[name].type}, not {value!r}")


def fits(value, kind):
    """Whether a value has the annotated type, element by element in list[...]; an unknown annotation takes anything."""
    outer, _, inner = kind.replace(" ", "").partition("[")
    if outer not in TYPES:
        return True
    if isinstance(value, bool) and outer != "bool" or not isinstance(value, TYPES[outer]):
        return False
    inner = inner.rstrip("]").partition(",")[0]
    return outer not in ("list", "tuple") or all(fits(item, inner) for item in value)


def typed(path, texts):
    """Command-line words {name: text} as values of the notebook's own types: "3" -> 3, "0,1,2" -> [0, 1, 2].

    Raises ValueError for an unknown parameter or a word that does not fit its type.
    """
    known, values = parameters(path), {}
    for name, text in texts.items():
        kind = known[name].type if name in known else "str"
        values[name] = text if kind == "str" else literal(text, kind)
    check(path, values)
    return values


def literal(text, kind):
    """`text` read as a Python literal; a list may leave out its brackets and the quotes of its words."""
    text = text.capitalize() if kind == "bool" else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = [word.strip() for word in text.split(",")] if kind.startswith("list") else text
    if kind.startswith("list") and not isinstance(value, list):
        value = list(value) if isinstance(value, tuple) else [value]
    return value


def run_notebook(path, parameters=None, out_dir="results/reports", force=False, after=()):
    """Run a notebook with papermill from the repository root and return its executed copy, out_dir/<stem>.ipynb.

    A copy that is done (`is_done`) and was made from the same cells, parameters, package code, data/ and `after` (the
    executed notebooks that it reads results of) is returned as it is, unless `force`. Raises FileNotFoundError, and
    ValueError for a parameter, before anything runs; RuntimeError names the notebook, cell and exception of a failed
    run, whose copy stays.
    """
    path, values, root = Path(path).resolve(), dict(parameters or {}), home()
    check(path, values)
    executed, key = Path(out_dir).resolve() / path.name, run_key(path, values, root, after)
    if not force and is_done(executed, key):
        progress.log.info("%s: done before, nothing it depends on has changed", path.stem)
        return executed
    executed.parent.mkdir(parents=True, exist_ok=True)
    made_from = stamp(root)     # before the run: what the run started from
    execute(path, executed, values, root)
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["editcore"] = {"key": key, "stamp": {"notebook": path.name, "parameters": json.dumps(values),
                                     "seconds": f"{notebook.metadata.papermill.duration:.1f}", **made_from}}
    with atomic(executed) as tmp:
        nbformat.write(notebook, tmp)
    return executed


def execute(path, executed, values, root):
    """One papermill run in a kernel of its own; RuntimeError tells where it stopped."""
    figures, cells = executed.parent.parent / "figures", nbformat.read(path, as_version=4).cells
    search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # Threads that wait for each other sleep: spinning ones take ten times as long once something else wants a core.
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    terminal, total = sys.stderr.isatty(), sum(cell.cell_type == "code" for cell in cells) + bool(values)
    with (tempfile.TemporaryDirectory(prefix="editcore-") as sockets, warnings.catch_warnings(),
          environment(**{FIGURES: str(figures), "PYTHONPATH": search, "OMP_WAIT_POLICY": waiting}),
          tqdm(desc=path.stem, total=total, bar_format=BAR, disable=not terminal) as bar):
        warnings.simplefilter("ignore", DeprecationWarning)     # papermill's and the kernel client's own
        # Kernels on TCP race for free ports when several start at once; sockets in a folder of one's own cannot.
        local = {"config": Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})}
        try:
            papermill.execute_notebook(
                str(path), str(executed), values, kernel_name=KERNEL, cwd=str(root), progress_bar=False,
                stderr_file=Console(path.stem, bar), on_cell_executed=lambda **_: bar.update(),
                shutdown_kernel="immediate",    # nothing is left to do in it, and waiting costs a second or two
                extra_arguments=[f"--IPKernelApp.exec_lines={ONCE}"],
                **(local if os.name == "posix" else {}))
        except papermill.PapermillExecutionError as error:
            raise RuntimeError(f"{path.name}: cell {error.exec_count} failed with {error.ename}: {error.evalue} "
                               f"(executed so far: {executed})") from error
        except RuntimeError as error:   # the kernel died or never answered
            raise RuntimeError(f"{path.name}: {error} (executed so far: {executed})") from error


@contextlib.contextmanager
def environment(**values):
    """Environment variables for the processes started inside the `with` block, put back after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def is_done(executed, key=None):
    """Whether an executed copy is whole: ended, no exception, its declared files there, made from `key` if given."""
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (FileNotFoundError, ValueError):     # nbformat.reader.NotJSONError is a ValueError
        return False
    run, ours = notebook.metadata.get("papermill", {}), notebook.metadata.get("editcore", {})
    if not run.get("end_time") or run.get("exception") or not ours or key not in (None, ours.get("key")):
        return False
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    files = [name for output in outputs for name in output.get("metadata", {}).get("editcore", {}).get("files", [])]
    return all((home() / name).exists() for name in files)


def run_key(path, values, root, after=()):
    """Hash of everything a run depends on: cells, parameters, package code, data and the runs before it."""
    cells = [f"{cell.cell_type} {cell.source}" for cell in nbformat.read(path, as_version=4).cells]
    sources = sorted([*(root / "editcore").rglob("*.py"),
                      *(path for path in (root / "data").rglob("*") if path.suffix in DATA)])
    files = [f"{source.relative_to(root)} {sha256(source)}" for source in sources]
    earlier = [nbformat.read(copy, as_version=4).metadata.get("editcore", {}).get("key", "") for copy in after]
    return sha256_text(*cells, json.dumps(values, sort_keys=True), *files, *earlier)


def build(notebook_dir="notebooks", out_dir="results/reports", parameters=None, force=False):
    """Run and render every NN_*.ipynb in order of its number and write out_dir/index.html, whose path is returned.

    `parameters` maps a file stem to that notebook's parameters. What is done is not run again, so a killed build goes
    on where it was. A failed notebook does not stop the others; RuntimeError names it at the end. Raises
    FileNotFoundError when there is no notebook and ValueError for a wrong parameter, before anything runs.
    """
    paths, parameters, out_dir = sorted(Path(notebook_dir).glob("[0-9][0-9]_*.ipynb")), parameters or {}, Path(out_dir)
    if not paths:
        raise FileNotFoundError(f"{notebook_dir}: no notebook named NN_title.ipynb")
    if strange := sorted(set(parameters) - {path.stem for path in paths}):
        raise ValueError(f"parameters for {strange[0]}, which is not a notebook of {notebook_dir}")
    for path in paths:
        check(path, parameters.get(path.stem, {}))
    failures, finished = [], []
    for path in progress.bar(paths, "report"):
        try:
            finished.append(run_notebook(path, parameters.get(path.stem), out_dir, force, tuple(finished)))
        except RuntimeError as error:
            failures.append(str(error))
        render(out_dir / path.name, out_dir, index="index.html")
    page = write_index(paths, out_dir)
    if failures:
        raise RuntimeError("; ".join(failures))
    return page


def write_index(paths, out_dir):
    """The index page of the executed notebooks: the last one's opening words lead it."""
    notebooks = {path.stem: nbformat.read(out_dir / path.name, as_version=4) for path in paths}
    seconds = sum(notebook.metadata.papermill.get("duration") or 0 for notebook in notebooks.values())
    made_from = {**stamp(home()), "wall time": f"{seconds / 60:.1f} minutes in {len(paths)} notebooks"}
    return index_page(notebooks, prose(notebooks[paths[-1].stem]), made_from, out_dir / "index.html")


def stamp(root):
    """{what: text} of where results come from: commit, versions, device, data hashes."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=, with changes", "--abbrev=12", "--exclude=*"],
                         cwd=root, capture_output=True, text=True, check=False)
    versions = [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in STAMPED)]
    data = [f"{path.relative_to(root)} {sha256(path)[:16]}" for path in sorted((root / "data").rglob("*"))
            if path.suffix in (".safetensors", ".toml") or path.name == "facts.json"]
    return {"commit": run.stdout.strip() or "no git checkout", "versions": ", ".join(versions),
            "device": f"{os.cpu_count()} cores, {processor()}", "data": ", ".join(data) or "none"}


def processor():
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text() if info.is_file() else "", re.M)
    return names[0] if names else platform.machine()
