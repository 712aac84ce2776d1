"""A trained hypernetwork, a model and facts in; low-rank changes of MLP matrices, made from edit gradients, out.

MEND (arXiv:2110.11309), also with instructions in the prompts (InstructEdit, arXiv:2402.16123) and on any mixture of
tasks: those differ in the text that a hypernetwork is trained on and in nothing here. For a linear map y = W x the
gradient of a loss is sum_b delta_b u_b^T, u_b the input and delta_b = dL/dy at token b, so its rank is at most the
number of tokens. The hypernetwork maps the pairs (u_b, delta_b) to pairs (u~_b, delta~_b), and the edit is

    W <- W - alpha sum_b delta~_b u~_b^T,       alpha learned, one a matrix, positive at the start.

A positive alpha descends: an untrained hypernetwork takes one step down the gradient of normalised factors. (The
published code adds instead and starts at 1e-4; alpha = -1e-4 is that start.)
"""

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from editcore.delta import Delta, oriented
from editcore.editors.rowwise import rows as versioned
from editcore.editors.rowwise import versions
from editcore.instructedit import hypernet
from editcore.instructedit.hypernet import Site
from editcore.likelihood import above, enter
from editcore.model import batch_tokens, is_input_first, layout, max_length, module_of, n_layers, name_of
from editcore.suffix import fused, head
from editcore.tokens import batches, check_lengths, encode, pad, target_ids

UNTRAINED = "untrained"     # the `network` that is no file: the start of training
SAME = ("layers", "parts", "rank", "depth", "norm")     # settings that an edit must share with the training


@dataclass(frozen=True)
class Mend:
    """Settings of MEND; network has no default for an edit, the rest must be what it was trained with."""

    network: str = ""               # file of the trained hypernetwork; "untrained": the start of training
    layers: tuple = (-3, -2, -1)    # edited blocks; negative ones count from the last
    parts: Literal["all", "mlp_in", "mlp_out"] = "all"     # their edited maps: "all" of the MLP, or "mlp_in", "mlp_out"
    rank: int = 1920                # of the hypernetwork's layers, at most d_in + d_out
    depth: int = 2                  # residual low-rank layers
    alpha: float = 1e-4             # step at the start of training, learned from there
    norm: Literal["shape", "map", "none"] = "shape"  # maps that share their running mean and std
    seed: int = 0                   # of the hypernetwork's first weights


PAPER = {   # published by model, but for alpha, which starts at -1e-4 there; pocket: what learns in seconds
    "gpt2-xl": {"layers": (45, 46, 47)},
    "llama-2-7b": {"layers": (29, 30, 31)},
    "pocket": {"layers": (-2, -1), "rank": 64, "alpha": 1e-3},
}


@dataclass(frozen=True)
class Rows:
    """Prompts with their continuations as padded token rows, and flat lists of the predictions that are read."""

    ids: torch.Tensor       # (B, T) no mask: a causal model never looks to the right
    place: torch.Tensor     # (M,) position b * T + t that predicts a token
    token: torch.Tensor     # (M,) the token
    pair: torch.Tensor      # (M,) which prompt and continuation it belongs to
    weight: torch.Tensor    # (M,) 1 / tokens of that continuation


def prepare(model, tok, config, given):
    """The Network of config.network, checked against the model and the settings. Errors name the file."""
    wanted = sites(model, config)
    device = next(model.parameters()).device
    if config.network == UNTRAINED:
        return start(model, config)
    if not config.network:
        raise ValueError("mend: network names no file; train one, or give network = untrained for the start")
    network = hypernet.load(config.network, device)
    for name, value in settings(model, config).items():
        if name in SAME and network.settings.get(name) != value:
            raise ValueError(f"{config.network}: trained with {name} = {network.settings.get(name)}, not {value}")
    for site, found in zip(wanted, network.sites):
        if (site.name, site.inputs, site.outputs) != (found.name, found.inputs, found.outputs):
            raise ValueError(f"{config.network}: made for {found.name} {found.shape}, the model has {site.name} "
                             f"{site.shape}")
        if abs(site.size / found.size - 1) > 1e-4:
            raise ValueError(f"{config.network}: trained on another model: the norm of {site.name} was {found.size:.6g}"
                             f", here it is {site.size:.6g}")
    return network


