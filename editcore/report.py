"""Execute the notebooks with papermill: parameters checked, what is done not done again.

    index = build(parameters={"20_forgetting": {"n_edits": 200}})   # results/reports/index.html
    executed = run_notebook("notebooks/10_edit.ipynb", {"n_edits": 100})
"""

import ast
import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pydantic
import yaml
from IPython import get_ipython
from traitlets.config import Config

import editcore
from editcore import pages, progress
from editcore.files import atomic, read_json, sha256, sha256_text
from editcore.pages import ROOT, failure

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
VERSIONS = ("torch", "transformers", "numpy", "pandas", "scikit-learn", "seaborn")
log = logging.getLogger("editcore")


# ── in notebooks ────────────────────────────────────────────────────────────────────────────────

def start():
    """Prepare a notebook: paths are relative to the repository's root, progress is shown.

    An interrupt then ends in one line; what runs have done so far is taken up by the next start.
    """
    os.chdir(ROOT)
    progress.show_log()
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((KeyboardInterrupt,), _interrupted)


def _interrupted(shell, kind, value, traceback, tb_offset=None):
    log.warning("stopped; run the cell again to go on from here")


def provenance(folders=()):
    """Return what a report was made from, as a table; folders: those of its runs."""
    files = [Path(folder) / "run.json" for folder in folders]
    runs = [read_json(file) for file in files if file.is_file()]
    lines = {"code": f"editcore {editcore.__version__}, commit {_commit()}"}
    if runs:
        minutes = sum(run["seconds"] for run in runs) / 60
        devices = sorted({run["device"] for run in runs})
        lines["runs"] = f"{len(runs)}, {sum(run['edits'] for run in runs):,} edits"
        lines["their computing time"] = f"{minutes:.1f} minutes on {', '.join(devices)}"
        lines["their code"] = "commit " + ", ".join(sorted({run["commit"][:12] for run in runs}))
    lines["versions"] = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    return pd.DataFrame({"made from": lines})


def _commit():
    """Return the commit of the checkout, "unknown" outside of one."""
    words = ["git", "describe", "--always", "--dirty= with changes", "--exclude=*", "--abbrev=12"]
    try:
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:     # no git
        return "unknown"
    return answer.stdout.strip() or "unknown"


# ── parameters ──────────────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Parameter:
    """A line of a notebook's cell tagged `parameters`."""

    kind: str           # its annotation
    default: object     # None where it is no literal
    help: str           # its comment


def parameters(path):
    """Return {name: Parameter} of a notebook. Raises FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such notebook")
    known = {}
    for name, line in papermill.inspect_notebook(str(path)).items():
        try:
            default = ast.literal_eval(line["default"])
        except (ValueError, SyntaxError):
            default = None
        known[name] = Parameter(line["inferred_type_name"], default, line["help"])
    return known


def check(path, values, *, strict=True):
    """Return the values as the notebook's types; ValueError for an unknown or a wrong one.

    strict: no conversion, as a notebook would do none; else text that reads as the type is taken.
    """
    known = parameters(path)
    checked = {}
    for name, value in values.items():
        if name not in known:
            names = ", ".join(f"{key}: {known[key].kind}" for key in known)
            raise ValueError(f"{Path(path).name}: unknown parameter {name!r}; known are {names}")
        kind = known[name].kind
        adapter = pydantic.TypeAdapter(eval(kind, {"__builtins__": TYPES}))
        try:
            checked[name] = adapter.validate_python(value, strict=strict)
        except pydantic.ValidationError:
            message = f"{Path(path).name}: parameter {name} must be {kind}, not {value!r}"
            raise ValueError(message) from None
    return checked


def typed(path, words):
    """Read {name: text} of a command line as the notebook's types: "0,1" is [0, 1]."""
    known = parameters(path)
    values = {}
    for name, text in words.items():
        kind = known[name].kind if name in known else "str"
        if kind.startswith("list") and not text.startswith("["):
            text = f"[{text}]"
        values[name] = yaml.safe_load(text) if kind.startswith(("list", "dict")) else text
    return check(path, values, strict=False)


