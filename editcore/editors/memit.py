"""MEMIT: least-squares edits of several layers' MLPs (Meng et al. 2022, arXiv:2210.07229).

EMMET, MEMIT with remembered keys, ENCORE, AlphaEdit, RECT and PRUNE are MEMIT with other settings
(see `closed_form`): EDITORS names them, their published values stand below.
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
from editcore.editors.settings import ascending, positive, prompt, real, whole
from editcore.editors.target_value import POCKET, SMOLLM2, EditSite, encode_facts, optimise
from editcore.hooks import capture, run
from editcore.model import module_of, name_of
from editcore.templates import STARTS, TemplateGroup
from editcore.tokens import batches, pad


@dataclass(frozen=True)
class Settings:
    """Settings of MEMIT; layers and lambda_ have no default, the rest is as published."""

    layers: ascending()                 # edited layers, ascending; δ enters at the last one
    lambda_: real(0, 10**12)            # weight of what is preserved against the new keys
    steps: whole(1, 10**5) = 20         # evaluations of the loss; the last one does not step
    lr: positive(1000) = 0.5            # of Adam on δ
    stop_loss: real() = 0.05            # a fact is done once its loss is below
    early_stop: whole() = 0             # ... or its target was the argmax so often; 0: off
    kl_factor: real() = 0.0625          # weight of the KL term
    weight_decay: real() = 0.5          # weight of ‖δ‖ / ‖h0‖²
    clamp: positive() = 0.75            # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: prompt() = "{} is a"     # prompt of the KL term ...
    kl_position: Literal["subject", "last"] = "subject"     # ... and the token where it is read
    exact: bool = False                 # a fact alone is inserted exactly, without λ (EMMET)
    memory: bool = False                # keys of earlier updates are preserved: λC + Σ K_p K_pᵀ
    ridge: real() = 0.0                 # λ_n of λ_n·I beside λC (ENCORE)
    null_space: real() = 0.0            # updates only along C's eigenvectors below this; 0: off
    anchor: whole() = 0                 # pilot edits whose mean ‖v*‖ every v* gets (NAS); 0: off
    keep: positive(1) = 1.0             # share of an update's entries that stay (RECT)
    prune: real(1) = 1.0                # base of PRUNE's logarithm on the total's spectrum; 1: off
    context_groups: tuple[TemplateGroup, ...] = (TemplateGroup(10, 1, STARTS),)     # sampled
    n_tokens: whole(0, 10**12) = 0      # tokens of the second moments; 0: all of the texts
    length: whole(2) = 512              # their sequence length


LLAMA = {"layers": (4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25}
PAPER = {   # published settings by model
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "lambda_": 20000.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25},
    "llama-2-7b": LLAMA,        # as ENCORE's authors run it; EasyEdit: clamp 4, weight_decay 1e-3
    "meta-llama-3-8b": LLAMA,
    # λ acts against kᵀC⁻¹k, about m: λ / m as for GPT-J (1,900 here) left a fifth of edits undone
    "pocket": POCKET | {"layers": (0, 1), "lambda_": 300.0},
    "smollm2": SMOLLM2 | {"layers": (3, 4, 5), "lambda_": 1000.0},      # swept
}
ENCORE = {
    "gpt2-xl": PAPER["gpt2-xl"] | {"ridge": 10.0, "early_stop": 4},
    "llama-2-7b": LLAMA | {"ridge": 10.0, "early_stop": 3},
    "meta-llama-3-8b": LLAMA | {"ridge": 20.0, "early_stop": 2},
    "pocket": PAPER["pocket"] | {"ridge": 1.0, "early_stop": 4},
    "smollm2": PAPER["smollm2"] | {"ridge": 10.0, "early_stop": 3},  # eigenvalues .003 to .6
}
ALPHAEDIT = {model: values | {"lambda_": 10.0, "null_space": 0.02}
             for model, values in PAPER.items()}
ALPHAEDIT["meta-llama-3-8b"] |= {"lr": 0.1}
ALPHAEDIT["llama-2-7b"] |= {"lr": 0.1}      # not AlphaEdit's own: as ENCORE's authors run it
# C's eigenvalues are 0.01 to 900 here: 0.02 leaves 1 % of them and inserts four facts in five; 0.5
# inserts nearly all, as 2 and 20 do, and costs the other facts least (of six settings tried)
ALPHAEDIT["pocket"] |= {"null_space": 0.5}
EMMET = {   # published are α = 0.1 beside C times 1,000, 10,000 and 1: α so much larger beside C
    "gpt2-xl": {"layers": (17,), "lambda_": 100.0},
    "gpt-j-6b": {"layers": (5,), "lambda_": 1000.0, "steps": 25},
    "llama-2-7b": {"layers": (5,), "lambda_": 0.1, "steps": 25, "clamp": 4.0,
                   "weight_decay": 1e-3},
    "pocket": POCKET | {"layers": (0,), "lambda_": 0.1},
    "smollm2": {"layers": (4,), "lambda_": 0.1, "clamp": 2.0},
}


def prepare(model, tok, config, inputs):
    """Take context templates, inverted second moments and the anchor's norm from the model."""
    if config.memory and (config.exact or config.lambda_ <= 0):
        raise ValueError("memory needs lambda above 0, and exact off")
    prepared = prepare_layers(model, tok, config.layers, inputs, config, _site(config))
    ridge = config.ridge / config.lambda_ if config.ridge else 0.0
    names = [name_of(model, "mlp_out", layer) for layer in config.layers]
    inverses = {name: closed_form.inverse(prepared.moments, name, ridge, config.null_space)
                for name in names}
    return replace(prepared, inverses=inverses)


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """Return one Delta per group of facts, each one update of its own model, in shared passes.

    prepared, current: as of `Editor.edit_groups`. A Delta carries its keys if they are to be
    remembered. ValueError names the records of a group whose update is not finite.
    """
    versions = edited_maps(model, current or [Delta({})] * len(groups))
    facts = encode_facts(model, tok, groups, [group.contexts for group in prepared], config)
    values = optimise(model, facts, _site(config), config, versions)
    if config.anchor:
        norms = torch.tensor([prepared[fact.group].anchor for fact in facts], dtype=torch.float64)
        values = closed_form.norm_anchor(values, norms, most=2)
    changes = {}
    keys = {}
    for index, layer in enumerate(config.layers):
        name = name_of(model, "mlp_out", layer)
        layer_keys = values.keys
        state = values.h0
        if index:
            layer_keys, state = read(model, facts, layer, config.layers[-1], changes=changes,
                                     versions=versions)
        keys[name] = fact_keys(layer_keys)
        residual = (values.v_star - state) / (len(config.layers) - index)
        changes[name] = _changes(model, facts, layer, config, keys=keys[name], residual=residual,
                                 prepared=prepared, versions=versions)
    if not config.memory:
        keys = {}
    if config.keep < 1:     # only now: each layer makes up for what the unmasked ones below leave
        changes = {name: _largest(model, name, layer, config.keep, versions)
                   for name, layer in changes.items()}
    return [_delta(values, group, changes, keys) for group in range(len(groups))]