def settings(model, config):
    """What a network's file says of its making: layers counted from 0, the rest as in `config`."""
    return {"layers": list(layers(model, config)), **{name: getattr(config, name) for name in
                                                      ("parts", "rank", "depth", "norm", "alpha", "seed")}}


def layers(model, config):
    """The edited blocks, ascending, counted from 0. ValueError names one that the model lacks, or a repeated one."""
    found = [layer + n_layers(model) if layer < 0 else layer for layer in config.layers]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"mend: layers is {config.layers}, but must name at least one block, each once")
    return tuple(sorted(found))


def sites(model, config):
    """The Sites of the edited maps in block order, within a block: into the MLP, its gate if there is one, out."""
    named = [part for part in ("mlp_in", "mlp_gate", "mlp_out") if getattr(layout(model), part)]
    made = []
    for layer in layers(model, config):
        for part in named if config.parts == "all" else [config.parts]:
            module = module_of(model, part, layer)
            shape = module.weight.shape if is_input_first(module) else module.weight.shape[::-1]
            made.append(Site(name_of(model, part, layer), *shape, module.weight.double().norm().item()))
    return tuple(made)


def start(model, config, dtype=torch.float32):
    """The untrained Network for a model: factors come out normalised and otherwise as they went in."""
    network = hypernet.start(sites(model, config), settings(model, config), dtype)
    return hypernet.moved(network, next(model.parameters()).device)


def lay(model, pairs, labels):
    """The Rows of (prompt ids, target ids) pairs, a row a pair; a target's tokens are read teacher-forced.

    ValueError as `inputs_of`.
    """
    device = next(model.parameters()).device
    ids = pad([list(row) for row in inputs_of(model, pairs, labels)], device=device)[0]
    return read_at(ids, pairs, [range(row * ids.shape[1], (row + 1) * ids.shape[1]) for row in range(len(pairs))])


def inputs_of(model, pairs, labels):
    """The input tokens of (prompt ids, target ids) pairs: all but the last one of a target is read.

    ValueError names the label of a pair too long for the model, or with an empty prompt or target.
    """
    for label, (prompt, target) in zip(labels, pairs, strict=True):
        if not prompt or not target:
            raise ValueError(f"{label}: the {'target' if prompt else 'prompt'} has no tokens")
    inputs = [tuple(prompt) + tuple(target[:-1]) for prompt, target in pairs]
    check_lengths(inputs, labels, max_length(model))
    return inputs


def read_at(ids, pairs, places):
    """The Rows of pairs whose input tokens stand at `places` (one sequence a pair) of ids (B, T), counted through."""
    device = ids.device
    entries = [(where[len(prompt) - 1 + t], token, index, 1 / len(target))
               for index, (where, (prompt, target)) in enumerate(zip(places, pairs)) for t, token in enumerate(target)]
    *integers, weights = zip(*entries)
    return Rows(ids, *(torch.tensor(values, device=device) for values in integers),
                torch.tensor(weights, dtype=torch.float64, device=device))


def below(model, rows, layer):
    """What the blocks from `layer` on need to run on the Rows; no edit of them changes it."""
    return enter(model, rows.ids.new_zeros(1, 0), rows.ids, layer)


def logits(model, kept, rows):
    """(M, V) logits at the Rows' places, in float32 or better, from the states `kept` that `below` gave."""
    return head(model, above(model, kept).flatten(0, 1)[rows.place])


def gradients(model, kept, rows, names):
    """For each named linear map (u (B, T, d_in), delta (B, T, d_out)): its inputs, and the gradient at its outputs

    of the sum over pairs of the mean-token NLL, from one pass forward and one back. Both are detached; no gradient of
    a parameter is formed.
    """
    seen, handles = {}, []

    def hook(name, args, output):
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen[name] = args[0].detach(), output
        return output

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: hook(name, args, output)))
    try:
        with torch.enable_grad():
            each = torch.nn.functional.cross_entropy(logits(model, kept, rows), rows.token, reduction="none")
            loss = (each * rows.weight.to(each.dtype)).sum()
            slopes = torch.autograd.grad(loss, [seen[name][1] for name in names])
    finally:
        for handle in handles:
            handle.remove()
    return {name: (seen[name][0], slope) for name, slope in zip(names, slopes)}


