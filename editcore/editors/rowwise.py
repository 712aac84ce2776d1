"""Run several edited models in one pass: each row of a batch sees the weights of its own.

The models differ in a few linear maps only; everything else is computed for all rows at once:

    maps = edited_maps(model, deltas)
    with each_row(model, maps, owners):         # row b of every batch sees deltas[owners[b]]
        run(model, input_ids=ids, attention_mask=mask)
"""

from functools import partial

import torch
from torch.nn.functional import linear

from editcore.delta import LowRank, added
from editcore.hooks import hooked
from editcore.model import is_input_first


def edited_maps(model, deltas):
    """Return for each Delta {module name: (weight, bias or None)} of all maps that any changes."""
    names = set()
    for delta in deltas:
        delta.check(model)
        names |= {parameter.rpartition(".")[0] for parameter in delta.changes}
    for name in names:
        if model.get_submodule(name).weight.ndim != 2:
            raise ValueError(f"{name} is not a linear map")
    return [{name: (_edited(model, delta, name, "weight"), _edited(model, delta, name, "bias"))
             for name in sorted(names)} for delta in deltas]


def each_row(model, maps, owners):
    """In the block, row b of every batch sees the linear maps of maps[owners[b]], if any."""
    def hook(name, module, args, output):
        new = torch.empty_like(output)
        for owner, rows in _rows_by_owner(owners, output.device):
            new[rows] = _apply(module, args[0][rows], *maps[owner][name])
        return new

    return hooked(model, {name: partial(hook, name) for name in (maps[0] if maps else ())})


def each_row_added(model, name, changes, owners):
    """In the block, row b of every batch sees the named map's weight + changes[owners[b]]."""
    rank_one = all(isinstance(change, LowRank) and change.left.shape[1] == 1 for change in changes)

    def hook(module, args, output):
        x = args[0]
        if rank_one:    # two vectors per row
            pairs = [_factors(module, changes[owner]) for owner in owners]
            source, target = (torch.stack(side).to(output.dtype) for side in zip(*pairs))
            return output + (x * source.mT).sum(-1, keepdim=True) * target
        new = output.clone()
        for owner, rows in _rows_by_owner(owners, output.device):
            new[rows] += _product(module, x[rows], changes[owner]).to(output.dtype)
        return new

    return hooked(model, {name: hook})


def _edited(model, delta, name, kind):
    """The parameter with the Delta added; None if the module has none of this kind."""
    weight = getattr(model.get_submodule(name), kind, None)
    if weight is None:
        return None
    change = delta.changes.get(f"{name}.{kind}")
    return weight.detach() if change is None else added(weight.detach(), change)


def _rows_by_owner(owners, device):
    """(owner, indices of its rows), owner by owner."""
    owners = torch.tensor(owners, device=device)
    return [(owner, (owners == owner).nonzero()[:, 0]) for owner in owners.unique().tolist()]


def _apply(module, x, weight, bias):
    """The linear map of x (B, T, in), computed as the module itself does."""
    if not is_input_first(module):
        return linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], -1)


def _factors(module, change):
    """(source (in, r), target (r, out)) of a LowRank change: x -> (x @ source) @ target."""
    if is_input_first(module):
        return change.left, change.right
    return change.right.T, change.left.T


def _product(module, x, change):
    """x (B, T, in) times a change in the stored orientation."""
    if isinstance(change, LowRank):
        source, target = _factors(module, change)
        return (x @ source.to(x.dtype)) @ target.to(x.dtype)
    return x @ (change if is_input_first(module) else change.T).to(x.dtype)
