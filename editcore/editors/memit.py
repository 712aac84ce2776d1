"""MEMIT: least-squares edits of several layers' MLPs (Meng et al. 2022, arXiv:2210.07229).

EMMET, MEMIT with remembered keys, ENCORE, AlphaEdit, RECT and PRUNE are MEMIT with other settings
(`closed_form` has the one formula behind them): EDITORS names them, their published values stand
below.
"""

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from editcore.delta import Delta, dense, oriented
from editcore.editors import closed_form
from editcore.editors.prepare import prepare_layers
from editcore.editors.rowwise import each_row, each_row_added, edited_maps
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.hooks import capture, run
from editcore.model import module_of, name_of
from editcore.templates import TemplateGroup
from editcore.tokens import batches, pad

STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Settings:
    """Settings of MEMIT; layers and lambda_ have no default, the rest is as published."""

    layers: tuple[int, ...]             # edited layers, ascending; δ enters at the last one
    lambda_: float                      # weight of what is preserved against the new keys
    steps: int = 20                     # evaluations of the loss; the last one does not step
    lr: float = 0.5                     # of Adam on δ
    stop_loss: float = 0.05             # a fact is done once its loss is below
    early_stop: int = 0                 # ... or its target was the argmax so often in a row; 0: off
    kl_factor: float = 0.0625           # weight of the KL term
    weight_decay: float = 0.5           # weight of ‖δ‖ / ‖h0‖²
    clamp: float = 0.75                 # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: str = "{} is a"          # prompt of the KL term ...
    kl_position: Literal["subject", "last"] = "subject"     # ... and the token where it is read
    site: Literal["block", "mlp_out"] = "block"     # output that gets δ (EMMET: "mlp_out")
    keys: Literal["mixed", "plain", "mean"] = "mixed"   # key of a fact, see `fact_keys`
    exact: bool = False                 # a fact alone is inserted exactly, without λ (EMMET)
    memory: bool = False                # keys of earlier updates are preserved: λC + Σ K_p K_pᵀ
    ridge: float = 0.0                  # λ_n of λ_n·I beside λC (ENCORE)
    null_space: float = 0.0             # updates only along C's eigenvectors below this; 0: off
    anchor: int = 0                     # pilot edits whose mean ‖v*‖ every v* gets; 0: off
    keep: float = 1.0                   # share of an update's entries that stay (RECT)
    prune: float = 0.0                  # base of PRUNE's logarithm on the total's singular values
    context_groups: tuple = (TemplateGroup(10, 1, STARTS),)     # sampled context templates
    n_tokens: int = 0                   # tokens of the second moments; 0: all of the texts
    length: int = 512                   # their sequence length