def tokens(found, rows=slice(None)):
    """The pairs {name: (u (R, d_in), delta (R, d_out))} of some rows' tokens where neither u nor delta is all zero."""
    kept = {}
    for name, (u, delta) in found.items():
        u, delta = u[rows].flatten(0, -2), delta[rows].flatten(0, -2)
        both = (u != 0).any(-1) & (delta != 0).any(-1)
        kept[name] = u[both], delta[both]
    return kept


def requested(model, network, pairs, label):
    """`tokens` of one edit given as (prompt ids, target ids) pairs; ValueError names its label if one is bad."""
    rows = lay(model, pairs, [label] * len(pairs))
    kept = below(model, rows, min(network.settings["layers"]))
    return tokens(gradients(model, kept, rows, [site.name for site in network.sites]))


def factors(network, found):
    """{name: (u~ (R, d_in), delta~ (R, d_out))} of what `tokens` gives: the directions of the edit, without alpha."""
    return {site.name: hypernet.transform(network, site, *found[site.name]) for site in network.sites}


@contextlib.contextmanager
def stepped(model, network, made):
    """In the block, each map's output is that of W - alpha sum_b delta~_b u~_b^T, which is never formed.

    made: what `factors` gives. Gradients reach the factors and alpha, and pass through to earlier maps.
    """
    def hook(name, args, output):
        u, delta = made[name]
        change = (args[0].to(u.dtype) @ u.T) @ delta * -network.alpha(name)
        return output + change.to(output.dtype)

    handles = [model.get_submodule(name).register_forward_hook(
        lambda _, args, output, name=name: hook(name, args, output)) for name in made]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def change(model, network, made):
    """The same edit as a Delta of LowRank changes in the model's own orientation."""
    changes = {name + ".weight": oriented((-network.alpha(name) * delta.T).detach(), u.detach(),
                                          model.get_submodule(name)) for name, (u, delta) in made.items()}
    return Delta(changes, {"editor": "mend"})


def edit(model, tok, facts, config, prepared):
    """One Delta with all facts, as one update."""
    return edit_groups(model, tok, [facts], config, prepared=[prepared])[0]


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """One Delta per group of facts, each of its own copy of the model: the sum of its facts' changes.

    prepared: the Network of each group; current: the Delta that each group's model carries already, None if none does.
    Every fact's factors come from the model before the edit, as if it were alone: so a hypernetwork is trained.
    """
    return [change(model, network, _joined([made for _, made in parts]))
            for network, parts in zip(prepared, directions(model, tok, groups, config, (prepared, current)))]


def directions(model, tok, groups, config, several):
    """For each group a list of (fact, its `factors`): what an analysis of gradient directions compares."""
    made, names = [], [site.name for site in several[0][0].sites]
    for (owner, fact), found in captured(model, tok, groups, config, (names, several[1])):
        made.append((owner, fact, factors(several[0][owner], found)))
    return [[(fact, one) for owner, fact, one in made if owner == index] for index in range(len(groups))]


def captured(model, tok, groups, config, what):
    """[((group, fact), its `tokens`)] in the facts' order: raw inputs and output gradients.

    what = (names of the maps, the Delta that each group's model already carries, or None).
    """
    names, totals = what
    own = None if totals is None else versions(model, totals)
    facts = [(owner, fact) for owner, group in enumerate(groups) for fact in group]
    prompts = encode(tok, [fact.text for _, fact in facts])
    pairs = [(prompt, target_ids(tok, fact.target_new)) for prompt, (_, fact) in zip(prompts, facts)]
    lengths, found = [len(prompt) + len(target) - 1 for prompt, target in pairs], {}
    for batch in batches(lengths, 8 * batch_tokens(next(model.parameters()).device)):
        rows = lay(model, [pairs[i] for i in batch], [f"record {facts[i][1].case_id}" for i in batch])
        with fused(model), versioned(model, own, [facts[i][0] for i in batch]):
            seen = gradients(model, below(model, rows, min(layers(model, config))), rows, names)
        found |= {i: tokens(seen, slice(row, row + 1)) for row, i in enumerate(batch)}
    return [(facts[i], found[i]) for i in range(len(facts))]


def _joined(parts):
    """The factors of several facts as those of one edit."""
    return {name: tuple(torch.cat([part[name][side] for part in parts]) for side in (0, 1)) for name in parts[0]}
