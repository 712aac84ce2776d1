"""Write a run's folder, and read finished runs as tables.

    rows = table(folders)                   # of the folders that `execute_all` returns
    rows = table("results/runs", editor="rome", order=[0, 1])
    made = runs(folders)                    # a row per run: its parameters, settings, seconds, ...
    folders += published("data/runs/smollm2")       # one run per editor, order and schedule
"""

import dataclasses
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch

from editcore.files import atomic, read_json, write_json
from editcore.model import peak_memory, short_name
from editcore.study import checkpoint
from editcore.study.run import Run

COLUMNS = ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]
FROM_RUN = ["order", "batch_size", "settings"]      # what `table` puts beside the rows


def runs(source="results/runs", **filters):
    """Return a DataFrame with a row per finished or stopped run.

    source: the folder of all runs, or a list of run folders. Columns are the run's parameters,
    its editor's settings (layer, clamp, ...; NaN where an editor has no such setting), status,
    edits, seconds, hashes and versions. filters keep the runs with that value of a column, or
    one of a list of values: runs(editor="rome", order=[0, 1]). ValueError for an unknown column.
    """
    records = [_flat(_record(path)) for path in _run_files(source)]
    empty = ["run", "status", *_flat({"parameters": {}})]
    frame = pd.DataFrame(records) if records else pd.DataFrame(columns=empty)
    for name, wanted in filters.items():
        if name not in frame.columns:
            raise ValueError(f"runs: no {name!r} to choose by, only "
                             f"{', '.join(frame.columns)}")
        values = wanted if isinstance(wanted, (list, set, tuple)) else [wanted]
        frame = frame[frame[name].isin(values)]
    return frame.reset_index(drop=True)


def published(source, *, longest=False, put_in=None, **filters):
    """Return the folders of finished runs, one per editor, order and schedule of facts.

    Of runs that differ in length only, it is the longest that all orders of the editor have, so
    that orders can be averaged; with `longest`, or where they share none, each order's longest.
    put_in: True or False, only runs with edits put in at stated places (`insert`), or without.
    source and filters: as in `runs`; "" has none.
    """
    made = runs(source or (), status="finished", **filters)
    made[["put_in", "left_out"]] = made[["insert", "leave_out"]].map(bool)
    if put_in is not None:
        made = made[made["put_in"] == put_in]
    schedule = ["editor", "put_in", "left_out"]
    orders = made.groupby(schedule)["order"].transform("nunique")
    at_length = made.groupby([*schedule, "n_edits"])["order"].transform("nunique")
    made["shared"] = (at_length == orders) & (not longest)
    chosen = made.sort_values(["shared", "n_edits"]).drop_duplicates([*schedule, "order"],
                                                                     keep="last")
    return [Path(source) / name for name in chosen.sort_index()["run"]]


def table(source="results/runs", **filters):
    """Return the rows of runs (chosen as in `runs`) in one long DataFrame.

    Columns: run, model, editor, data, seed, order, batch_size, settings (as text, "" where
    none is given), step (edits so far), fact (case id or parameter name), metric, value.
    """
    return _tables("rows.parquet", source, filters, required=True)


def cases(source="results/runs", **filters):
    """Return what the model wrote about each edited fact, of runs chosen as in `runs`.

    Columns: those of `table` up to settings; fact, subject, prompt, target_new, target_true,
    relation, step, answer_before, answer_after, answer_end, forgotten_at (the first re-test
    step at which the edit failed, NaN if it never did). Runs without such a file are left out.
    """
    return _tables("cases.parquet", source, filters, required=False)


def status(folder):
    """Return "finished", "stopped" or "" of a run's folder."""
    for name in ("run.json", "rows.parquet", "cases.parquet"):
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is no ordinary file; move it away")
    done = (folder / "run.json").is_file() and (folder / "rows.parquet").is_file()
    return _record(folder / "run.json")["status"] if done else ""