def full_study():
    """Return {notebook: parameters} of the full study."""
    return tomllib.loads((ROOT / "data/full_study.toml").read_text("utf-8"))


def chosen_parameters(notebooks, words, *, full=False):
    """Return {notebook: parameters}: the full study's, then {NAME or NOTEBOOK.NAME: text}.

    A NAME alone is for all notebooks that have it; ValueError if none has.
    """
    paths = {path.stem: path for path in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb"))}
    texts = {}
    for word, text in words.items():
        notebook, dot, name = word.rpartition(".")
        holders = [notebook] if dot else [stem for stem in paths if name in parameters(paths[stem])]
        if not holders:
            raise ValueError(f"-p {word}: no notebook has this parameter; give NAME VALUE or "
                             "NOTEBOOK.NAME VALUE, as in -p 20_forgetting.n_edits 200")
        for stem in holders:
            texts.setdefault(stem, {})[name] = text
    chosen = full_study() if full else {}
    for stem, named in texts.items():
        chosen[stem] = chosen.get(stem, {}) | typed(Path(notebooks) / f"{stem}.ipynb", named)
    return chosen


# ── running ─────────────────────────────────────────────────────────────────────────────────────

def build(notebooks="notebooks", out_dir="results/reports", parameters=None, *, force=False,
          workers=2):
    """Make the runs, execute and render every NN_title.ipynb, write the index; return its path.

    parameters: {stem of a notebook: {name: value}}. What is done is not done again. A notebook
    that fails is shown as failed; RuntimeError names it after the index is written. Raises
    ValueError for a wrong parameter before anything runs.
    """
    paths = sorted(Path(notebooks).resolve().glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"{notebooks}: no notebook named NN_title.ipynb")
    parameters = parameters or {}
    if unknown := sorted(set(parameters) - {path.stem for path in paths}):
        raise ValueError(f"parameters for {unknown[0]}, which is not a notebook of {notebooks}")
    jobs = {path: check(path, parameters.get(path.stem, {})) for path in paths}
    copies = Path(out_dir).resolve()
    with contextlib.chdir(ROOT):
        folders = make_runs(jobs, workers)
        _execute_all(jobs, copies, force=force, workers=workers)
        pages.write_report(paths, copies, folders)
    return Path(out_dir) / "index.html"


def make_runs(jobs, workers=2):
    """Make the runs that notebooks plan and that are missing; return the folders of all.

    jobs: {path of a notebook: its parameters}.
    """
    wanted = {}
    for path, values in jobs.items():
        folder, runs = planned_runs(path, values)
        wanted[folder] = wanted.get(folder, []) + runs
    folders = []
    for folder, runs in wanted.items():
        if runs:
            from editcore.study import loop, plans

            missing = plans.status(runs, folder)["status"].isin(["missing", "begun"]).sum()
            log.info("%s: %d runs to make, %d at a time", folder, missing, workers)
            folders += loop.execute_all(list(dict.fromkeys(runs)), folder, workers)
    return folders


def planned_runs(path, values):
    """Return (folder, runs) that a notebook asks for in its cells tagged `plan`, not executed.

    The cell makes lists of Run, or dicts of them, out of the notebook's parameters by the
    functions of `plans`.
    """
    known = {name: parameter.default for name, parameter in parameters(path).items()} | values
    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source for cell in cells if "plan" in cell.metadata.get("tags", [])]
    if not sources:
        return "results/runs", []
    from editcore.study import plans
    from editcore.study.run import Run

    names = known | {"plans": plans, "ec": editcore}
    exec("\n".join(sources), names)
    lists = []
    for value in names.values():
        lists += value.values() if isinstance(value, dict) else [value]
    runs = [run for part in lists if isinstance(part, list) for run in part if isinstance(run, Run)]
    return f"{known.get('results', 'results')}/runs", list(dict.fromkeys(runs))


