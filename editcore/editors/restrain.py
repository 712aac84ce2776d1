"""An update or a sum of updates in; a milder one out: RECT, PRUNE and the norm anchor, as pure functions."""

from dataclasses import replace

import torch


def rect(change, weight, keep):
    """The `keep` share of entries of `change` (as `weight` shaped) that are largest against the weight, the rest 0.

    RECT (arXiv:2401.04700): the size of an entry is |ΔW_ij / W_ij|. Ties at the limit are kept. keep 1 changes nothing.
    """
    if keep >= 1:
        return change
    size = (change.double() / weight.double()).abs().nan_to_num(nan=0.0, posinf=torch.inf)
    count = max(1, round(keep * size.numel()))
    limit = size.flatten().kthvalue(size.numel() - count + 1).values
    return torch.where(size >= limit, change, torch.zeros_like(change))


def prune(change, weight, base):
    """The total `change` of `weight` with its singular values restrained (PRUNE, arXiv:2405.16821).

    With s the largest singular value of the unedited weight, those of the change above s become
    s + log_base(σ / s); the others stay. The result belongs on the *unedited* weight: adding it to the edited one, as
    some public code does, applies the edits twice. Shapes as given; computed in float64.
    """
    limit = torch.linalg.matrix_norm(weight.double(), ord=2)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    if not (values > limit).any():
        return change
    mild = torch.where(values > limit, limit + torch.log(values / limit) / torch.log(torch.tensor(base).double()),
                       values)
    return ((left * mild) @ right).to(change.dtype)


def anchored(values, norm):
    """The TargetValues with every v* = h0 + δ rescaled to `norm`, (n,) or a float: its direction kept (NAS)."""
    target = values.h0 + values.delta
    norm = torch.as_tensor(norm, dtype=target.dtype, device=target.device).expand(len(target))
    return replace(values, delta=target * (norm / target.norm(dim=1))[:, None] - values.h0)
