"""Facts in; a codebook at one linear map that answers their prompts, and nothing else, out (GRACE, arXiv:2211.11031).

The key of a fact is the map's input at the prompt's last token, its value a vector that takes the place of the map's
output there, trained until the target follows. Keys do not depend on what a codebook at the same map already holds, so
`total + edit(...)` is one long codebook. Where the codebook is looked up afterwards: see `Patch.applied`.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch

from editcore.delta import Patch
from editcore.editors.target_value import adam
from editcore.editors.teacher_forcing import finite, forced, nll
from editcore.hooks import capture, replaced
from editcore.model import batch_tokens, name_of
from editcore.patch import Codebook
from editcore.suffix import fused, head, resume, start
from editcore.tokens import batches


@dataclass(frozen=True)
class Settings:
    """Settings of GRACE; layer and part have no default."""

    layer: int                  # the layer with the codebook
    part: Literal["mlp_in", "mlp_out"]     # its linear map: "mlp_in" or "mlp_out"
    radius: float = 1.0         # ε of a new entry that stands alone, in units of the map's input
    lr: float = 1.0             # of Adam on the value
    steps: int = 100            # of Adam, all of them taken
    begin: Literal["own", "random"] = "own"     # value before training: the map's output, or in [0, 1)
    seed: int = 0               # of random values; each fact draws its own


PAPER = {   # published settings by model
    "gpt2-xl": {"layer": 35, "part": "mlp_in"},
    "llama-2-7b": {"layer": 27, "part": "mlp_out"},
    "pocket": {"layer": 3, "part": "mlp_in"},       # not published: the same map at the same depth as in gpt2-xl
}


def prepare(model, tok, config, given):
    """Nothing but a check: GRACE needs neither contexts nor statistics. ValueError if the model lacks the layer."""
    name_of(model, config.part, config.layer)


def edit(model, tok, facts, config, prepared):
    """A Patch of all facts, inserted in their order; ValueError names a record too long or with a broken loss."""
    return edit_groups(model, tok, [facts], config, prepared=[None])[0]


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """One Patch per group of facts, each of its own model; without `current` (what each model carries already) the
    values of all facts are trained together."""
    if current is not None:
        patches = []
        for group, total in zip(groups, current, strict=True):
            with total.applied(model):
                patches.append(edit(model, tok, group, config, None))
        return patches
    facts = [fact for group in groups for fact in group]
    rows, entries = forced(model, tok, facts), [None] * len(facts)
    with fused(model):
        for batch in batches(rows.mask.sum(1).tolist(), 4 * batch_tokens(rows.ids.device)):
            index = torch.tensor(batch, device=rows.ids.device)
            for place, entry in zip(batch, zip(*trained(model, rows.rows(index), [facts[i] for i in batch], config))):
                entries[place] = entry
    return [_patch(model, [entries.pop(0) for _ in group], group, config) for group in groups]


def trained(model, rows, facts, config):
    """(keys (n, in), values (n, out), loss (n,) before the last step) of facts given as Forced rows, each on its own.

    Values are trained with Adam in float32 or better on the mean-token NLL of the target; only what lies above the map,
    from the prompt's last token on, is run.
    """
    name = name_of(model, config.part, config.layer)
    state = start(model, rows.ids, rows.mask, rows.begin, config.layer - 1, rows.offsets)
    with torch.no_grad(), capture(model, [name], "input", stop=False) as x, capture(model, [name], stop=False) as y:
        resume(model, state, state.hidden)
    wide = torch.promote_types(y[name].dtype, torch.float32)
    keys, values = x[name][:, 0].to(wide), _first(y[name][:, 0].to(wide), facts, config)
    mean, square = torch.zeros_like(values), torch.zeros_like(values)
    every, loss = torch.arange(len(values), device=values.device), torch.full((len(values),), torch.nan)
    for step in range(config.steps):
        live = values.clone().requires_grad_()
        with replaced(model, name, lambda h, live=live: torch.cat([live[:, None].to(h.dtype), h[:, 1:]], 1)):
            loss = nll(head(model, resume(model, state, state.hidden)), rows.targets, rows.weights)
        finite(loss, facts, step + 1)
        (gradient,) = torch.autograd.grad(loss.sum(), live)
        adam(values, mean, square, every, (gradient, step + 1, config.lr))
    return keys, values, loss.detach()


def _first(own, facts, config):
    """(n, out) values before training."""
    if config.begin == "own":
        return own.clone()
    draws = [torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {fact.case_id}".encode())) for fact in facts]
    return torch.stack([torch.rand(own.shape[1], generator=draw) for draw in draws]).to(own)


def _patch(model, entries, group, config):
    """The Patch of a group's entries (key, value, loss)."""
    book = None
    for (key, value, _), fact in zip(entries, group, strict=True):
        one = Codebook(key[None], value[None], key.new_tensor([config.radius]), (fact.target_new.strip(),))
        book = one if book is None else book + one
    info = {"editor": "grace", "nll": [loss.item() for *_, loss in entries]}
    return Patch({name_of(model, config.part, config.layer): book}, info)