PAPER = {   # published settings by model
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "lambda_": 20000.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25},
    "llama-2-7b": {"layers": (4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25},
    # λ acts against kᵀC⁻¹k, about m: λ / m as for GPT-J (1,900 here) left a fifth of edits undone
    "pocket": {"layers": (0, 1), "lambda_": 300.0, "lr": 1.0, "steps": 40, "clamp": 4.0},
}
LLAMA3 = {"layers": (4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25}
ENCORE = {      # early_stop: the published counts, read as evaluations in a row
    "gpt2-xl": PAPER["gpt2-xl"] | {"ridge": 10.0, "early_stop": 4},
    "llama-2-7b": PAPER["llama-2-7b"] | {"ridge": 10.0, "early_stop": 3},
    "meta-llama-3-8b": LLAMA3 | {"ridge": 20.0, "early_stop": 2},
    "pocket": PAPER["pocket"] | {"ridge": 1.0, "early_stop": 4},
}
ALPHAEDIT = {model: values | {"lambda_": 10.0, "null_space": 0.02}
             for model, values in (PAPER | {"meta-llama-3-8b": LLAMA3}).items()}
# C's eigenvalues are 0.01 to 900 here: 0.02 leaves 1 % of them and inserts four facts in five; 0.5
# inserts nearly all, as 2 and 20 do, and costs the other facts least (of six settings tried)
ALPHAEDIT["pocket"] |= {"null_space": 0.5}
EMMET = {   # α = 0.1 in batches; ROME's layer and clamp
    "gpt2-xl": {"layers": (17,), "lambda_": 0.1, "clamp": 4.0},
    "gpt-j-6b": {"layers": (5,), "lambda_": 0.1, "clamp": 4.0},
    "llama-2-7b": {"layers": (5,), "lambda_": 0.1, "clamp": 4.0},
    "pocket": {"layers": (0,), "lambda_": 0.1, "lr": 1.0, "steps": 40, "clamp": 4.0},
}


def prepare(model, tok, config, inputs):
    """Context templates, second moments of all layers and their inverses; the anchor's norm."""
    if not config.layers or list(config.layers) != sorted(set(config.layers)):
        raise ValueError(f"layers are {config.layers}, but must ascend and be at least one")
    if config.site == "mlp_out" and len(config.layers) > 1:
        raise ValueError(f"site mlp_out takes one layer, but layers are {config.layers}")
    if config.memory and (config.exact or config.lambda_ <= 0):
        raise ValueError("memory needs lambda above 0, and exact off")
    prepared = prepare_layers(model, tok, config.layers, inputs, config, _site(config))
    ridge = config.ridge / config.lambda_ if config.ridge else 0.0
    names = [name_of(model, "mlp_out", layer) for layer in config.layers]
    inverses = {name: closed_form.inverse(prepared.moments, name, ridge, config.null_space)
                for name in names}
    return replace(prepared, inverses=inverses)


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """One Delta per group of facts, each one update of its own copy of the model, in shared passes.

    prepared: one per group; current: the Delta that each group's model carries already, None if
    none does. A Delta carries its keys if they are to be remembered. ValueError names the records
    of a group whose update is not finite.
    """
    versions = edited_maps(model, current or [Delta({})] * len(groups))
    facts = encode_facts(model, tok, groups, [group.contexts for group in prepared], config)
    values = optimise(model, facts, _site(config), config, versions)
    if config.anchor:
        norms = torch.tensor([prepared[fact.group].anchor for fact in facts])
        values = closed_form.norm_anchor(values, norms)
    changes = {}
    keys = {}
    for index, layer in enumerate(config.layers):
        name = name_of(model, "mlp_out", layer)
        layer_keys = values.keys
        state = values.mean_h0 if config.keys == "mean" else values.h0
        if index:
            layer_keys, state = read(model, facts, layer, config.layers[-1], changes=changes,
                                     versions=versions)
        keys[name] = fact_keys(layer_keys, config.keys)
        residual = (values.v_star - state) / (len(config.layers) - index)
        changes[name] = _changes(model, facts, layer, config, keys=keys[name], residual=residual,
                                 prepared=prepared, versions=versions)
    if not config.memory:
        keys = {}
    return [_delta(values, group, changes, keys) for group in range(len(groups))]


def remember(prepared, keys, config):
    """The Prepared that also preserves `keys` {module: (n, m)}; unchanged without memory."""
    if not config.memory:
        return prepared
    memory = {name: closed_form.remember(prepared.memory.get(name), prepared.inverses[name],
                                         new, config.lambda_) for name, new in keys.items()}
    return replace(prepared, memory=memory)


def finish(total, weights, config):
    """What is measured of the sum of updates: itself, or restrained by PRUNE."""
    if not config.prune:
        return total
    changes = total.dense().changes
    pruned = {name: closed_form.prune(change, weights[name], config.prune)
              for name, change in changes.items() if change.ndim == 2}
    return replace(total, changes=changes | pruned)


def fact_keys(keys, kind="mixed"):
    """(n, m) in float64 of keys (n, c, m) in c contexts, of which the first is the plain prompt.

    kind "mixed": half the plain prompt's key and half the mean of the others; "plain": the first
    alone; "mean": the mean of all, as ROME has it.
    """
    keys = keys.double()
    if kind == "mean":
        return keys.mean(1)
    if kind == "plain" or keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def read(model, facts, layer, last, *, changes, versions):
    """(keys (n, c, m) of `layer`, states (n, d) of block `last`, plain prompt) at the lookups.

    changes: {module name: one change per group}, already made in this update; versions: the groups'
    versions of the model before it. The plain prompts run on to block `last`, the others end at
    `layer`.
    """
    source = name_of(model, "mlp_out", layer)
    target = name_of(model, "block", last)
    keys = {}
    states = {}
    for contexts, end in (((0,), target), (range(1, len(facts[0].starts)), source)):
        places = list(itertools.product(range(len(facts)), contexts))
        rows = [facts[i].rows[c][:facts[i].lookups[c] + 1] for i, c in places]
        for batch in batches([len(row) for row in rows]):
            owners = [facts[places[b][0]].group for b in batch]
            ids, mask = pad([rows[b] for b in batch], device=next(model.parameters()).device)
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(each_row(model, versions, owners))
                for name, group_changes in changes.items():
                    hooks.enter_context(each_row_added(model, name, group_changes, owners))
                inputs = hooks.enter_context(capture(model, [source], "input", stop=False))
                outputs = hooks.enter_context(capture(model, [end]))
                run(model, input_ids=ids, attention_mask=mask)
            lookups = (torch.arange(len(batch), device=ids.device), mask.sum(1) - 1)
            keys |= zip([places[b] for b in batch], inputs[source][lookups])
            states |= zip([places[b] for b in batch], outputs[end][lookups])
    plain = torch.stack([states[fact, 0] for fact in range(len(facts))])
    stacked = torch.stack([keys[place] for place in sorted(keys)])
    return (stacked.unflatten(0, (len(facts), -1)),
            plain.to(torch.promote_types(plain.dtype, torch.float32)))


def _site(config):
    """δ enters at the last layer; keys are those of the first."""
    return EditSite(config.layers[-1], config.site, config.layers[0])


def _changes(model, facts, layer, config, *, keys, residual, prepared, versions):
    """The change of a layer's weight, in the stored orientation, for each group."""
    name = name_of(model, "mlp_out", layer)
    module = module_of(model, "mlp_out", layer)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    solved = prepared[0].inverses[name].solve(keys)
    changes = []
    for group, group_prepared in enumerate(prepared):
        rows = [row for row, fact in enumerate(facts) if fact.group == group]
        weight = 0.0 if config.exact and len(rows) == 1 else config.lambda_
        left, right = closed_form.update(keys[rows], solved[rows], residual[rows], weight,
                                         group_prepared.memory.get(name))
        change = oriented(left.T.to(dtype), right.to(dtype), module)
        if not change.saves:        # low rank only while that is the smaller form
            change = oriented(left.T, right, module).dense().to(dtype)
        if config.keep < 1:
            before, *_ = versions[group].get(name, [module.weight])
            change = closed_form.rect(dense(change), before, config.keep)
        changes.append(change)
    return changes


def _delta(values, group, changes, keys):
    """The Delta of one group."""
    rows = [row for row, fact in enumerate(values.facts) if fact.group == group]
    info = {"editor": "memit", "losses": [values.losses[row][-1] for row in rows],
            "evaluations": [len(values.losses[row]) for row in rows],
            "value_norm": values.v_star[rows].norm(dim=1).tolist()}
    delta = Delta({name + ".weight": layer[group] for name, layer in changes.items()}, info,
                  {name: layer[rows] for name, layer in keys.items()})
    if not delta.is_finite():
        records = ", ".join(str(values.facts[row].case_id) for row in rows)
        raise ValueError(f"record {records}: the update is not finite")
    return delta