def _record(path):
    """Read a run.json; ValueError names one that is missing or none."""
    record = read_json(path)
    entries = record if isinstance(record, dict) else {}
    if (entries.get("status") not in ("finished", "stopped")
            or not isinstance(entries.get("parameters"), dict) or "run" not in entries):
        raise ValueError(f"{path}: not a run's, or damaged; remove its folder to make the run "
                         "again")
    return record


def _run_files(source):
    if isinstance(source, (str, os.PathLike)):
        return sorted(Path(source).glob("*/run.json"))
    return [Path(folder) / "run.json" for folder in dict.fromkeys(source)]


def _tables(name, source, filters, *, required):
    """Return the files `name` of the runs below each other, each with its run's parameters."""
    chosen = set(runs(source, **filters)["run"])
    parts = [pd.DataFrame(columns=[*COLUMNS[:5], *FROM_RUN, *COLUMNS[5:]])]
    for path in _run_files(source):
        record = _flat(_record(path))
        if record["run"] in chosen and (required or (path.parent / name).exists()):
            part = _read(path.parent / name)
            part.insert(5, "order", record["order"])
            part.insert(6, "batch_size", record["batch_size"])
            settings = [f"{key}={value}" for key, value in record["settings"]]
            part.insert(7, "settings", ", ".join(settings))
            parts.append(part)
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _read(path):
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); remove its folder to make the "
                         "run again") from error


def write(folder, context, state, *, cases, head):
    """Write rows.parquet and cases.parquet, then run.json, which marks the run as done.

    context, state: the run's RunContext and RunState at its end. cases: `measure.cases` or None.
    head: more entries of run.json; {"stopped": None or why, "data", "hashes", "together"} at least.
    """
    run = context.run
    common = {"run": folder.name, "model": short_name(run.model), "editor": run.editor,
              "data": head["data"], "seed": run.seed}
    rows = checkpoint.frame(state.rows).assign(**common)
    with atomic(folder / "rows.parquet") as tmp:
        rows[COLUMNS].to_parquet(tmp, index=False)
    if cases is not None:
        with atomic(folder / "cases.parquet") as tmp:
            cases.assign(**common)[[*common, *cases.columns]].to_parquet(tmp, index=False)
    device = next(context.model.parameters()).device
    write_json(folder / "run.json", {
        "run": folder.name, "status": "stopped" if head["stopped"] else "finished", **head,
        "parameters": dataclasses.asdict(run), "config": dataclasses.asdict(context.config),
        "edits": state.step, "known_facts": context.n_known, "seconds": state.elapsed,
        "seconds_per_edit": sum(state.seconds) / max(1, state.step),
        "update_seconds": [round(seconds, 4) for seconds in state.seconds],
        "contexts": list(state.contexts),
        "peak_memory": peak_memory(device) or _resident(), "device": str(device),
        "threads": torch.get_num_threads(), **software()})


def software():
    """Return the commit (if this is a git checkout) and the versions of the code."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*",
                   "--dirty= with changes"]
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=False).stdout.strip()
    except OSError:     # no git
        answer = ""
    packages = ("torch", "transformers", "numpy", "pandas", "scikit-learn", "seaborn")
    versions = {name: metadata.version(name) for name in packages}
    return {"commit": answer or "unknown",
            "versions": {"python": platform.python_version(), **versions}}


def _resident():
    """Return the largest memory held by this process in bytes, 0 where the system hides it."""
    status_file = Path("/proc/self/status")
    lines = status_file.read_text().splitlines() if status_file.is_file() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else 0


def _flat(record):
    """Return a run.json as one flat dict: its editor's settings and its parameters beside it."""
    parameters = dataclasses.asdict(Run()) | record["parameters"]
    settings = {name: value for name, value in record.get("config", {}).items()
                if name not in parameters}
    hidden = ("parameters", "update_seconds")
    shown = {name: value for name, value in record.items() if name not in hidden}
    return shown | settings | parameters
