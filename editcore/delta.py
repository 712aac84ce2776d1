"""What an edit gives back: a Delta of the model's weights, or a Patch that works beside them.

    with delta.applied(model):          # undone on exit, bit for bit
        model(input_ids=ids)

Both have `applied`, `check`, `+`, `norm`, `is_finite`, `save` and `info`; `load` reads either.
"""

import contextlib
import operator
import pkgutil
from dataclasses import dataclass, field, fields, replace

import torch

from editcore.files import load_tensors, save_tensors
from editcore.hooks import hooked
from editcore.model import is_input_first

# What a Patch's parts are called in files, and their classes, which stand with their editors. A
# part has `kind`, tensors (`values` among them), `output(x, y)`, `+` and `fits`.
PARTS = {
    "codebook": "editcore.editors.grace:Codebook",
    "slots": "editcore.editors.calinet:Slots",
    "beside": "editcore.editors.calinet:Slots",     # the older name of slots
}
FORMATS = ("editcore-delta-1", "editcore-patch-1")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INFO = {"model_hash": str, "dtype": str, "editor": str, "edits": int}   # what is read of `info`


@dataclass(frozen=True)
class LowRank:
    """Stand for the matrix left @ right without forming it: left (rows, r), right (r, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    def dense(self):
        return self.left @ self.right

    @property
    def shape(self):
        return self.left.shape[0], self.right.shape[1]

    @property
    def saves(self):
        """Say whether the factors are smaller than the matrix."""
        return self.left.numel() + self.right.numel() < self.shape[0] * self.shape[1]


def dense(change):
    """Return the tensor of a tensor or LowRank."""
    return change.dense() if isinstance(change, LowRank) else change


@dataclass(frozen=True)
class Delta:
    """Changes of parameters, each of the parameter's own shape and orientation."""

    changes: dict                               # parameter name -> tensor or LowRank
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists
    keys: dict = field(default_factory=dict)    # module name -> (n, m) keys to remember
    label: str = field(default="delta", compare=False)      # its file, for errors

    def __add__(self, other):
        changes = _joined(self.changes, other.changes, _sum)
        keys = _joined(self.keys, other.keys, lambda *keys: torch.cat(keys))
        return Delta(changes, dict(self.info), keys)

    def __mul__(self, factor):
        changes = {name: LowRank(change.left * factor, change.right)
                   if isinstance(change, LowRank) else change * factor
                   for name, change in self.changes.items()}
        return replace(self, changes=changes)

    def __repr__(self):
        return _listed(self, self.changes)

    def dense(self):
        """Return the same Delta with every change a tensor."""
        changes = {name: dense(change) for name, change in self.changes.items()}
        return replace(self, changes=changes)

    def norm(self, name=None):
        """Return the Frobenius norm of one change, or of all together, taken in float64."""
        return _norm(self.changes, name)

    def is_finite(self):
        """Say whether no entry is NaN or infinite."""
        return all(map(_is_finite, self.changes.values()))

    @contextlib.contextmanager
    def applied(self, model):
        """In the block the model's parameters carry the change; on exit they are what they were.

        The sum is taken in float32 or better and cast once. ValueError as `check`, before any
        change.
        """
        self.check(model)
        weights = {name: model.get_parameter(name) for name in self.changes}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.detach().copy_(added(before[name], self.changes[name]))
            yield model
        finally:
            for name, weight in weights.items():
                weight.detach().copy_(before[name])

    def check(self, model):
        """ValueError if the model lacks a changed parameter or has it in another shape."""
        weights = dict(model.named_parameters())
        for name, change in self.changes.items():
            if name not in weights:
                raise ValueError(f"{self.label}: the model has no parameter {name}")
            here = tuple(change.shape)
            there = tuple(weights[name].shape)
            if here != there:
                raise ValueError(f"{self.label}: {name} is {here}, the model's is {there}")

    def save(self, path):
        """Write a safetensors file: dense changes by parameter, info as JSON in the metadata."""
        metadata = {"format": "editcore-delta-1", "info": dict(self.info)}
        save_tensors(path, self.dense().changes, metadata)


