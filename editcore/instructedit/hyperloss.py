"""Edits and what is asked of them in; the losses of a hypernetwork's edits, with gradients for its weights, out.

Each example is edited as at test time, by a low-rank change that is never added to a weight; what the edited model says
then is compared with what it should say (MEND, arXiv:2110.11309, section 3.3; ConvSent: arXiv:2206.06520, section 5).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from editcore.hooks import capture
from editcore.instructedit import hypernet, ke, mend
from editcore.instructedit import token_tree as branches
from editcore.model import layout, n_layers
from editcore.suffix import fused, head
from editcore.tokens import encode, target_ids


@dataclass(frozen=True)
class Example:
    """One edit and what is asked of it, as (prompt ids, target ids) pairs."""

    name: object            # of the record, for errors and the log
    edit: tuple             # the edit: the gradients of their mean-token NLL, summed, are what is transformed
    after: tuple            # must be likely after it: the edit itself, or its rephrases, or replies of its sentiment
    locality: tuple = ()    # over these targets' positions the prediction must stay
    against: tuple = ()     # must be unlikely after it: replies of the other sentiment
    condition: tuple = ()   # ids of the text that KE reads an edit off; () for MEND


@dataclass(frozen=True)
class Laid:
    """What an example's losses need of the unedited model."""

    found: dict             # mend.tokens of the edit
    rows: mend.Rows         # after, against and locality, in this order, all on one row (see `branches`)
    kept: object            # what the blocks above need to run on them
    counts: tuple           # pairs of each of the three
    base: torch.Tensor      # (P, d) unedited final states at the locality places
    condition: torch.Tensor | None  # (T, d) embeddings of the example's, if it has one


@dataclass(frozen=True)
class Kind:
    """One way in which a hypernetwork makes an edit."""

    begin: Callable         # (sites, settings) -> an untrained Network
    factors: Callable       # (Network, Laid) -> the factors that mend.stepped takes


KINDS = {   # by the format of a network's file
    hypernet.FORMAT: Kind(hypernet.start, lambda network, laid: mend.factors(network, laid.found)),
    ke.FORMAT: Kind(ke.begin, lambda network, laid: ke.factors(network, laid.condition, laid.found)),
}


def kind_of(network):
    """(format, its Kind) of a Network."""
    name = network.settings.get("format", hypernet.FORMAT)
    return name, KINDS[name]


def pairs(tok, texts):
    """(prompt ids, target ids) pairs of (prompt, target) texts."""
    prompts = encode(tok, [prompt for prompt, _ in texts])
    return tuple((tuple(ids), tuple(target_ids(tok, target))) for ids, (_, target) in zip(prompts, texts))


def lay(model, network, example):
    """The Laid of an example, from one pass forward, and one back for the edit's gradients.

    ValueError names the record if it has no edit, nothing to say after it, or a row too long for the model.
    """
    label = f"record {example.name}"
    for part in ("edit", "after"):
        if not getattr(example, part):
            raise ValueError(f"{label}: {part} is empty")
    asked = (example.edit, example.after, example.against, example.locality)
    counts, together = tuple(map(len, asked)), sum(map(tuple, asked), ())
    tree = branches.grow(mend.inputs_of(model, together, [label] * len(together)), *_where(model))
    every = mend.read_at(tree.ids, together, tree.ways)
    kept = branches.below(model, tree, min(network.settings["layers"]))
    norm, names = layout(model).norm, [site.name for site in network.sites]
    with capture(model, [norm], stop=False) as final, _above(model, every):
        found = mend.tokens(mend.gradients(model, kept, _some(every, 0, counts[0]), names))
    rows, stay = _some(every, counts[0], sum(counts)), _some(every, sum(counts[:3]), sum(counts))
    return Laid(found, rows, kept, counts[1:], final[norm][0, stay.place].detach(),
                ke.embeddings(model, list(example.condition)) if example.condition else None)


def _where(model):
    """(dtype, device) of a model."""
    weight = next(model.parameters())
    return weight.dtype, weight.device


def _above(model, rows):
    """Where the last layer's MLP has to work: the places that are read."""
    return branches.only(model, n_layers(model) - 1, rows.place.unique())


def _some(rows, first, end):
    """The Rows of pairs first to end - 1, counted from 0 again."""
    kept = (rows.pair >= first) & (rows.pair < end)
    return mend.Rows(rows.ids, rows.place[kept], rows.token[kept], rows.pair[kept] - first, rows.weight[kept])


def edit(model, network, example):
    """The Delta of an example's edit alone, as the `mend` editor makes it of a fact."""
    laid = lay(model, network, example)
    return mend.change(model, network, kind_of(network)[1].factors(network, laid))


def losses(model, network, laid, unlikely="token"):
    """{"edit": mean over `after` of the mean-token NLL, "against": mean over `against` of the unlikelihood,

    "locality": over `locality` of the mean-token KL(P_before || P_after)} after the edit, scalars in nats; 0 for none.
    unlikely: a key of UNLIKELY, what p is in the unlikelihood -log(1 - p).
    """
    with mend.stepped(model, network, kind_of(network)[1].factors(network, laid)), _above(model, laid.rows):
        logits = mend.logits(model, laid.kept, laid.rows)
    first, second = laid.counts[0], laid.counts[0] + laid.counts[1]
    pair, token = laid.rows.pair, laid.rows.token
    likely, unlike, stay = pair < first, (pair >= first) & (pair < second), pair >= second
    weight = laid.rows.weight.to(logits.dtype)
    nll = cross_entropy(logits[likely], token[likely], reduction="none") * weight[likely]
    against = UNLIKELY[unlikely](-cross_entropy(logits[unlike], token[unlike], reduction="none"), weight[unlike],
                                 pair[unlike] - first)
    before, after = head(model, laid.base).log_softmax(-1), logits[stay].log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1) * weight[stay]
    return {name: value.sum() / max(count, 1) for name, value, count in
            zip(("edit", "against", "locality"), (nll, against, kl), laid.counts)}


def doubt_replies(log_p, weight, pair):
    """-log(1 - p) of whole texts, p the geometric mean of their tokens' probabilities; pair: which text each is of."""
    count = int(pair.max()) + 1 if len(pair) else 0
    return doubt(log_p.new_zeros(count).index_add(0, pair, log_p * weight))


def doubt(log_p):
    """-log(1 - p) of log p, finite at p = 1: the unlikelihood of what should not be said."""
    log_p = log_p.clamp(max=-1e-6)
    near_one = torch.log(-torch.expm1(log_p))       # each of the two forms loses all digits where the other is exact
    return -torch.where(log_p > -0.7, near_one, torch.log1p(-log_p.exp()))


# (log p of tokens, 1 / tokens of their text, which text) -> numbers whose sum is the unlikelihood, summed over texts.
UNLIKELY = {"token": lambda log_p, weight, pair: doubt(log_p) * weight, "reply": doubt_replies}


@torch.no_grad()
def evaluate(model, network, examples, unlikely="token"):
    """Mean of each of `losses` over examples, as floats; nothing is learned, the normaliser stays."""
    with fused(model):
        found = [losses(model, network, lay(model, network, one), unlikely) for one in examples]
    return {name: sum(one[name].item() for one in found) / len(found) for name in found[0]}
