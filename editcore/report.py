"""Execute the notebooks with papermill: parameters checked, what is done not done again.

    index = build(parameters={"20_forgetting": {"n_edits": 200}})   # results/reports/index.html
    executed = run_notebook("notebooks/10_edit.ipynb", {"n_edits": 100})
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import tomllib
from itertools import chain, pairwise
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pydantic
import yaml
from IPython import get_ipython
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default
from traitlets.config import Config

import editcore
from editcore import pages, planning, processes, progress
from editcore.files import atomic, read_json, sha256, sha256_text
from editcore.outputs import claim
from editcore.pages import ROOT, failure, read_notebook

LONGEST_SOCKET = 90     # bytes of a folder's path in which sockets fit; the system's limit is 107
log = logging.getLogger("editcore")


# ── in notebooks ────────────────────────────────────────────────────────────────────────────────

def start():
    """Prepare a notebook: go to the repository's root, show progress, refuse wrong parameters."""
    os.chdir(ROOT)
    progress.show_log()
    if shell := get_ipython():
        refuse_unknown(shell.user_ns.get("In", []))
        line = "stopped; run the cell again to go on from here"
        shell.set_custom_exc((KeyboardInterrupt,), lambda *_, **__: log.warning(line))


def refuse_unknown(cells):
    """ValueError if papermill's cell, one of those run so far, names what the one before lacks."""
    for before, injected in pairwise(cells):
        if injected.startswith("# Parameters\n"):
            known = planning.assigned(before)
            if unknown := sorted(planning.assigned(injected) - known):
                raise ValueError(f"unknown parameter {unknown[0]!r}; known are "
                                 f"{', '.join(sorted(known)) or 'none'}")


def provenance(folders=()):
    """Return what a report was made from, as a table; folders: those of its runs."""
    from editcore.study.results import software  # torch, which the report's pages do not need

    here = software()
    files = [Path(folder) / "run.json" for folder in folders]
    runs = pd.DataFrame([read_json(file) for file in files if file.is_file()])
    lines = {"code": f"editcore {editcore.__version__}, commit {here['commit']}"}
    if len(runs):
        devices = ", ".join(sorted(set(runs["device"])))
        lines["runs"] = f"{len(runs)}, {runs['edits'].sum():,} edits"
        lines["their computing time"] = f"{runs['seconds'].sum() / 60:.1f} minutes on {devices}"
        lines["their code"] = "commit " + ", ".join(sorted(set(runs["commit"])))
    lines["versions"] = ", ".join(" ".join(item) for item in here["versions"].items())
    return pd.DataFrame({"made from": lines})


# ── parameters ──────────────────────────────────────────────────────────────────────────────────

def parameters(path):
    """Return papermill's description of each of a notebook's parameters: type, default, help."""
    read_notebook(path)
    return papermill.inspect_notebook(str(path))


def check(path, values):
    """Return the values as the notebook's types; text is read as the type: "0,1" is [0, 1]."""
    name = Path(path).name
    types = {key: line["inferred_type_name"] for key, line in parameters(path).items()}
    checked = {}
    for key, value in values.items():
        if key not in types:
            known = ", ".join(f"{key}: {kind}" for key, kind in types.items()) or "none"
            raise ValueError(f"{name}: unknown parameter {key!r}; known are {known}")
        try:
            adapter = pydantic.TypeAdapter(planning.type_of(types[key]))
        except ValueError as error:
            raise ValueError(f"{name}: type of {key}: {error}") from error
        try:
            checked[key] = adapter.validate_python(_read(value, types[key]),
                                                   strict=not isinstance(value, str))
        except (pydantic.ValidationError, yaml.YAMLError):
            raise ValueError(f"{name}: parameter {key} must be {types[key]}, not "
                             f"{value!r}") from None
    return checked


def _read(value, kind):
    if not isinstance(value, str) or not kind.startswith(("list", "dict")):
        return value
    return yaml.safe_load(f"[{value}]" if kind[0] == "l" and value[:1] != "[" else value)


def full_study():
    """Return {notebook: parameters} of the full study."""
    return tomllib.loads((ROOT / "data/full_study.toml").read_text("utf-8"))


def notebook_paths(folder):
    """Return the paths of all NN_title.ipynb."""
    return sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))


