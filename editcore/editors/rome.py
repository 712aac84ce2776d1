"""Facts in; ROME's rank-one changes of one MLP output projection out (Meng et al. 2022, arXiv:2202.05262)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from editcore.delta import Delta, oriented
from editcore.editors import prepare as sources
from editcore.editors.restrain import anchored
from editcore.editors.rowwise import versions
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.model import module_of, name_of
from editcore.templates import TemplateGroup


@dataclass(frozen=True)
class Settings:
    """Settings of ROME; without a layer there is no default, the rest is as published."""

    layer: int                          # the edited layer
    steps: int = 20                     # evaluations of the loss; the last one does not step
    lr: float = 0.5                     # of Adam on δ
    stop_loss: float = 0.05             # a fact is done once its loss is below
    early_stop: int = 0                 # ... or the answer was the argmax in every context so often in a row; 0: off
    kl_factor: float = 0.0625           # weight of the KL term
    weight_decay: float = 0.5           # weight of ‖δ‖ / ‖h0‖²
    clamp: float = 4.0                  # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: str = "{} is a"          # prompt of the KL term
    kl_position: Literal["subject", "last"] = "subject"  # token at which it is read there (published: "subject")
    convention: Literal["rome", "r-rome", "p-rome"] = "rome"     # keys of the update (see `update`)
    anchor: int = 0                     # pilot edits to whose mean ‖v*‖ every v* is rescaled; 0: off
    context_groups: tuple = (TemplateGroup(5, 10), TemplateGroup(10, 10))   # sampled context templates
    n_tokens: int = 0                   # tokens of the second moment; 0: all of the texts
    length: int = 512                   # its sequence length


PAPER = {   # published settings by model
    "gpt2-medium": {"layer": 8, "clamp": 3.0},
    "gpt2-large": {"layer": 12},
    "gpt2-xl": {"layer": 17},
    "gpt-j-6b": {"layer": 5},
    "llama-2-7b": {"layer": 5},
    "pocket": {"layer": 0, "lr": 1.0, "steps": 40},
}


def prepare(model, tok, config, given):
    """Prepared context templates and second moment (from the unedited model, once a run)."""
    prepared = sources.prepare(model, tok, (config.layer,), given, config)
    if not config.anchor:
        return prepared
    pilot = sources.pilot(given, config)
    made = encode_facts(model, tok, [pilot], [prepared.contexts], config)
    return replace(prepared, anchor=sources.mean_norm(optimise(model, made, _site(config), config)))


def edit(model, tok, facts, config, prepared):
    """One Delta with all facts, as one update."""
    return edit_groups(model, tok, [facts], config, prepared=[prepared])[0]


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """One Delta per group of facts, each an edit of its own copy of the model, all in the same passes.

    prepared: one per group; current: the Delta that each group's model carries already, None if none does.
    The facts of a group are solved each on top of those before it, as the published code goes through a batch.
    """
    totals = [Delta({}) for _ in groups]
    for turn in range(max(map(len, groups))):
        live = [index for index, group in enumerate(groups) if turn < len(group)]
        now = [totals[i] if current is None else current[i] + totals[i] for i in live]
        made = encode_facts(model, tok, [[groups[i][turn]] for i in live], [prepared[i].contexts for i in live], config)
        own = versions(model, now) if current is not None or turn else None
        values = optimise(model, made, _site(config), config, own)
        if config.anchor:
            values = anchored(values, torch.tensor([prepared[i].anchor for i in live]))
        deltas = _deltas(model, values, prepared[live[0]].moments, config)
        for index, delta in zip(live, deltas):
            totals[index] = Delta((totals[index] + delta).changes, _joined(totals[index].info, delta.info))
    return totals


def _site(config):
    return EditSite(config.layer, "mlp_out", config.layer)


def _deltas(model, values, stats, config):
    """The rank-one Delta of every fact. ValueError names a record whose update is not finite."""
    module, name = module_of(model, "mlp_out", config.layer), name_of(model, "mlp_out", config.layer)
    left, right = update(values, stats, name, config.convention)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    deltas = []
    for row, fact in enumerate(values.facts):
        change = oriented(left[row, :, None].to(dtype), right[row, None].to(dtype), module)
        deltas.append(Delta({name + ".weight": change}, {
            "editor": "rome", "losses": [values.losses[row][-1]], "evaluations": [len(values.losses[row])],
            "value_norm": [(values.h0 + values.delta)[row].norm().item()]}))
        if not deltas[-1].is_finite():
            raise ValueError(f"record {fact.name}: the update is not finite (its key may be zero)")
    return deltas


def update(values, stats, name, convention):
    """(left (n, d), right (n, m)) in float64, so that ΔW = left rightᵀ for each of n facts.

    Eq. 2 of arXiv:2202.05262, ΔW = (v* − W k)(C⁻¹k)ᵀ / (kᵀC⁻¹k), with the keys that `convention` names: "rome", as the
    published code has it, takes u = C⁻¹k̄ of the mean key and the plain prompt's key k₀ elsewhere, ΔW = δ uᵀ / (uᵀk₀);
    "r-rome" the mean key everywhere; "p-rome" the plain one everywhere.
    """
    plain, mean = values.keys[:, 0], values.keys.mean(1)
    inner, outer = {"rome": (mean, plain), "r-rome": (mean, mean), "p-rome": (plain, plain)}[convention]
    right = stats.solve(name, inner.T).T
    right = right / right.norm(dim=1, keepdim=True)
    change = values.delta.double()
    if convention == "r-rome":      # v* − W k̄ = δ + W k₀ − W k̄
        change = change + (values.h0 - values.mean).double()
    return change / (right * outer.double()).sum(1, keepdim=True), right


def _joined(before, now):
    """The info of two Deltas: lists one after the other."""
    return {name: before.get(name, []) + value if isinstance(value, list) else value for name, value in now.items()}
