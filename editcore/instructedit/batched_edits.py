"""Give each row of a batch its own edit of the model, so that many edits share a forward pass.

    with each_row(model, edits, owner):         # row b of every batch sees edits[owner[b]]
        model(input_ids=ids)

A low-rank change is never added to a weight but applied to the rows: a hundred edits cost little
more than one.
"""

import contextlib
from functools import partial

import torch

from editcore.delta import LowRank, Patch
from editcore.hooks import hooked
from editcore.model import is_input_first


@contextlib.contextmanager
def each_row(model, edits, owner, prompt_ends=None):
    """In the block, row b of every batch sees edits[owner[b]]: a Delta, a Patch, or None.

    prompt_ends (B, T) bool: where codebooks are looked up, read from the right; None: everywhere.
    Deltas work as if added to the weights in float32 or better, up to rounding. ValueError as
    `Delta.check` and `Patch.check`.
    """
    first = {}      # rows of one edit are worked on together, whoever owns them
    owner = [first.setdefault(id(edits[index]), index) for index in owner]
    parts = {}      # module -> {owner: what its edit does there}
    for index in sorted(set(owner)):
        for name, part in _parts(model, edits[index]).items():
            parts.setdefault(name, {})[index] = part
    hooks = {name: partial(_change, _Rows(model.get_submodule(name), found, owner), prompt_ends)
             for name, found in parts.items()}
    with hooked(model, hooks):
        yield model


def _parts(model, edit):
    """{module: its part of a Patch, or {"weight": change, "bias": change} of a Delta}, checked."""
    if edit is None:
        return {}
    edit.check(model)
    if isinstance(edit, Patch):
        return edit.parts
    parts = {}
    for parameter, change in edit.changes.items():
        name, _, kind = parameter.rpartition(".")
        if kind == "weight" and model.get_submodule(name).weight.ndim != 2:
            raise ValueError(f"each_row: {name} is not a linear map")
        parts.setdefault(name, {})[kind] = change
    return parts


class _Rows:
    """The edits of one module by rows: low-rank ones stacked, others one after another."""

    def __init__(self, module, parts, owner):
        self.input_first = is_input_first(module)
        device = module.weight.device if hasattr(module, "weight") else None
        low = {index: _sides(part["weight"], self.input_first) for index, part in parts.items()
               if isinstance(part, dict) and isinstance(part.get("weight"), LowRank)}
        order = {index: place for place, index in enumerate(low)}
        rows = [row for row, index in enumerate(owner) if index in low]
        self.low_rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.pick = torch.tensor([order[owner[row]] for row in rows], dtype=torch.long,
                                 device=device)
        self.stacked = _stacked(list(low.values())) if low else None
        self.others = []
        for index, part in parts.items():
            rows = [row for row, one in enumerate(owner) if one == index]
            if isinstance(part, dict):
                part = {kind: change for kind, change in part.items()
                        if not isinstance(change, LowRank)}
            if part:
                self.others.append((torch.tensor(rows, device=device), part))


def _change(rows, prompt_ends, module, args, output):
    """Forward hook: the module's output with every row's edit."""
    x = args[0]
    y = output[0] if isinstance(output, tuple) else output
    changed = y
    if rows.stacked:
        source, target = (side[rows.pick] for side in rows.stacked)
        low = torch.bmm(torch.bmm(x[rows.low_rows].to(source.dtype), source), target)
        changed = changed.index_add(0, rows.low_rows, low.to(y.dtype))
    for index, part in rows.others:
        if isinstance(part, dict):
            new = _dense(part, x[index], changed[index], rows.input_first)
        else:
            new = part.output(x[index], changed[index], _mask(prompt_ends, index, x))
        changed = changed.index_copy(0, index, new.to(y.dtype))
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _dense(part, x, y, input_first):
    """y plus what dense changes of weight and bias make of x."""
    if "weight" in part:
        change = part["weight"].to(x.device)
        y = y + (x.to(change.dtype) @ (change if input_first else change.T)).to(y.dtype)
    return y + part["bias"].to(x.device, y.dtype) if "bias" in part else y


def _mask(prompt_ends, index, x):
    """The rows `index` of prompt_ends, as wide as x (B, T, in)."""
    if prompt_ends is None:
        return None
    mask = prompt_ends.to(x.device)[index][:, -x.shape[1]:]
    return torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0))


def _sides(change, input_first):
    """(source (in, r), target (r, out)) of a LowRank change: x -> (x @ source) @ target."""
    if input_first:
        return change.left, change.right
    return change.right.T, change.left.T


def _stacked(sides):
    """(k, in, R) and (k, R, out) of k pairs, filled up with zeros to the largest rank R."""
    most = max(source.shape[1] for source, _ in sides)
    sources = []
    targets = []
    for source, target in sides:
        missing = most - source.shape[1]
        sources.append(torch.nn.functional.pad(source, (0, missing)))
        targets.append(torch.nn.functional.pad(target, (0, 0, 0, missing)))
    return torch.stack(sources), torch.stack(targets)