def chosen_parameters(notebooks, words, *, full=False):
    """Return {notebook: parameters}: the full study's, then {NAME or NOTEBOOK.NAME: text}."""
    paths = notebook_paths(notebooks)
    chosen = full_study() if full else {}
    for word, text in words.items():
        notebook, dot, name = word.rpartition(".")
        holders = [notebook] if dot else [path.stem for path in paths if name in parameters(path)]
        if not holders:
            raise ValueError(f"-p {word}: no notebook has this parameter; give NAME VALUE or "
                             "NOTEBOOK.NAME VALUE, as in -p 20_forgetting.n_edits 200")
        for stem in holders:
            chosen.setdefault(stem, {})[name] = text
    return chosen


# ── running ─────────────────────────────────────────────────────────────────────────────────────

def build(notebooks="notebooks", out_dir="results/reports", parameters=None, *, force=False,
          workers=2):
    """Make the runs, execute and render every NN_title.ipynb, write the index; return its path.

    parameters: {stem of a notebook: {name: value}}. What is done is not done again. A notebook that
    fails is shown as failed; RuntimeError names it after the index is written.
    """
    paths = notebook_paths(Path(notebooks).resolve())
    if not paths:
        raise FileNotFoundError(f"{notebooks}: no notebook named NN_title.ipynb")
    parameters = parameters or {}
    if unknown := sorted(set(parameters) - {path.stem for path in paths}):
        raise ValueError(f"parameters for {unknown[0]}, which is not a notebook of {notebooks}")
    jobs = {path: check(path, parameters.get(path.stem, {})) for path in paths}
    copies = Path(out_dir).resolve()
    with contextlib.chdir(ROOT):
        plans = {path: planned_runs(path, values) for path, values in jobs.items()}
        claim(copies, [f"{path.stem}.{kind}" for path in paths for kind in ("ipynb", "html")]
              + ["index.html", "cases.html", "records.html"])
        folders = make_runs(plans.values(), workers)
        errors = _execute_all(jobs, copies, force=force, workers=workers)
        pages.write_report(paths, copies, folders, errors)
    return Path(out_dir) / "index.html"


def run_notebook(path, values=None, out_dir="results/reports", *, force=False):
    """Execute one notebook from the repository's root and render it; return its page.

    A copy that is done and was made from the same cells, parameters and runs stays as it is.
    """
    values = check(path, values or {})
    path = Path(path).resolve()
    executed = Path(out_dir).resolve() / path.name
    page = executed.with_suffix(".html")
    with contextlib.chdir(ROOT):
        plan = planned_runs(path, values)
        claim(executed.parent, [executed.name, page.name])
        make_runs([plan])
        key = notebook_key(path, values)
        try:
            if force or not is_done(executed, key):
                execute(path, executed, values, key=key, progress_bar=sys.stderr.isatty())
        finally:
            if executed.is_file():
                pages.write_page(pages.read_executed(executed), page)
    return page


def make_runs(planned, workers=2):
    """Make the runs that are missing of (folder, runs) pairs; return the folders of all."""
    from editcore.study import loop, plans

    wanted = {}
    for folder, runs in planned:
        wanted.setdefault(folder, {}).update(dict.fromkeys(runs))
    folders = []
    for folder, runs in wanted.items():
        missing = plans.status(runs, folder)["status"].isin(["missing", "begun"]).sum()
        log.info("%s: %d runs to make, %d at a time", folder, missing, workers)
        folders += loop.execute_all([*runs], folder, workers)
    return folders


def planned_runs(path, values):
    """Return (folder, runs) that a notebook's cells tagged `plan` ask for; see `planning`."""
    from editcore.study import plans
    from editcore.study.run import Run

    cells = read_notebook(path).cells
    try:
        names = planning.literals(_tagged(cells, "parameters")) | values
        functions = plans.BY_NAME | {"plan_run": plans.plan_run}
        names |= planning.planned(_tagged(cells, "plan"), names, functions)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: plan of its runs: {error}") from error
    lists = [value for value in names.values() if isinstance(value, list)]
    runs = [item for item in chain.from_iterable(lists) if isinstance(item, Run)]
    return f"{names.get('results', 'results')}/runs", list(dict.fromkeys(runs))


