"""The losses of a hypernetwork's training: what the model says after each of a step's edits.

    encoded = [encode_example(model, network, example) for example in examples]     # once
    terms = losses(model, network, group(model, network, encoded))      # with gradients

The examples of a step stand side by side in one row, each seen by its own edit alone. Blocks below
the edited ones run once per example, without gradients.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, softplus

from editcore.instructedit import edit_gradients, mend, token_tree
from editcore.instructedit.token_tree import TreeBatch
from editcore.likelihood import BlockInputs, above
from editcore.model import n_layers, name_of
from editcore.suffix import head


@dataclass(frozen=True)
class EncodedExample:
    """What an example's losses need and the network does not change."""

    name: str               # of the record
    tree: TreeBatch         # a single row; pairs of edit, after, against, locality, from 0
    hidden: torch.Tensor    # (1, T, d) states that enter the lowest edited block
    part: torch.Tensor      # (M,) of which of the four each prediction is
    weight: torch.Tensor    # (M,) 1 / (tokens of the pair's target); negative for `opposed`
    counts: tuple           # pairs of each of the four
    condition: torch.Tensor | None  # (T', d) embeddings of the condition, if there is one


def encode_example(model, network, example):
    """Run the blocks below the edited ones on all that an example asks.

    ValueError names the record if it has no edit, nothing to say after it, or is too long.
    """
    label = f"record {example.name}"
    for part in ("edit", "after"):
        if not getattr(example, part):
            raise ValueError(f"{label}: {part} is empty")
    edit = example.edit + example.opposed
    parts = (edit, example.after, example.against, example.locality)
    pairs = sum(parts, ())
    token_tree.check_pairs(model, pairs, [label] * len(pairs))
    tree = token_tree.pack([token_tree.build(pairs)], next(model.parameters()).device)
    counts = tuple(map(len, parts))
    part = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(tree.pair.device)
    weight = 1 / torch.bincount(tree.pair)[tree.pair].double()
    opposed = (tree.pair >= len(example.edit)) & (tree.pair < len(edit))
    weight = torch.where(opposed, -weight, weight)
    inputs = edit_gradients.below(model, tree, min(network.settings["layers"]))
    return EncodedExample(example.name, tree, inputs.hidden, part[tree.pair], weight, counts,
                          mend.embeddings(model, example.condition))


@dataclass(frozen=True)
class Group:
    """Some EncodedExamples side by side in one row, and the unedited model's passes over it."""

    examples: tuple
    gradients: tuple        # per example {map: (u, delta)} of its edit
    unedited: torch.Tensor  # (P, d) final states at the places of locality
    tree: TreeBatch         # what is asked after the edits
    tokens: torch.Tensor    # (T',) of the row that are in it
    inputs: BlockInputs     # of the lowest edited block


def group(model, network, examples):
    """The Group of EncodedExamples: passes forward, and one back for the edits' gradients."""
    row = token_tree.beside([example.tree for example in examples])
    hidden = torch.cat([example.hidden for example in examples], 1)
    part, weight = (torch.cat([getattr(example, name) for example in examples])
                    for name in ("part", "weight"))

    def enter(predictions):
        tree, tokens = token_tree.only(row, predictions)
        lowest = min(network.settings["layers"])
        return tree, tokens, edit_gradients.below(model, tree, lowest, hidden[:, tokens])

    edit, tokens, inputs = enter(part == 0)
    places = edit.place.unique()
    with token_tree.last_mlp_at(model, places):
        found = edit_gradients.gradients(
            model, inputs, [site.name for site in network.sites], place=edit.place,
            token=edit.token, weight=weight[part == 0])
    sizes = _sizes(model, network, examples, tokens, places)
    split = {name: (u[0].split(sizes[name]), delta[0].split(sizes[name]))
             for name, (u, delta) in found.items()}
    own = [{name: (u[index], delta[index]) for name, (u, delta) in split.items()}
           for index in range(len(examples))]
    gradients = tuple(map(edit_gradients.nonzero, own))
    unedited = hidden.new_empty(0, hidden.shape[-1])
    if (part == 3).any():
        stay, _, inputs = enter(part == 3)
        places = stay.place.unique()
        with torch.no_grad(), token_tree.last_mlp_at(model, places):
            unedited = above(model, inputs)[0, places]
    return Group(tuple(examples), gradients, unedited, *enter(part > 0))


