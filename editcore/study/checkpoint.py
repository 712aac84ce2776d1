"""Keep how far a run has come, so that a kill at any moment costs only the edits since."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from editcore.delta import Delta
from editcore.files import atomic, load_tensors, read_json, save_tensors, sha256, write_json

COLUMNS = ("step", "fact", "metric", "value")
HEAD = "checkpoint.json"
RANDOM = "random_state"     # key of the random state beside the parameters' names
KEYS = "keys/"              # before the names of modules whose earlier keys the editor remembers


@dataclass
class RunState:
    """All that the next edit of a run depends on, besides the unedited model."""

    step: int                       # facts edited so far
    total: Delta                    # sum of their updates, dense
    rows: list                      # (step, fact, metric, value) so far
    random_state: torch.Tensor      # of torch's generator
    contexts: tuple = ()            # templates sampled from the unedited model, never sampled again
    seconds: list = field(default_factory=list)     # one per update
    elapsed: float = 0.0            # wall seconds over all starts of this run
    answers: list = field(default_factory=list)     # what the model wrote right after each edit
    threads: int = 0                # that it began with; 0: not known


def save(folder, state, identity):
    """Write a RunState and what it belongs to (`identity`: {name: hash}) into `folder`.

    Data files carry the step in their names; the head, which lists them with their hashes, takes
    its place last: a kill between any two writes leaves the checkpoint before it intact.
    """
    folder = Path(folder)
    weights = folder / f"weights-{state.step}.safetensors"
    rows = folder / f"rows-{state.step}.parquet"
    keys = {KEYS + name: value for name, value in state.total.keys.items()}
    save_tensors(weights, state.total.changes | keys | {RANDOM: state.random_state}, {})
    with atomic(rows) as tmp:
        frame(state.rows).to_parquet(tmp, index=False)
    write_json(folder / HEAD, {
        "step": state.step, "identity": identity, "contexts": state.contexts,
        "seconds": state.seconds, "elapsed": state.elapsed, "answers": state.answers,
        "threads": state.threads, "files": {path.name: sha256(path) for path in (weights, rows)}})
    _remove_files(folder, but={weights.name, rows.name, HEAD})


def load(folder):
    """Return (RunState, identity) saved in `folder`, or None; ValueError names a damaged file."""
    folder = Path(folder)
    if not (folder / HEAD).is_file():
        return None
    try:
        head = read_json(folder / HEAD)
        for name, digest in head["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise ValueError(f"{folder / name} is missing or not as it was written")
        weights, rows = head["files"]
        tensors, _ = load_tensors(folder / weights)
        random_state = tensors.pop(RANDOM)
        keys = {name.removeprefix(KEYS): tensors.pop(name)
                for name in list(tensors) if name.startswith(KEYS)}
        table = pd.read_parquet(folder / rows)[list(COLUMNS)]
        state = RunState(head["step"], Delta(tensors, keys=keys),
                         list(table.itertuples(index=False, name=None)), random_state,
                         tuple(head["contexts"]), head["seconds"], head["elapsed"],
                         head.get("answers", []), head.get("threads", 0))
        return state, head["identity"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else f"{folder / HEAD}: {error!r}"
        raise ValueError(f"damaged checkpoint: {reason}; remove {folder} to start this run "
                         "anew") from error


def steps(folder):
    """Return the number of edits in the checkpoint in `folder`, None if there is none."""
    head = _head(folder)
    return None if head is None else head.get("step", 0)


def identity_of(folder):
    """Return what the checkpoint in `folder` belongs to, {} if there is none."""
    return (_head(folder) or {}).get("identity", {})


def _head(folder):
    """Read a checkpoint's head, None if there is none, or no longer."""
    path = Path(folder) / HEAD
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no ordinary file; move it away")
    try:
        head = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(head, dict):
        raise ValueError(f"damaged checkpoint: {path} is not an object; remove {folder} "
                         "to start this run anew")
    return head


def check_identity(before, present, folder):
    """ValueError that names the input which is not the one that the checkpoint was made with."""
    for name in sorted(set(before) | set(present)):
        if before.get(name) != present.get(name):
            raise ValueError(
                f"checkpoint {folder}: {name} has changed since the run began ({before.get(name)} "
                f"then, {present.get(name)} now); put it back, or remove the folder to start anew")


def remove(folder):
    """Delete the checkpoint, its head first, so that a kill leaves none rather than a half."""
    folder = Path(folder)
    (folder / HEAD).unlink(missing_ok=True)
    if folder.is_dir():
        _remove_files(folder, but=())
        folder.rmdir()


def frame(rows):
    """Return rows as a DataFrame: step int64, fact and metric texts, value float64."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    types = {"step": "int64", "fact": "str", "metric": "str", "value": "float64"}
    return table.astype(types)


def _remove_files(folder, but):
    for path in folder.iterdir():
        if path.name not in but:
            path.unlink()
