"""ROME: rank-one edits of one MLP output projection (Meng et al. 2022, arXiv:2202.05262).

Also r-ROME and p-ROME, which use other keys, NAS, which fixes the norm of v*, and the control
"random": updates of given norms in random directions, that is, drift without a fact.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

from editcore.delta import Delta, oriented
from editcore.editors.closed_form import norm_anchor
from editcore.editors.prepare import prepare_layers
from editcore.editors.rowwise import edited_maps
from editcore.editors.settings import positive, prompt, real, whole
from editcore.editors.target_value import POCKET, SMOLLM2, EditSite, encode_facts, optimise
from editcore.model import module_of, name_of
from editcore.templates import STARTS, TemplateGroup


@dataclass(frozen=True)
class Settings:
    """Settings of ROME; the layer has no default, the rest is as published."""

    layer: whole(0, 999)                # the edited layer
    steps: whole(1, 10**5) = 20         # evaluations of the loss; the last one does not step
    lr: positive(1000) = 0.5            # of Adam on δ
    stop_loss: real() = 0.05            # a fact is done once its loss is below
    early_stop: whole() = 0             # ... or its target was the argmax so often; 0: off
    kl_factor: real() = 0.0625          # weight of the KL term
    weight_decay: real() = 0.5          # weight of ‖δ‖ / ‖h0‖²
    clamp: positive() = 4.0             # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: prompt() = "{} is a"     # prompt of the KL term ...
    kl_position: Literal["subject", "last"] = "subject"     # ... and the token where it is read
    convention: Literal["rome", "r-rome", "p-rome"] = "rome"    # keys of the update, see `update`
    anchor: whole() = 0                 # pilot edits whose mean ‖v*‖ every v* gets (NAS); 0: off
    context_groups: tuple[TemplateGroup, ...] = (TemplateGroup(5, 10), TemplateGroup(10, 10))
    n_tokens: whole(0, 10**12) = 0      # tokens of the second moment; 0: all of the texts
    length: whole(2) = 512              # its sequence length


PAPER = {   # published settings by model
    "gpt2-medium": {"layer": 8, "clamp": 3.0},
    "gpt2-large": {"layer": 12},
    "gpt2-xl": {"layer": 17},
    "gpt-j-6b": {"layer": 5},
    "llama-2-7b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},  # EasyEdit's, which has C = I
    "pocket": POCKET | {"layer": 0},
    # twelve known facts, as `site` sweeps: at clamp 4 a fifth of the neighbours follow the edit, at
    # 2 none does; over eight others layers 0 to 5 score S .86 to .93
    "smollm2": SMOLLM2 | {"layer": 4, "clamp": 2.0,
                          "context_groups": (TemplateGroup(10, 1, STARTS),)},
}


def prepare(model, tok, config, inputs):
    """Take context templates, second moment and the anchor's norm from the unedited model."""
    return prepare_layers(model, tok, (config.layer,), inputs, config, _site(config))


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """Return one Delta per group of facts, each an edit of its own model, in shared passes.

    The facts of a group are solved each on top of those before it, as in the published code.
    prepared, current: as of `Editor.edit_groups`.
    """
    totals = [Delta({}) for _ in groups]
    for number in range(max(map(len, groups))):
        live = [index for index, group in enumerate(groups) if number < len(group)]
        facts = encode_facts(model, tok, [[groups[index][number]] for index in live],
                             [prepared[index].contexts for index in live], config)
        carried = [current[index] + totals[index] if current else totals[index] for index in live]
        values = optimise(model, facts, _site(config), config, edited_maps(model, carried))
        if config.anchor:
            norms = torch.tensor([prepared[index].anchor for index in live], dtype=torch.float64)
            values = norm_anchor(values, norms, most=5)
        for index, delta in zip(live, _deltas(model, values, prepared[live[0]].moments, config)):
            info = {"editor": "rome"} | {name: totals[index].info.get(name, []) + value
                                         for name, value in delta.info.items()}
            totals[index] = replace(totals[index] + delta, info=info)
    return totals