def run_notebook(path, values=None, out_dir="results/reports", *, force=False):
    """Execute one notebook from the repository's root; return its executed copy.

    A copy that is done and was made from the same cells, parameters and runs stays as it is.
    Raises ValueError for a wrong parameter and RuntimeError where a cell fails.
    """
    values = check(path, values or {})
    path = Path(path).resolve()
    executed = Path(out_dir).resolve() / path.name
    with contextlib.chdir(ROOT):
        make_runs({path: values})
        key = notebook_key(path, values)
        if force or not is_done(executed, key):
            execute(path, executed, values, key, progress_bar=sys.stderr.isatty())
    return executed


def notebook_key(path, values):
    """Return a hash of all that a notebook's outcome depends on: cells, parameters, runs."""
    cells = nbformat.read(path, as_version=4).cells
    sources = [f"{cell.cell_type} {cell.source}" for cell in cells]
    folder, runs = planned_runs(path, values)
    hashes = []
    if runs:
        from editcore.study import plans

        files = [Path(folder) / name / "run.json" for name in plans.status(runs, folder)["run"]]
        hashes = [sha256(file) if file.is_file() else "missing" for file in files]
    return sha256_text(editcore.__version__, *sources, repr(sorted(values.items())), *hashes)


def is_done(executed, key=None):
    """Return whether a copy ran to its end without an exception, and was made from `key`."""
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (FileNotFoundError, ValueError):     # cut off; nbformat's NotJSONError is a ValueError
        return False
    return not failure(notebook) and key in (None, notebook.metadata.get("editcore", {})["key"])


def _execute_all(jobs, out_dir, *, force, workers):
    """Execute the notebooks that are not done, each in a process and with a thread of its own."""
    keys = {path: notebook_key(path, values) for path, values in jobs.items()}
    todo = [path for path in jobs if force or not is_done(out_dir / path.name, keys[path])]
    log.info("%d notebooks, %d to execute, %d at a time", len(jobs), len(todo), workers)
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, progress.show_log) as pool:
        futures = {pool.submit(execute, path, out_dir / path.name, jobs[path], keys[path]): path
                   for path in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                error = future.exception()
                state = "failed" if error else "done"
                seconds = time.monotonic() - began
                log.info("%s: %s; %d of %d after %.0f s, about %.0f s left", futures[future].stem,
                         state, done, len(todo), seconds, seconds / done * (len(todo) - done))
                if error:
                    log.error("%s", error)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def execute(path, executed, values, key, *, progress_bar=False):
    """Execute a notebook with papermill; RuntimeError tells where it stopped."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.unlink(missing_ok=True)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update(PYTHONPATH=search, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    with tempfile.TemporaryDirectory(prefix="editcore-") as sockets, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # papermill's own
        # Kernels on TCP race for free ports when several start at once; sockets cannot.
        manager = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name == "posix" else {}
        lines = NotebookLog(path.stem)
        try:
            papermill.execute_notebook(
                str(path), str(executed), values, kernel_name="python3", cwd=str(ROOT),
                progress_bar=progress_bar, stdout_file=lines, stderr_file=lines,
                config=Config({"KernelManager": manager}), shutdown_kernel="immediate",
                extra_arguments=["--IPKernelApp.capture_fd_output=False"])
        except (papermill.PapermillExecutionError, RuntimeError) as error:
            cell = f"cell {error.exec_count} failed with " if hasattr(error, "ename") else ""
            what = f"{error.ename}: {error.evalue}" if cell else str(error)
            raise RuntimeError(f"{path.name}: {cell}{what}") from None
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["editcore"] = {"key": key}
    with atomic(executed) as file:
        nbformat.write(notebook, file)


@dataclass(frozen=True)
class NotebookLog:
    """A file for what a running notebook writes: lines of the log."""

    name: str

    def write(self, text):
        """Log each line after the notebook's name."""
        for line in filter(str.strip, text.splitlines()):
            log.info("%s: %s", self.name, line.strip())

    def flush(self):
        """Do nothing: the log is not buffered."""
