"""Facts in; rank-one changes of chosen norm in random directions out: what drift alone, without a fact, does."""

import zlib
from dataclasses import dataclass
from typing import Literal

import torch

from editcore.delta import Delta, oriented
from editcore.editors import prepare as sources
from editcore.editors import rome
from editcore.editors.target_value import EditSite, encode_facts, unedited_values
from editcore.model import module_of, name_of


@dataclass(frozen=True)
class Settings:
    """Settings of the control; layer and norms have no default."""

    layer: int                          # the layer whose MLP output projection is changed
    norms: tuple = ()                   # (case id, ‖ΔW‖_F) of each fact, e.g. those of a finished run of ROME
    direction: Literal["v", "both"] = "both"     # "v": u is ROME's, v random; "both": u random too
    seed: int = 0                       # of the directions; each fact draws its own
    kl_prompt: str = "{} is a"          # as in ROME's settings: the prompts are ROME's
    kl_position: Literal["subject", "last"] = "subject"     # as in ROME's settings
    context_groups: tuple = rome.Settings.context_groups    # as in ROME's settings
    n_tokens: int = 0                   # as in ROME's settings
    length: int = 512                   # as in ROME's settings


PAPER = {model: {"layer": values["layer"]} for model, values in rome.PAPER.items()}


def prepare(model, tok, config, given):
    """Prepared context templates and second moment, as ROME's."""
    return sources.prepare(model, tok, (config.layer,), given, config)


def edit(model, tok, facts, config, prepared):
    """The sum over the facts of ‖ΔW‖ v uᵀ with unit v and u. ValueError if a fact has no norm."""
    norms = {str(case): norm for case, norm in config.norms}
    if missing := [fact.case_id for fact in facts if str(fact.case_id) not in norms]:
        raise ValueError(f"record {missing[0]}: norms has no entry for it")
    made = encode_facts(model, tok, [facts], [prepared.contexts], config)
    name, module = name_of(model, "mlp_out", config.layer), module_of(model, "mlp_out", config.layer)
    values = unedited_values(model, made, EditSite(config.layer, "mlp_out", config.layer))
    right, left = prepared.moments.solve(name, values.keys.mean(1).T).T, torch.empty_like(values.h0).double()
    for row, one in enumerate(made):
        draw = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {one.name}".encode()))
        left[row] = torch.randn(left.shape[1], generator=draw, dtype=torch.float64)
        if config.direction == "both":
            right[row] = torch.randn(right.shape[1], generator=draw, dtype=torch.float64)
        left[row] *= norms[str(one.name)] / left[row].norm()
    right = right / right.norm(dim=1, keepdim=True)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return Delta({name + ".weight": oriented(left.T.to(dtype), right.to(dtype), module)}, {"editor": "random"})