def _sizes(model, network, examples, tokens, places):
    """{map: [tokens of each example]} of a row of those tokens; the last MLP works at places."""
    ends = torch.tensor([example.hidden.shape[1] for example in examples]).cumsum(0)

    def shares(tokens):
        owner = torch.bucketize(tokens, ends.to(tokens.device), right=True)
        return torch.bincount(owner, minlength=len(ends)).tolist()

    every = shares(tokens)
    top = shares(tokens[places])
    last = name_of(model, "mlp", n_layers(model) - 1)
    return {site.name: top if site.name.startswith(last) else every for site in network.sites}


def losses(model, network, group, unlikely="token", observe=False):
    """For each example {"edit", "against", "locality"}: losses after its edit in nats; 0 for none.

    edit: mean over `after` of the mean-token NLL; against: mean over `against` of what
    `unlikely` says, see UNLIKELY; locality: mean-token KL(P_before || P_after). observe: the
    network sees the gradients of each example before it transforms them.
    """
    edits = []
    for gradients, example in zip(group.gradients, group.examples):
        if observe:
            network.observe(gradients)
        edits.append(network(gradients, example.condition))
    places, row = group.tree.place.unique(return_inverse=True)
    sizes = _sizes(model, network, group.examples, group.tokens, places)
    with mend.edited_forward(model, network, *edits, sizes=sizes), \
            token_tree.last_mlp_at(model, places):
        after = edit_gradients.logits(model, group.inputs, places).log_softmax(-1)    # (P, V)
    part = torch.cat([example.part for example in group.examples])
    stays, again = group.tree.place[part[part > 0] == 3].unique(return_inverse=True)
    divergence = after.new_empty(0)
    if len(stays):
        before = head(model, group.unedited).log_softmax(-1)
        divergence = kl_div(after[torch.searchsorted(places, stays)], before, reduction="none",
                            log_target=True).sum(-1)[again]
    log_p = after[row, group.tree.token]
    said = [int((example.part > 0).sum()) for example in group.examples]
    stay = [int((example.part == 3).sum()) for example in group.examples]
    return [_losses_of(*one, unlikely) for one in
            zip(group.examples, log_p.split(said), divergence.split(stay))]


def _losses_of(example, log_p, divergence, unlikely):
    """The losses of one example: see `losses`.

    log_p: of the tokens of after, against and locality; divergence: at those of locality.
    """
    asked = example.part > 0
    part, pair = example.part[asked], example.tree.pair[asked]
    weight = example.weight[asked].to(log_p.dtype)
    _, n_after, n_against, n_locality = example.counts
    edit = (-log_p[part == 1] * weight[part == 1]).sum() / max(n_after, 1)
    against = part == 2
    doubt = UNLIKELY[unlikely](log_p[against], weight[against],
                               pair[against] - sum(example.counts[:2]), edit)
    kl = divergence * weight[part == 3]
    return {"edit": edit, "against": doubt.sum() / max(n_against, 1),
            "locality": kl.sum() / max(n_locality, 1)}


def unlikelihood(log_p):
    """-log(1 - p) of log p, finite at p = 1."""
    log_p = log_p.clamp(max=-1e-6)
    near_one = torch.log(-torch.expm1(log_p))   # where the other form loses all digits
    return -torch.where(log_p > -0.7, near_one, torch.log1p(-log_p.exp()))


def of_replies(log_p, weight, pair):
    """Mean-token log p of each text."""
    count = int(pair.max()) + 1 if len(pair) else 0
    return log_p.new_zeros(count).index_add(0, pair, log_p * weight)


# (log p of tokens in `against`, 1 / tokens of their text, number of their text, the edit loss) ->
# terms whose sum is divided by the number of texts. token, reply: unlikelihood -log(1 - p), p of a
# reply the geometric mean of its tokens' p; contrast: -log z_sent of each reply (see scores.score).
UNLIKELY = {
    "token": lambda log_p, weight, pair, edit: unlikelihood(log_p) * weight,
    "reply": lambda log_p, weight, pair, edit: unlikelihood(of_replies(log_p, weight, pair)),
    "contrast": lambda log_p, weight, pair, edit: softplus(of_replies(log_p, weight, pair) + edit),
}
