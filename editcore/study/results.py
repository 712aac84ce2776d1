"""Folders of runs: a run's rows and what it was made with in, files out; and tables of finished runs out of them."""

import dataclasses
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
JOINED = ["order", "batch_size", "settings"]    # parameters that `table` puts beside the rows


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


def write(lab, state, folder, head):
    """Write rows.parquet, then run.json, which marks the run as done.

    head: {"stopped": None or why, "hashes", "data", "together": runs that shared their passes}.
    """
    run = lab.run
    rows = checkpoint.frame(state.rows).assign(run=folder.name, model=short_name(run.model), editor=run.editor,
                                               data=head["data"], seed=run.seed)
    with atomic(folder / "rows.parquet") as tmp:
        rows[COLUMNS].to_parquet(tmp, index=False)
    device = next(lab.model.parameters()).device
    write_json(folder / "run.json", {
        "run": folder.name, "status": "stopped" if head["stopped"] else "finished", **head,
        "parameters": dataclasses.asdict(run), "config": dataclasses.asdict(lab.config), "edits": state.step,
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


def status(folder):
    """"finished", "stopped" or "" of a run's folder."""
    done = (folder / "run.json").is_file() and (folder / "rows.parquet").is_file()
    return read_json(folder / "run.json")["status"] if done else ""


def _flat(record):
    """A run.json as one flat dict: the parameters beside the rest."""
    known = dataclasses.asdict(Run()) | record["parameters"]
    return {name: value for name, value in record.items() if name not in ("parameters", "update_seconds")} | known