def rank_one_update(values, moments, name, convention):
    """Return (left (n, d), right (n, m)) in float64 with ΔW = left rightᵀ for each of n facts.

    Eq. 2 of arXiv:2202.05262, ΔW = (v* − W k)(C⁻¹k)ᵀ / (kᵀC⁻¹k), with the keys of a convention:
    "rome", as the published code has it, takes u = C⁻¹k̄ of the mean key k̄ and the plain prompt's
    key k₀ elsewhere, ΔW = δ uᵀ / (uᵀk₀); "r-rome" takes k̄ everywhere, "p-rome" k₀. On the pocket
    model r-rome leaves 5 to 10 % of edits undone: v* − W k̄ is δ and h₀ − W k̄ (0.4 ‖δ‖), for which
    δ was not optimised.
    """
    keys = values.keys.double()
    plain = keys[:, 0]
    mean = keys.mean(1)
    inner = plain if convention == "p-rome" else mean
    outer = mean if convention == "r-rome" else plain
    right = moments.solve(name, inner.T).T
    right = right / right.norm(dim=1, keepdim=True)
    change = values.delta.double()
    if convention == "r-rome":      # v* − W k̄ = δ + W k₀ − W k̄
        change = change + (values.h0 - values.mean_h0).double()
    return change / (right * outer).sum(1, keepdim=True), right


def _site(config):
    return EditSite(config.layer, "mlp_out", config.layer)


def _deltas(model, values, moments, config):
    """Rank-one Deltas, one per fact; ValueError names a record whose update is not finite."""
    name = name_of(model, "mlp_out", config.layer)
    left, right = rank_one_update(values, moments, name, config.convention)
    norms = values.v_star.norm(dim=1).tolist()
    deltas = []
    for row, fact in enumerate(values.facts):
        losses = values.losses[row]
        info = {"losses": [losses[-1]], "evaluations": [len(losses)],
                "hits": [values.hits[row].item()], "value_norm": [norms[row]]}
        delta = _delta(model, config, left[[row]], right[[row]], info)
        if not delta.is_finite():
            raise ValueError(f"record {fact.case_id}: the update is not finite (key of zeros?)")
        deltas.append(delta)
    return deltas


def _delta(model, config, left, right, info):
    """The Delta of leftᵀ right, factors in the weight's dtype or float32."""
    module = module_of(model, "mlp_out", config.layer)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    change = oriented(left.T.to(dtype), right.to(dtype), module)
    return Delta({name_of(model, "mlp_out", config.layer) + ".weight": change}, info)


@dataclass(frozen=True)
class RandomSettings:
    """Settings of the control "random"; layer and norms have no default."""

    layer: whole(0, 999)                # the layer whose MLP output projection is changed
    norms: tuple[tuple[int | str, real(0, 10**12)], ...] = ()     # (case id, ‖ΔW‖_F) by ROME
    direction: Literal["v", "both"] = "both"    # "v": u is ROME's, v random; "both": u random too
    seed: whole() = 0                   # of the directions; each fact draws its own
    kl_prompt: prompt() = "{} is a"     # this and what follows: as in ROME's settings
    kl_position: Literal["subject", "last"] = "subject"
    context_groups: tuple[TemplateGroup, ...] = Settings.context_groups
    n_tokens: whole(0, 10**12) = 0
    length: whole(2) = 512


RANDOM_PAPER = {model: {"layer": values["layer"]} for model, values in PAPER.items()}


def prepare_random(model, tok, config, inputs):
    """Take context templates and second moment, as ROME's."""
    return prepare_layers(model, tok, (config.layer,), inputs, config)


def random_update(model, tok, facts, config, prepared):
    """Return the Delta Σ ‖ΔW‖ v uᵀ, v and u unit vectors; ValueError for a fact without a norm."""
    encoded = encode_facts(model, tok, [facts], [prepared.contexts], config)
    unedited = Settings(config.layer, steps=0)
    keys = optimise(model, encoded, _site(config), unedited).keys.mean(1)
    right = prepared.moments.solve(name_of(model, "mlp_out", config.layer), keys.T).T
    left = torch.empty(len(facts), model.config.hidden_size).to(right)
    norms = {str(case_id): norm for case_id, norm in config.norms}
    if lacking := [fact.case_id for fact in facts if str(fact.case_id) not in norms]:
        raise ValueError(f"record {lacking[0]}: norms has no entry for it")
    for row, fact in enumerate(facts):
        seed = zlib.crc32(f"{config.seed} {fact.case_id}".encode())
        generator = torch.Generator().manual_seed(seed)
        left[row] = torch.randn(left.shape[1], generator=generator, dtype=torch.float64)
        left[row] *= norms[str(fact.case_id)] / left[row].norm()
        if config.direction == "both":
            right[row] = torch.randn(right.shape[1], generator=generator, dtype=torch.float64)
    right = right / right.norm(dim=1, keepdim=True)
    return _delta(model, config, left, right, {"editor": "random"})
