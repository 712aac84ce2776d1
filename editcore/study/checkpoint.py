"""How far a run has come in; a checkpoint that survives a kill at any moment, read back and verified, out."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from editcore.delta import Delta
from editcore.files import atomic, read_json, sha256, write_json

COLUMNS = ("step", "fact", "metric", "value")
RANDOM = "random_state"     # key of the random state beside the parameters' names
KEYS = "keys/"              # before the names of modules whose earlier keys the editor remembers


@dataclass(frozen=True)
class Progress:
    """Everything that the next edit of a run depends on, besides the unedited model."""

    step: int                       # facts edited so far
    total: Delta                    # sum of their updates, dense float32
    rows: list                      # (step, fact, metric, value) tuples so far
    random_state: torch.Tensor      # of torch's generator
    seconds: tuple = ()             # one an update
    elapsed: float = 0.0            # wall seconds over all starts of this run
    contexts: tuple = ()            # templates sampled from the unedited model, never sampled again


def save(folder, progress, identity):
    """Write `progress` and what it belongs to (`identity`: texts by name) into `folder`.

    Data files carry the step in their names and checkpoint.json, which lists them with their hashes, takes its place
    last: a kill between any two writes leaves the checkpoint before intact. Older data files are removed at the end.
    """
    folder = Path(folder)
    weights, rows = folder / f"weights-{progress.step}.safetensors", folder / f"rows-{progress.step}.parquet"
    total = progress.total.dense()
    tensors = total.changes | {KEYS + name: keys for name, keys in total.keys.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(weights) as tmp:
        save_file(tensors | {RANDOM: progress.random_state}, tmp)
    with atomic(rows) as tmp:
        frame(progress.rows).to_parquet(tmp, index=False)
    write_json(folder / "checkpoint.json", {
        "step": progress.step, "identity": identity, "seconds": list(progress.seconds), "elapsed": progress.elapsed,
        "contexts": list(progress.contexts), "files": {path.name: sha256(path) for path in (weights, rows)}})
    _remove(folder, keep={weights.name, rows.name, "checkpoint.json"})


def load(folder, device="cpu"):
    """The Progress saved in `folder` and its identity; None if there is none. ValueError names a damaged file."""
    folder = Path(folder)
    if not (folder / "checkpoint.json").is_file():
        return None
    try:
        head = read_json(folder / "checkpoint.json")
        weights, rows = head["files"]
        for name, digest in head["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise ValueError(f"{folder / name} is missing or not as it was written")
        tensors = load_file(folder / weights, device=str(device))
        table = pd.read_parquet(folder / rows)
        state = tensors.pop(RANDOM).cpu()
        keys = {name.removeprefix(KEYS): tensors.pop(name) for name in list(tensors) if name.startswith(KEYS)}
        rows = list(table[list(COLUMNS)].itertuples(index=False, name=None))
        return Progress(head["step"], Delta(tensors, keys=keys), rows, state, tuple(head["seconds"]), head["elapsed"],
                        tuple(head["contexts"])), head["identity"]
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"damaged checkpoint: {error}; remove {folder} to start this run anew") from error


def identity_of(folder):
    """What the checkpoint in `folder` belongs to, {} if there is none."""
    head = Path(folder) / "checkpoint.json"
    return read_json(head).get("identity", {}) if head.is_file() else {}


def check_identity(found, wanted, folder):
    """ValueError that says which of the run's inputs is not the one that the checkpoint was made with."""
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"checkpoint {folder}: {name} has changed since the run began ({found.get(name)} then, "
                             f"{wanted.get(name)} now); put it back, or remove the folder to start anew")


def remove(folder):
    """Delete the checkpoint, its head first, so that a kill meanwhile leaves none rather than half of one."""
    (Path(folder) / "checkpoint.json").unlink(missing_ok=True)
    if Path(folder).is_dir():
        _remove(Path(folder), keep=set())
        Path(folder).rmdir()


def frame(rows):
    """The rows as a DataFrame: step int64, fact and metric texts, value float64."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"step": "int64", "fact": "str", "metric": "str", "value": "float64"})


def _remove(folder, keep):
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
