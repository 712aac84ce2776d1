"""What an edit gives back: a Delta of the model's weights, or a Patch that works beside them.

    with delta.applied(model):          # undone on exit, bit for bit
        model(input_ids=ids)

Both have `applied`, `check`, `+`, `norm`, `is_finite`, `save` and `info`; `load` reads either.
"""

import contextlib
import importlib
from dataclasses import dataclass, field, fields, replace

import torch

from editcore.files import load_tensors, save_tensors
from editcore.hooks import hooked
from editcore.model import is_input_first

# What a Patch's parts are called in files, and their classes (imported when a file is read: they
# stand with their editors). A part has `kind`, tensors, `output(x, y, positions)`, `+` and `fits`.
PARTS = {
    "codebook": "editcore.editors.grace:Codebook",
    "slots": "editcore.editors.calinet:Slots",
    "beside": "editcore.editors.calinet:Slots",     # the older name of slots
}


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
    """Changes of parameters, each of the parameter's own shape and orientation."""

    changes: dict                               # parameter name -> tensor or LowRank
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists
    keys: dict = field(default_factory=dict)    # module name -> (n, m) keys to remember

    def __add__(self, other):
        changes = {name: _sum(self.changes.get(name), other.changes.get(name))
                   for name in self.changes | other.changes}
        keys = self.keys | other.keys
        for name in self.keys.keys() & other.keys.keys():
            keys[name] = torch.cat([self.keys[name], other.keys[name]])
        return Delta(changes, dict(self.info), keys)

    def __mul__(self, factor):
        changes = {name: LowRank(change.left * factor, change.right)
                   if isinstance(change, LowRank) else change * factor
                   for name, change in self.changes.items()}
        return replace(self, changes=changes)

    def dense(self):
        """The same Delta with every change a tensor."""
        changes = {name: dense(change) for name, change in self.changes.items()}
        return replace(self, changes=changes)

    def norm(self, name=None):
        """Frobenius norm of one change, or of all together, computed in float64."""
        changes = self.changes.values() if name is None else [self.changes[name]]
        return sum(map(_squared_norm, changes)) ** 0.5

    def is_finite(self):
        """False if any entry is NaN or infinite."""
        tensors = []
        for change in self.changes.values():
            low = isinstance(change, LowRank)
            tensors += [change.left, change.right] if low else [change]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    @contextlib.contextmanager
    def applied(self, model):
        """In the block the model's parameters carry the change; on exit they are what they were.

        The sum is taken in float32 or better and cast once. ValueError names a parameter that the
        model lacks or whose shape differs, before anything is changed.
        """
        self.check(model)
        weights = {name: model.get_parameter(name).detach().clone() for name in self.changes}
        try:
            with torch.no_grad():
                for name, change in self.changes.items():
                    model.get_parameter(name).copy_(added(weights[name], change))
            yield model
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    model.get_parameter(name).copy_(weight)

    def check(self, model):
        """ValueError if the model lacks a changed parameter or has it in another shape."""
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for name, change in self.changes.items():
            shape = tuple(change.shape)
            if name not in shapes:
                raise ValueError(f"delta: the model has no parameter {name}")
            if shapes[name] != shape:
                raise ValueError(f"delta: {name} is {shape}, the model's is {shapes[name]}")

    def save(self, path):
        """Write a safetensors file: dense changes by parameter, info as JSON in the metadata."""
        metadata = {"format": "editcore-delta-1", "info": dict(self.info)}
        save_tensors(path, self.dense().changes, metadata)