def remember(prepared, keys, config):
    """Return a Prepared that also preserves `keys` {module: (n, m)}; unchanged without memory."""
    if not config.memory:
        return prepared
    memory = {name: closed_form.remember(prepared.memory.get(name), prepared.inverses[name],
                                         new, config.lambda_) for name, new in keys.items()}
    return replace(prepared, memory=memory)


def finish(total, weights, config):
    """Return what is measured of the sum of updates: itself, or restrained by PRUNE."""
    if config.prune == 1:
        return total
    changes = {name: closed_form.prune(change, weights[name], config.prune)
               for name, change in total.dense().changes.items()}
    return replace(total, changes=changes)


def fact_keys(keys):
    """Return (n, m) in float64: half the plain prompt's key and half the mean of the others.

    keys (n, c, m) in c contexts, of which the first is the plain prompt.
    """
    keys = keys.double()
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def read(model, facts, layer, last, *, changes, versions):
    """Return (keys (n, c, m) of `layer`, plain states (n, d) of block `last`) at the lookups.

    changes: {module name: one change per group}, already made in this update; versions: the groups'
    maps before it. The plain prompts run on to block `last`, the others end at `layer`.
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
    return EditSite(config.layers[-1], "block", config.layers[0])


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
        changes.append(change)
    return changes


def _largest(model, name, changes, keep, versions):
    """The share `keep` of each group's change of a weight, against the weight before it."""
    weight = model.get_parameter(name + ".weight")
    return [closed_form.rect(dense(change), version.get(name, [weight])[0], keep)
            for change, version in zip(changes, versions)]


def _delta(values, group, changes, keys):
    """The Delta of one group."""
    rows = [row for row, fact in enumerate(values.facts) if fact.group == group]
    info = {"editor": "memit", "losses": [values.losses[row][-1] for row in rows],
            "evaluations": [len(values.losses[row]) for row in rows],
            "hits": values.hits[rows].tolist(),
            "value_norm": values.v_star[rows].norm(dim=1).tolist()}
    delta = Delta({name + ".weight": layer[group] for name, layer in changes.items()}, info,
                  {name: layer[rows] for name, layer in keys.items()})
    if not delta.is_finite():
        records = ", ".join(str(values.facts[row].case_id) for row in rows)
        raise ValueError(f"record {records}: the update is not finite")
    return delta
