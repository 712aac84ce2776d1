"""Changes of parameters in; sums, norms, files and a model with the change applied (and exactly undone) out."""

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.files import atomic
from editcore.model import is_input_first


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right without forming it: left (rows, r), right (r, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    def dense(self):
        return self.left @ self.right

    @property
    def shape(self):
        return self.left.shape[0], self.right.shape[1]

    @property
    def ndim(self):
        return 2

    @property
    def saves(self):
        """True while the factors are smaller than the matrix."""
        return self.left.numel() + self.right.numel() < self.shape[0] * self.shape[1]


def dense(change):
    """A tensor of a tensor or LowRank."""
    return change.dense() if isinstance(change, LowRank) else change


@dataclass(frozen=True)
class Delta:
    """What an edit changes: parameter name -> tensor or LowRank of the parameter's own shape and orientation."""

    changes: dict
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists
    keys: dict = field(default_factory=dict)    # module name -> (n, m) keys, of an editor that remembers them

    def __add__(self, other):
        names, keys = self.changes | other.changes, self.keys | other.keys
        return Delta({name: _sum(self.changes.get(name), other.changes.get(name)) for name in names}, dict(self.info),
                     {name: torch.cat([one.keys[name] for one in (self, other) if name in one.keys]) for name in keys})

    def __mul__(self, factor):
        changes = {name: LowRank(c.left * factor, c.right) if isinstance(c, LowRank) else c * factor
                   for name, c in self.changes.items()}
        return replace(self, changes=changes)

    def dense(self):
        """The same Delta with every change a tensor."""
        return replace(self, changes={name: dense(change) for name, change in self.changes.items()})

    def norm(self, name=None):
        """Frobenius norm of one change, or of all together, a float computed in float64."""
        if name is not None:
            return _squared_norm(self.changes[name]) ** 0.5
        return sum(_squared_norm(change) for change in self.changes.values()) ** 0.5

    def is_finite(self):
        """False if any entry is NaN or infinite."""
        parts = [t for c in self.changes.values() for t in ((c.left, c.right) if isinstance(c, LowRank) else (c,))]
        return all(bool(torch.isfinite(part).all()) for part in parts)

    @contextlib.contextmanager
    def applied(self, model):
        """In the block the model's parameters carry the change; on exit they are bit for bit what they were.

        The sum is taken in float32 or better and cast once. ValueError names a parameter the model lacks or whose
        shape differs, before anything is changed.
        """
        self.check(model)
        kept = {name: model.get_parameter(name).detach().clone() for name in self.changes}
        try:
            with torch.no_grad():
                for name, change in self.changes.items():
                    model.get_parameter(name).copy_(added(kept[name], change))
            yield model
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    model.get_parameter(name).copy_(weight)

    def check(self, model):
        """ValueError if the model lacks a changed parameter or has it in another shape."""
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for name, change in self.changes.items():
            if name not in shapes:
                raise ValueError(f"delta: the model has no parameter {name}")
            if shapes[name] != tuple(change.shape):
                raise ValueError(f"delta: {name} is {tuple(change.shape)}, the model's is {shapes[name]}")

    def save(self, path):
        """Write a safetensors file: dense changes under their parameter's name, info as JSON in the metadata."""
        tensors = {name: change.detach().cpu().contiguous().clone() for name, change in self.dense().changes.items()}
        with atomic(path) as tmp:
            save_file(tensors, tmp, metadata={"format": "editcore-delta-1", "info": json.dumps(self.info)})


def load(path, device="cpu"):
    """The Delta of a safetensors file; FileNotFoundError or ValueError names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
            return Delta({name: file.get_tensor(name) for name in file.keys()}, info)  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a delta file, or damaged ({error})") from error


def added(weight, change):
    """weight + change in the wider of float32 and their dtypes, cast back to the weight's dtype and device."""
    change = dense(change)
    wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
    return (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype)


def oriented(left, right, module):
    """LowRank of W += left @ right in maths orientation (d, m), in the orientation in which `module` stores W.

    left (d, r), right (r, m).
    """
    return LowRank(right.T, left.T) if is_input_first(module) else LowRank(left, right)


def _sum(a, b):
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        joined = LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 0))
        return joined if joined.saves else joined.dense()
    return dense(a) + dense(b)


def _squared_norm(change):
    if not isinstance(change, LowRank):
        return change.double().square().sum().item()
    left, right = change.left.double(), change.right.double()
    return max(0.0, ((left.T @ left) * (right @ right.T)).sum().item())
