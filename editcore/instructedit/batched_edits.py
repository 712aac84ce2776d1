"""Edits and the owner of every row in; the model, in which each row of a batch sees its owner's edit, out.

The sibling of `versions` for many small edits of one model: a change of few ranks is never added to a weight but
applied to the row, so that a hundred edits cost little more than one.

    with each_row(model, edits, owner):                 # row b of every batch sees edits[owner[b]]
        model(input_ids=ids)
"""

import contextlib

import torch

from editcore.delta import LowRank, Patch
from editcore.model import is_input_first


@contextlib.contextmanager
def each_row(model, edits, owner, asked=None):
    """In the block, row b of every batch sees edits[owner[b]]: a Delta, a Patch, or None for the model as it is.

    asked (B, T) bool: where codebooks are looked up, read from the right; None: at every position. Deltas work as if
    added to the weights in float32 or better, up to rounding. ValueError as `Delta.check` and `Patch.check`.
    """
    first = {}      # equal rows are worked on together: one edit may be that of all
    owner = [first.setdefault(id(edits[one]), one) for one in owner]
    places = {}     # module -> [(owner, how it works there)]
    for one in sorted(set(owner)):
        for name, work in _works(model, edits[one]).items():
            places.setdefault(name, []).append((one, work))
    handles = []
    try:
        for name, works in places.items():
            handles.append(model.get_submodule(name).register_forward_hook(_hook(model, name, works, (owner, asked))))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _works(model, edit):
    """{module: its part of the Patch, or {"weight": change, "bias": change} of the Delta}; checked."""
    if edit is None:
        return {}
    edit.check(model)
    if isinstance(edit, Patch):
        return edit.parts
    found = {}
    for parameter, change in edit.changes.items():
        name, _, kind = parameter.rpartition(".")
        if kind == "weight" and model.get_submodule(name).weight.ndim != 2:
            raise ValueError(f"rowwise: {name} is not a linear map")
        found.setdefault(name, {})[kind] = change
    return found


def _hook(model, name, works, rows):
    """The forward hook of one module; rows = (owner of every row, asked)."""
    owner, asked = rows
    device, first = next(model.parameters()).device, is_input_first(model.get_submodule(name))
    low = {one: _sides(work["weight"], first) for one, work in works
           if isinstance(work, dict) and isinstance(work.get("weight"), LowRank)}
    stacked = _stacked(list(low.values())) if low else None
    number = {one: place for place, one in enumerate(low)}
    taken = torch.tensor([b for b, one in enumerate(owner) if one in low], dtype=torch.long, device=device)
    pick = torch.tensor([number[one] for one in owner if one in low], dtype=torch.long, device=device)
    others = [(torch.tensor([b for b, other in enumerate(owner) if other == one], device=device), work)
              for one, work in works]

    def hook(_, args, output):
        x, y = args[0], output[0] if isinstance(output, tuple) else output
        out = y
        if stacked:
            source, target = (side[pick] for side in stacked)
            change = torch.bmm(torch.bmm(x[taken].to(source.dtype), source), target)
            out = out.index_add(0, taken, change.to(out.dtype))
        for index, work in others:
            made = _applied(work, (x[index], out[index]), first, _mask(asked, index, x))
            out = out if made is None else out.index_copy(0, index, made.to(out.dtype))
        return (out, *output[1:]) if isinstance(output, tuple) else out
    return hook


def _mask(asked, index, x):
    """The rows `index` of asked, as wide as x (B, T, in)."""
    if asked is None:
        return None
    mask = asked.to(x.device)[index][:, -x.shape[1]:]
    return torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0))


def _applied(work, rows, first, mask):
    """What one edit makes of its rows (x, y); None if a stacked product has done it already."""
    x, y = rows
    if not isinstance(work, dict):
        return work.output(x, y, mask)
    dense = {kind: change for kind, change in work.items() if not isinstance(change, LowRank)}
    if not dense:
        return None
    if "weight" in dense:
        change = dense["weight"].to(x.device)
        y = y + (x.to(change.dtype) @ (change if first else change.T)).to(y.dtype)
    return y + dense["bias"].to(x.device, y.dtype) if "bias" in dense else y


def _sides(change, first):
    """(source (in, r), target (r, out)) of a LowRank change in the stored orientation: x -> (x @ source) @ target."""
    return (change.left, change.right) if first else (change.right.T, change.left.T)


def _stacked(pairs):
    """(k, in, R) and (k, R, out) of k pairs of `_sides`, filled up with zeros to the largest rank R."""
    most = max(source.shape[1] for source, _ in pairs)
    fill = torch.nn.functional.pad
    return (torch.stack([fill(source, (0, most - source.shape[1])) for source, _ in pairs]),
            torch.stack([fill(target, (0, 0, 0, most - target.shape[0])) for _, target in pairs]))