@dataclass(frozen=True)
class Patch:
    """Parts that work beside the weights: each changes the output of one module."""

    parts: dict                                 # module name -> a part (see PARTS)
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists
    label: str = field(default="patch", compare=False)      # its file, for errors

    def __add__(self, other):
        """Join both, module by module; ValueError if a module has parts of two kinds."""
        for name in self.parts.keys() & other.parts.keys():
            if self.parts[name].kind != other.parts[name].kind:
                raise ValueError(f"patch: {name} has a part of another kind already")
        parts = _joined(self.parts, other.parts, operator.add)
        return Patch(parts, dict(self.info or other.info))

    def __repr__(self):
        return _listed(self, {name: part.values for name, part in self.parts.items()})

    def norm(self, name=None):
        """Return the Frobenius norm of the values of one part, or of all, taken in float64."""
        return _norm({module: part.values for module, part in self.parts.items()}, name)

    def is_finite(self):
        """Say whether no entry is NaN or infinite."""
        return all(map(_is_finite, self.parts.values()))

    @contextlib.contextmanager
    def applied(self, model):
        """In the block the model works with the patch; on exit its hooks are gone.

        A codebook is looked up at every position of every pass, so that padded rows, cached
        generation and continuations scored together agree. ValueError as `check`.
        """
        self.check(model)
        with hooked(model, {name: part_hook(part) for name, part in self.parts.items()}):
            yield model

    def check(self, model):
        """ValueError if the model lacks a module or its widths differ."""
        modules = dict(model.named_modules())
        for name, part in self.parts.items():
            if name not in modules:
                raise ValueError(f"{self.label}: the model has no module {name}")
            if not part.fits(modules[name], model.config.hidden_size):
                shapes = (tuple(part.keys.shape), tuple(part.values.shape))
                raise ValueError(f"{self.label}: {name} has other widths than {shapes[0]} keys and "
                                 f"{shapes[1]} values fit")

    def save(self, path):
        """Write a safetensors file: tensors by module/field, everything else in the metadata."""
        tensors = {}
        others = {}
        for name, part in self.parts.items():
            others[name] = {"kind": part.kind} | vars(part)
            for key, tensor in _tensors(part).items():
                tensors[f"{name}/{key}"] = tensor
                del others[name][key]
        metadata = {"format": "editcore-patch-1", "info": dict(self.info), "parts": others}
        save_tensors(path, tensors, metadata)


def load(path, device="cpu"):
    """Read the Delta or Patch of a file; FileNotFoundError or ValueError names the file.

    Refused are other formats, and tensors that are not of finite floating-point numbers.
    """
    tensors, metadata = load_tensors(path, device)
    label = str(path)
    _check_file(label, tensors, metadata)
    info = metadata.get("info", {})
    if metadata["format"] == FORMATS[0]:
        return Delta(tensors, info, label=label)
    try:
        parts = {name: _part(name, others, tensors) for name, others in metadata["parts"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{label}: damaged, its parts cannot be read ({error})") from error
    if other := len(tensors) - sum(len(_tensors(part)) for part in parts.values()):
        raise ValueError(f"{label}: damaged, {other} of its tensors belong to no part")
    return Patch(parts, info, label)


def _check_file(label, tensors, metadata):
    """ValueError if what was read of a file is no edit."""
    kind = metadata.get("format")
    if kind not in FORMATS:
        found = f"its format is {kind!r:.60}" if kind else "its metadata names no format"
        raise ValueError(f"{label}: not a file of an edit ({found}, not {' or '.join(FORMATS)})")
    info = metadata.get("info", {})
    if not isinstance(info, dict):
        raise ValueError(f"{label}: its info is not a JSON object, but {info!r:.60}")
    for name, wanted in INFO.items():
        if not isinstance(info.get(name, wanted()), wanted):
            raise ValueError(f"{label}: its {name} is {info[name]!r:.60}, but must be "
                             f"{wanted.__name__}")
    if not tensors:
        raise ValueError(f"{label}: no tensors in it")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{label}: {name} is of {dtype}, not of floating-point numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{label}: {name} has entries that are NaN or infinite")


def added(weight, change):
    """Return weight + change, summed in float32 or better, in the weight's dtype and place."""
    change = dense(change)
    wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
    return (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype)


def oriented(left, right, module):
    """Return W += left @ right (left (d, r), right (r, m)) as `module` stores its weight."""
    return LowRank(right.T, left.T) if is_input_first(module) else LowRank(left, right)


def part_hook(part):
    """Return a forward hook that gives a part's output for the module's."""
    def hook(_, args, output):
        if isinstance(output, tuple):
            return (part.output(args[0], output[0]), *output[1:])
        return part.output(args[0], output)

    return hook


def _part(name, others, tensors):
    """The part of one module from its metadata and the file's tensors."""
    kind = pkgutil.resolve_name(PARTS[others["kind"]])
    values = {key: tuple(value) for key, value in others.items() if key != "kind"}
    missing = {part_field.name for part_field in fields(kind)} - values.keys()
    return kind(**values, **{key: tensors[f"{name}/{key}"] for key in missing})


def _listed(edit, tensors):
    """One line about a Delta or Patch: names, shapes and norms."""
    parts = [f"{name} {tuple(tensor.shape)} norm {edit.norm(name):.4g}"
             for name, tensor in tensors.items()]
    return f"{type(edit).__name__}({', '.join(parts)})"


def _joined(a, b, add):
    """The items of two dicts; a name in both has the sum of its two values."""
    return a | b | {name: add(a[name], b[name]) for name in a.keys() & b.keys()}


def _tensors(change):
    """The tensors of a LowRank or a part by field, or of a tensor."""
    values = {"": change} if torch.is_tensor(change) else vars(change)
    return {key: value for key, value in values.items() if torch.is_tensor(value)}


def _is_finite(change):
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(change).values())


def _sum(a, b):
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        joined = LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 0))
        return joined if joined.saves else joined.dense()
    return dense(a) + dense(b)


def _norm(changes, name):
    changes = changes.values() if name is None else [changes[name]]
    return sum(map(_squared_norm, changes)) ** 0.5


def _squared_norm(change):
    if not isinstance(change, LowRank):
        return change.double().square().sum().item()
    left = change.left.double()
    right = change.right.double()
    return max(0.0, ((left.T @ left) * (right @ right.T)).sum().item())
