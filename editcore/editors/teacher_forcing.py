"""Lay facts out as padded rows that carry their targets' tokens, for losses read token by token."""

from dataclasses import dataclass

import torch

from editcore.model import max_length
from editcore.tokens import check_lengths, encode_pairs, pad


@dataclass(frozen=True)
class Batch:
    """n rows: prompt and all target tokens but the last."""

    ids: torch.Tensor       # (n, T) right-padded
    mask: torch.Tensor      # (n, T)
    begin: torch.Tensor     # (n,) last prompt token, which predicts the first target token
    offsets: torch.Tensor   # (n, s) from there to what predicts each target token; last repeated
    targets: torch.Tensor   # (n, s) target tokens; the last repeated
    weights: torch.Tensor   # (n, s) 1 / target tokens; 0 where one is repeated

    def rows(self, index):
        """Return the same for some of the rows (index: int64 or bool tensor)."""
        return Batch(*(value[index] for value in vars(self).values()))


def encode_batch(model, tok, facts):
    """Return the Batch of facts; ValueError names a record that is too long for the model."""
    labels = [f"record {fact.case_id}" for fact in facts]
    pairs = encode_pairs(tok, [(fact.text, fact.target_new) for fact in facts], labels)
    targets = [target for _, target in pairs]
    rows = [prompt + target[:-1] for prompt, target in pairs]
    check_lengths(rows, labels, max_length(model))
    device = next(model.parameters()).device
    longest = max(map(len, targets))
    sizes = torch.tensor([len(target) for target in targets])[:, None]
    steps = torch.arange(longest)
    padded, _ = pad([target + target[-1:] * (longest - len(target)) for target in targets])
    begin = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])
    weights = (steps < sizes) / sizes.double()
    parts = (begin, torch.minimum(steps, sizes - 1), padded, weights)
    return Batch(*pad(rows, device=device), *(part.to(device) for part in parts))


def nll(logits, batch):
    """Return (n,) mean-token -log P of the batch's targets, in nats, of logits (n, s, V)."""
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(),
                                             reduction="none")
    return (each.view(batch.targets.shape) * batch.weights.to(each.dtype)).sum(1)


def check_finite(loss, facts, step):
    """ValueError that names the first of the facts whose loss (n,) is not finite."""
    bad = (~torch.isfinite(loss)).nonzero()
    if len(bad):
        case_id = facts[int(bad[0])].case_id
        raise ValueError(f"record {case_id}: the loss is not finite at step {step}")
