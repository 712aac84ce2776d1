"""Give each row of a batch its own edit of the model, so that many edits share a forward pass.

    with each_row(model, edits, owner):         # row b of every batch sees edits[owner[b]]
        model(input_ids=ids)

No edit is added to a weight: its part of a module's output is added to the rows that own it.
"""

import contextlib
from functools import partial

import torch

from editcore.delta import LowRank, Patch
from editcore.hooks import hooked
from editcore.model import is_input_first, layout, n_layers


@contextlib.contextmanager
def each_row(model, edits, owner, prompt_ends=None):
    """In the block, row b of every batch sees edits[owner[b]]: a Delta, a Patch, or None.

    prompt_ends (B, T) bool: where codebooks are looked up, read from the right; None: everywhere.
    Deltas work as if added to the weights in float32 or better, up to rounding. ValueError as
    `Delta.check` and `Patch.check`.
    """
    device = next(model.parameters()).device
    rows = {}       # id of an edit -> (the edit, its rows): one edit may be that of several owners
    for row, index in enumerate(owner):
        if edits[index] is not None:
            rows.setdefault(id(edits[index]), (edits[index], []))[1].append(row)
    works = {}      # module -> [(rows, what an edit does there)]
    for edit, owned in rows.values():
        for name, part in _parts(model, edit).items():
            works.setdefault(name, []).append((torch.tensor(owned, device=device), part))
    with hooked(model, {name: partial(_change, work, prompt_ends) for name, work in works.items()}):
        yield model


def lowest_block(model, edits):
    """The lowest block that an edit changes; 0 for what lies in no block, L without an edit."""
    begin = layout(model).block.partition("{}")[0]
    names = [name for edit in edits if edit is not None for name in _parts(model, edit)]
    return min([int(name.removeprefix(begin).partition(".")[0]) if name.startswith(begin) else 0
                for name in names], default=n_layers(model))


def _parts(model, edit):
    """{module: its part of a Patch, or {"weight": change, "bias": change} of a Delta}, checked."""
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


def _change(works, prompt_ends, module, args, output):
    """Forward hook: the module's output with every row's edit."""
    x = args[0]
    y = output[0] if isinstance(output, tuple) else output
    changed = y.clone()
    for rows, part in works:
        if isinstance(part, dict):
            changed[rows] += _added(part, x[rows], is_input_first(module)).to(y.dtype)
        else:
            changed[rows] = part.output(x[rows], y[rows], _mask(prompt_ends, rows, x)).to(y.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _added(part, x, input_first):
    """What changes of weight and bias add to the output for inputs x (R, T, in)."""
    added = 0
    if "weight" in part:
        change = part["weight"]
        sides = (change.left, change.right) if isinstance(change, LowRank) else (change,)
        added = x
        for side in sides if input_first else [side.T for side in reversed(sides)]:
            added = added.to(side.dtype) @ side.to(x.device)
    return added + part["bias"].to(x.device) if "bias" in part else added


def _mask(prompt_ends, rows, x):
    """The rows of prompt_ends, as wide as x (B, T, in)."""
    if prompt_ends is None:
        return None
    mask = prompt_ends.to(x.device)[rows][:, -x.shape[1]:]
    return torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0))
