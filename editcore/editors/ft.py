"""Facts in; the change of one layer's MLP output projection by constrained fine-tuning out (FT-L, arXiv:2012.00363)."""

from dataclasses import dataclass

import torch

from editcore.delta import Delta
from editcore.editors.target_value import adam
from editcore.hooks import capture
from editcore.model import is_input_first, max_length, module_of, name_of
from editcore.suffix import fused, head, resume, start
from editcore.tokens import check_lengths, encode, pad, target_ids


@dataclass(frozen=True)
class Settings:
    """Settings of FT-L; epsilon has no default, the rest is as published."""

    epsilon: float                  # every weight stays within ± epsilon of its value at the start of the edit
    layer: int = 0                  # the edited layer: its MLP output projection, weight and bias
    lr: float = 5e-4                # of Adam
    steps: int = 25                 # most steps
    stop_loss: float = 0.01         # done once the loss is below
    last_position: bool = False     # read all target tokens at the last prompt position, as the published code does


PAPER = {   # published settings by model
    "gpt2-medium": {"epsilon": 2e-3},
    "gpt2-large": {"epsilon": 1e-3},
    "gpt2-xl": {"epsilon": 5e-4},
    "gpt-j-6b": {"epsilon": 5e-5},
    "pocket": {"epsilon": 0.02, "lr": 5e-3},
}


@dataclass(frozen=True)
class Rows:
    """Facts as padded rows and flat lists of the predictions that the loss reads."""

    ids: torch.Tensor       # (n, T)
    mask: torch.Tensor      # (n, T)
    facts: torch.Tensor     # (M,) which row
    columns: torch.Tensor   # (M,) which of the row's wanted positions
    targets: torch.Tensor   # (M,) target token
    weights: torch.Tensor   # (M,) 1 / (target tokens of the fact * facts of its group)
    wanted: torch.Tensor    # (n, s) positions that are read in each row
    owner: torch.Tensor     # (n,) the row's group


def prepare(model, tok, config, given):
    """Nothing but a check: FT needs neither contexts nor statistics. ValueError if the model lacks the layer."""
    name_of(model, "mlp_out", config.layer)


def edit(model, tok, facts, config, prepared):
    """The Delta that lowers the mean loss of the facts."""
    return _tuned(model, rows_of(model, tok, [facts], config.last_position), [facts], config)[0]


def rows_of(model, tok, groups, last_position):
    """The Rows of groups of facts; ValueError names a record that is too long for the model."""
    rows, entries, wanted, facts = [], [], [], [fact for group in groups for fact in group]
    targets = [target_ids(tok, fact.target_new) for fact in facts]
    most = 1 if last_position else max(map(len, targets))
    for index, (prompt, target) in enumerate(zip(encode(tok, [fact.text for fact in facts]), targets)):
        rows.append(prompt if last_position else prompt + target[:-1])
        entries += [(index, 0 if last_position else t, token, 1 / len(target)) for t, token in enumerate(target)]
        wanted.append([min(len(prompt) - 1 + t, len(rows[-1]) - 1) for t in range(most)])
    check_lengths(rows, [f"record {fact.case_id}" for fact in facts], max_length(model))
    device = next(model.parameters()).device
    *integers, weights = zip(*entries)
    owner = torch.tensor([index for index, group in enumerate(groups) for _ in group], device=device)
    weights = torch.tensor(weights, dtype=torch.float64, device=device)
    weights = weights / owner.bincount()[owner][list(integers[0])]
    return Rows(*pad(rows, device=device), *(torch.tensor(values, device=device) for values in integers), weights,
                torch.tensor(wanted, device=device), owner)


def _tuned(model, rows, groups, config):
    """A Delta a group, of Adam on D = ΔW and e = Δb.

    The layer's output is its state plus k D + e with k the layer's keys, so only the blocks above it run again.
    """
    name, module = name_of(model, "mlp_out", config.layer), module_of(model, "mlp_out", config.layer)
    with capture(model, [name], "input", stop=False) as inputs:
        state = start(model, rows.ids, rows.mask, torch.zeros_like(rows.ids[:, 0]), config.layer, rows.wanted)
    wide, d = torch.promote_types(module.weight.dtype, torch.float32), state.hidden.shape[-1]
    shapes = [(inputs[name].shape[-1], d)] + [(d,)] * (module.bias is not None)
    values = [torch.zeros(len(groups), *shape, dtype=wide, device=rows.ids.device) for shape in shapes]
    with fused(model):
        _descend(model, (state, inputs[name], rows), values, [group[0].case_id for group in groups], config)
    names, out = [name + ".weight", name + ".bias"], []
    for group in range(len(groups)):
        parts = [value[group] for value in values]
        parts[0] = parts[0] if is_input_first(module) else parts[0].T.contiguous()
        out.append(Delta(dict(zip(names, parts)), {"editor": "ft"}))
    return out


def _descend(model, given, values, names, config):
    """Run Adam on `values` ([(g, m, d), (g, d)]) in place, each group until its loss is below stop_loss."""
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    state, keys, rows = given
    active = torch.arange(len(values[0]), device=rows.ids.device)
    for step in range(config.steps):
        live = [value[active].requires_grad_() for value in values]
        loss = _loss(model, (state, keys, rows), live)
        going = loss.detach() >= config.stop_loss
        if not torch.isfinite(loss).all():
            raise ValueError(f"record {names[active[~torch.isfinite(loss)][0]]}: the loss is not finite at step "
                             f"{step + 1}")
        if not going.any():
            return
        gradients = torch.autograd.grad(loss.sum(), live)
        for value, (mean, square), gradient in zip(values, moments, gradients, strict=True):
            adam(value, mean, square, active[going], (gradient[going], step + 1, config.lr))
            value.clamp_(-config.epsilon, config.epsilon)
        if not going.all():
            kept = going[rows.owner]
            state, keys, rows, active = state.rows(kept), keys[kept], _kept(rows, kept), active[going]


def _loss(model, given, live):
    """(g,) mean-token NLL of each group of facts with the change `live` in place."""
    state, keys, rows = given
    alone = len(live[0]) == 1       # one group: its change is not copied for every row
    change = keys.to(live[0].dtype) @ (live[0][0] if alone else live[0][rows.owner])
    for bias in live[1:]:
        change = change + (bias[0] if alone else bias[rows.owner][:, None])
    final = resume(model, state, state.hidden + change.to(state.hidden.dtype))
    logits = head(model, final[rows.facts, rows.columns])
    each_token = torch.nn.functional.cross_entropy(logits, rows.targets, reduction="none")
    losses = torch.zeros(len(live[0]), dtype=logits.dtype, device=logits.device)
    return losses.index_add(0, rows.owner[rows.facts], each_token * rows.weights.to(logits.dtype))


def _kept(rows, going):
    """The Rows of the facts in `going` (n,) bool; groups without facts are closed up."""
    inside, number = going[rows.facts], going.cumsum(0) - 1
    owner = rows.owner[going].unique(return_inverse=True)[1]
    return Rows(rows.ids[going], rows.mask[going], number[rows.facts[inside]],
                *(part[inside] for part in (rows.columns, rows.targets, rows.weights)), rows.wanted[going], owner)