def _tagged(cells, tag):
    return "\n".join(cell.source for cell in cells if tag in cell.metadata.get("tags", []))


def notebook_key(path, values):
    """Return a hash of all that a notebook's outcome depends on: cells, parameters, runs."""
    from editcore.study import plans

    folder, runs = planned_runs(path, values)
    files = [Path(folder) / run / "run.json" for run in plans.status(runs, folder)["run"]]
    hashes = [sha256(file) if file.is_file() else "missing" for file in files]
    cells = read_notebook(path).cells
    sources = [f"{cell.cell_type} {cell.source}" for cell in cells]
    return sha256_text(editcore.__version__, *sources, repr(sorted(values.items())), *hashes)


def is_done(executed, key=None):
    """Return whether a copy ran to its end without an exception, and was made from `key`."""
    notebook = pages.read_executed(executed)
    return not failure(notebook) and key in (None, notebook.metadata["editcore"]["key"])


def _execute_all(jobs, out_dir, *, force, workers):
    """Execute the notebooks that are not done, each in a process; return {stem: exception}."""
    todo = {}
    for path, values in jobs.items():
        key = notebook_key(path, values)
        if force or not is_done(out_dir / path.name, key):
            todo[path.stem] = (path, out_dir / path.name, values, key)
    log.info("%d notebooks, %d to execute, %d at a time", len(jobs), len(todo), workers)
    errors = {}
    with contextlib.closing(processes.in_processes(_execute, todo, workers)) as ends:
        for stem, end in progress.bar(ends, "notebooks", len(todo)):
            log.info("%s: %s", stem, end or "done")
            errors |= {stem: end} if end else {}
    return errors


def _execute(path, executed, values, key):
    """Execute a notebook in a process of its own, and say that it is done."""
    execute(path, executed, values, key=key)
    yield ""


class OwnKernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this program, whichever others are installed."""

    @default("kernel_spec_manager")
    def _without_others(self):
        return KernelSpecManager(kernel_dirs=[], parent=self)


def execute(path, executed, values, *, key, progress_bar=False):
    """Execute a notebook with papermill; an earlier copy stays until a cell of it has run."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update(PYTHONPATH=search, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    lines = NotebookLog(path.stem)
    with tempfile.TemporaryDirectory(prefix="editcore-", dir=_socket_folder()) as place:
        running = Path(place) / path.name
        # Kernels on TCP race for free ports when several start at once; sockets cannot.
        short = os.name == "posix" and len(os.fsencode(place)) < LONGEST_SOCKET
        manager = {"transport": "ipc", "ip": f"{place}/kernel"} if short else {}
        try:
            notebook = papermill.execute_notebook(
                str(path), str(running), values, kernel_name="python3", cwd=str(ROOT),
                progress_bar=progress_bar, stdout_file=lines, stderr_file=lines,
                config=Config({"KernelManager": manager}), shutdown_kernel="immediate",
                kernel_manager_class=OwnKernel,
                extra_arguments=["--IPKernelApp.capture_fd_output=False"])
        except Exception as error:      # of a cell, or the kernel did not start, or died
            copy = pages.read_executed(running)
            if any(cell.get("execution_count") for cell in copy.cells):
                _write(copy, executed)
            if isinstance(error, papermill.PapermillExecutionError):
                error = f"cell {error.exec_count} failed with {error.ename}: {error.evalue}"
            raise RuntimeError(f"{path.name}: {error}") from None
    notebook.metadata["editcore"] = {"key": key}
    _write(notebook, executed)


def _write(notebook, path):
    with atomic(path) as file:
        nbformat.write(notebook, file)


def _socket_folder():
    """Return a folder in which sockets fit: None (the usual one), or /tmp where that is long."""
    usual = tempfile.gettempdir()
    fits = len(os.fsencode(usual)) < LONGEST_SOCKET - 30
    return None if fits or not os.access("/tmp", os.W_OK) else "/tmp"


class NotebookLog(io.TextIOBase):
    """A file for what a running notebook writes: lines of the log, after the notebook's name."""

    def __init__(self, name):
        self.name = name

    def write(self, text):
        """Log each line."""
        for line in filter(str.strip, text.splitlines()):
            log.info("%s: %s", self.name, line.strip())
