"""A model and several Deltas in; the model out as many models at once: each row of a batch sees one Delta's weights.

Runs of one model differ in a few linear maps only. All else is computed for their rows together:

    weights = versions(model, totals)               # the changed maps of every version
    with rows(model, weights, owner):               # row b of every batch in the block belongs to version owner[b]
        run(model, input_ids=ids, attention_mask=mask)
"""

import contextlib

import torch
from torch.nn.functional import linear

from editcore.delta import LowRank, added
from editcore.model import is_input_first


def versions(model, totals):
    """For each Delta of `totals`, {module name: (weight, bias or None)} of the linear maps that any of them changes.

    Weights are what `Delta.applied` gives the model, in its dtype and orientation. ValueError as `Delta.check`; also if
    a changed parameter belongs to no linear map.
    """
    names = sorted({parameter for total in totals for parameter in total.changes})
    modules = sorted({name.rpartition(".")[0] for name in names})
    for total in totals:
        total.check(model)
    for name in modules:
        if model.get_submodule(name).weight.ndim != 2:
            raise ValueError(f"versions: {name} is not a linear map")
    return [{name: (_now(model, total, name + ".weight"), _now(model, total, name + ".bias")) for name in modules}
            for total in totals]


def _now(model, total, name):
    """The parameter with the Delta added; None if the model has none of that name."""
    module, _, kind = name.rpartition(".")
    weight = getattr(model.get_submodule(module), kind, None)
    if weight is None or name not in total.changes:
        return None if weight is None else weight.detach()
    return added(weight.detach(), total.changes[name])


@contextlib.contextmanager
def rows(model, weights, owner):
    """In the block, row b of every batch sees the linear maps weights[owner[b]]; owner: a list of ints, one a row."""
    def hook(module, args, output, name):
        out = torch.empty_like(output)
        for version in sorted(set(owner)):
            index = torch.tensor([row for row, one in enumerate(owner) if one == version], device=output.device)
            out[index] = _apply(module, args[0][index], *weights[version][name])
        return out

    with _hooks(model, list(weights[0]) if weights else [], hook):      # None: the model as it is
        yield


@contextlib.contextmanager
def added_rows(model, name, changes, owner):
    """In the block, row b of every batch sees the named linear map's weight plus changes[owner[b]].

    changes: LowRank or tensors in the stored orientation, or None for no change.
    """
    same = all(isinstance(one, LowRank) and min(one.left.shape[1], one.right.shape[0]) == 1 for one in changes)

    def hook(module, args, output, _):
        first = is_input_first(module)
        if same:    # rank one each: two vectors a row
            sides = [(one.left[:, 0], one.right[0]) for one in (changes[row] for row in owner)]
            source, target = (torch.stack(side).to(output.dtype) for side in zip(*(s if first else s[::-1]
                                                                                   for s in sides)))
            return output + (args[0] * source[:, None]).sum(-1, keepdim=True) * target[:, None]
        out = output.clone()
        for group in sorted(set(owner)):
            if changes[group] is not None:
                index = torch.tensor([row for row, one in enumerate(owner) if one == group], device=output.device)
                out[index] += _product(args[0][index], changes[group], first).to(output.dtype)
        return out

    with _hooks(model, [name], hook):
        yield


@contextlib.contextmanager
def _hooks(model, names, hook):
    """`hook(module, args, output, name)` on the named modules, taken off at the end."""
    handles = [model.get_submodule(name).register_forward_hook(
        lambda module, args, output, name=name: hook(module, args, output, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apply(module, x, weight, bias):
    """The linear map of x (B, T, in), computed as the module itself does."""
    if not is_input_first(module):
        return linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], -1)


def _product(x, change, first):
    """x (B, T, in) times a change in the stored orientation."""
    if isinstance(change, LowRank):
        a, b = (change.left, change.right) if first else (change.right.T, change.left.T)
        return (x @ a.to(x.dtype)) @ b.to(x.dtype)
    return x @ (change if first else change.T).to(x.dtype)
