"""Facts in; ROME's rank-one changes of one MLP output projection out (Meng et al. 2022, arXiv:2202.05262)."""

import contextlib
from dataclasses import dataclass

import torch

from editcore.contexts import Group
from editcore.delta import Delta, oriented
from editcore.editors import sources
from editcore.editors.value import Site, optimise
from editcore.model import module_of, name_of


@dataclass(frozen=True)
class Rome:
    """Settings of ROME; without a layer there is no default, the rest is as published."""

    layer: int                          # the edited layer
    steps: int = 20                     # evaluations of the loss; the last one does not step
    lr: float = 0.5                     # of Adam on δ
    stop_loss: float = 0.05             # a fact is done once its loss is below
    kl_factor: float = 0.0625           # weight of the KL term
    weight_decay: float = 0.5           # weight of ‖δ‖ / ‖h0‖²
    clamp: float = 4.0                  # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: str = "{} is a"          # prompt of the KL term
    kl_position: str = "subject"        # read there at the last "subject" token (published code) or the "last" token
    convention: str = "rome"            # keys of the update: "rome" (published code, mixed), "r-rome" or "p-rome"
    context_groups: tuple = (Group(5, 10), Group(10, 10))   # sampled context templates
    n_tokens: int = 0                   # tokens of the second moment; 0: all of the texts
    length: int = 512                   # its sequence length
    choices = {"kl_position": ("subject", "last"), "convention": ("rome", "r-rome", "p-rome")}


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
    return sources.prepare(model, tok, (config.layer,), given, config)


def edit(model, tok, facts, config, prepared):
    """One Delta with all facts, each solved on top of those before it, as the published code goes through a batch."""
    total = Delta({})
    for fact in facts:
        with total.applied(model) if total.changes else contextlib.nullcontext():
            (one,) = each(model, tok, [fact], config, prepared)
        total = Delta((total + one).changes, _joined(total.info, one.info))
    return total


def each(model, tok, facts, config, prepared):
    """A Delta a fact, each an edit of the current model on its own; the values are optimised together."""
    site = Site(config.layer, "mlp_out", config.layer)
    values = optimise(model, tok, facts, prepared.contexts, site, config)
    module, name = module_of(model, "mlp_out", config.layer), name_of(model, "mlp_out", config.layer)
    left, right = update(values, prepared.stats, module, name, config.convention)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    deltas = []
    for row, fact in enumerate(facts):
        change = oriented(left[row, :, None].to(dtype), right[row, None].to(dtype), module)
        delta = Delta({name + ".weight": change}, {"editor": "rome", "losses": [values.losses[row][-1]],
                                                   "evaluations": [len(values.losses[row])]})
        if not delta.is_finite():
            raise ValueError(f"record {fact.case_id}: the update is not finite (its key may be zero)")
        deltas.append(delta)
    return deltas


def update(values, stats, module, name, convention):
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
    if convention == "r-rome":      # v* − W k̄ = δ + W (k₀ − k̄)
        change = change + (module(plain) - module(mean)).double()
    return change / (right * outer.double()).sum(1, keepdim=True), right


def _joined(before, now):
    """The info of two Deltas: lists one after the other."""
    return {name: before.get(name, []) + value if isinstance(value, list) else value for name, value in now.items()}