@dataclass(frozen=True)
class Patch:
    """Parts that work beside the weights: each changes the output of one module."""

    parts: dict                                 # module name -> a part (see PARTS)
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists

    def __add__(self, other):
        """Both, module by module. ValueError if a module has parts of two kinds."""
        parts = self.parts | other.parts
        for name in self.parts.keys() & other.parts.keys():
            if self.parts[name].kind != other.parts[name].kind:
                raise ValueError(f"patch: {name} has a part of another kind already")
            parts[name] = self.parts[name] + other.parts[name]
        return Patch(parts, dict(self.info or other.info))

    def norm(self, name=None):
        """Frobenius norm of the values of one part, or of all together, computed in float64."""
        parts = self.parts.values() if name is None else [self.parts[name]]
        return sum(_squared_norm(part.values.detach()) for part in parts) ** 0.5

    def is_finite(self):
        """False if any entry is NaN or infinite."""
        tensors = [value for part in self.parts.values() for value in vars(part).values()
                   if torch.is_tensor(value)]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    @contextlib.contextmanager
    def applied(self, model, positions=None):
        """In the block the model works with the patch; on exit its hooks are gone.

        positions: for each pass in the block a (B, T) bool mask of where a codebook is looked up,
        read from the right where a pass has more tokens (see `likelihood.prompt_ends`). None: at
        every position of every pass; what is added then depends on the tokens up to it alone, so
        that padded rows, cached generation and continuations scored together agree. ValueError
        names a module that the model lacks or that does not fit.
        """
        self.check(model)
        hooks = {name: part_hook(part, positions) for name, part in self.parts.items()}
        with hooked(model, hooks):
            yield model

    def check(self, model):
        """ValueError if the model lacks a module or its widths differ."""
        modules = dict(model.named_modules())
        for name, part in self.parts.items():
            if name not in modules:
                raise ValueError(f"patch: the model has no module {name}")
            if not part.fits(modules[name], model.config.hidden_size):
                raise ValueError(f"patch: {name} has other widths than {tuple(part.keys.shape)} "
                                 f"keys and {tuple(part.values.shape)} values fit")

    def save(self, path):
        """Write a safetensors file: tensors by module/field, everything else in the metadata."""
        tensors = {}
        others = {}
        for name, part in self.parts.items():
            others[name] = {"kind": part.kind}
            for key, value in vars(part).items():
                if torch.is_tensor(value):
                    tensors[f"{name}/{key}"] = value
                else:
                    others[name][key] = value
        metadata = {"format": "editcore-patch-1", "info": dict(self.info), "parts": others}
        save_tensors(path, tensors, metadata)


def load(path, device="cpu"):
    """Read the Delta or Patch of a file; FileNotFoundError or ValueError names the file."""
    tensors, metadata = load_tensors(path, device)
    try:
        info = dict(metadata.get("info", {}))
        kind = metadata.get("format", "editcore-delta-1")
        if kind == "editcore-delta-1":
            return Delta(tensors, info)
        if kind != "editcore-patch-1":
            raise ValueError(f"its format is {kind}")
        parts = {name: _part(name, others, tensors) for name, others in metadata["parts"].items()}
        return Patch(parts, info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of an edit, or damaged ({error})") from error


def added(weight, change):
    """weight + change, summed in float32 or better, in the weight's dtype and on its device."""
    change = dense(change)
    wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
    return (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype)


def oriented(left, right, module):
    """LowRank of W += left @ right (left (d, r), right (r, m)) as `module` stores its weight."""
    return LowRank(right.T, left.T) if is_input_first(module) else LowRank(left, right)


def part_hook(part, positions=None):
    """A forward hook with a part's output; each pass uses up one of the masks `positions`."""
    masks = None if positions is None else iter(list(positions))

    def hook(_, args, output):
        x = args[0]
        y = output[0] if isinstance(output, tuple) else output
        mask = None
        if masks is not None:
            mask = next(masks, None)
            if mask is None:
                raise ValueError("patch: the model was run more often than `positions` has masks")
            mask = torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0))
        y = part.output(x, y, mask)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


def _part(name, others, tensors):
    """The part of one module from its metadata and the file's tensors."""
    module, _, kind = PARTS[others["kind"]].partition(":")
    kind = getattr(importlib.import_module(module), kind)
    values = {key: tuple(value) for key, value in others.items() if key != "kind"}
    for part_field in fields(kind):
        if part_field.name not in values:
            values[part_field.name] = tensors[f"{name}/{part_field.name}"]
    return kind(**values)


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
    left = change.left.double()
    right = change.right.double()
    return max(0.0, ((left.T @ left) * (right @ right.T)).sum().item())
