"""Prompts and their targets in; padded rows that carry the targets' tokens, and what a model makes of them, out."""

from dataclasses import dataclass

import torch

from editcore.model import max_length, n_layers, name_of
from editcore.tokens import check_lengths, encode, pad, target_ids


@dataclass(frozen=True)
class Forced:
    """n teacher-forced rows: prompt and all target tokens but the last."""

    ids: torch.Tensor       # (n, T) right-padded
    mask: torch.Tensor      # (n, T)
    begin: torch.Tensor     # (n,) last prompt token, which predicts the first target token
    offsets: torch.Tensor   # (n, s) from there, to the position that predicts each target token; the last repeated
    targets: torch.Tensor   # (n, s) target tokens; the last repeated
    weights: torch.Tensor   # (n, s) 1 / target tokens; 0 where one is repeated

    def rows(self, index):
        """The same for some of the rows (index: int64 or bool tensor)."""
        return Forced(*(value[index] for value in vars(self).values()))


def counted(model, layers):
    """The layers as numbers from 0, of which -1 is the last; ValueError if there are none or the model lacks one."""
    if not layers:
        raise ValueError("layers: at least one is needed")
    found = tuple(layer + n_layers(model) if layer < 0 else layer for layer in layers)
    for layer in found:
        name_of(model, "block", layer)
    return found


def forced(model, tok, facts):
    """Forced of facts (anything with case_id, text and target_new); ValueError names one too long for the model."""
    targets = [target_ids(tok, fact.target_new) for fact in facts]
    prompts = encode(tok, [fact.text for fact in facts])
    rows = [prompt + target[:-1] for prompt, target in zip(prompts, targets)]
    check_lengths(rows, [f"record {fact.case_id}" for fact in facts], max_length(model))
    device, most = next(model.parameters()).device, max(map(len, targets))
    offsets = torch.tensor([[min(t, len(target) - 1) for t in range(most)] for target in targets])
    sizes = torch.tensor([len(target) for target in targets])
    ids = torch.tensor([[target[t] for t in row] for target, row in zip(targets, offsets.tolist())])
    weights = (torch.arange(most) < sizes[:, None]) / sizes[:, None].double()
    begin = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return Forced(*pad(rows, device=device), *(part.to(device) for part in (begin, offsets, ids, weights)))


def nll(logits, targets, weights):
    """(n,) mean-token -log P of targets (n, s), in nats, of logits (n, s, V); weights as in Forced."""
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each.view(targets.shape) * weights.to(each.dtype)).sum(1)


def finite(loss, facts, step):
    """ValueError that names the first of the facts whose loss (n,) is not finite."""
    bad = ~torch.isfinite(loss)
    if bad.any():
        raise ValueError(f"record {facts[int(bad.nonzero()[0])].case_id}: the loss is not finite at step {step}")
