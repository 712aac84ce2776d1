"""The gradients of edits as factors: u at the inputs of maps, delta at their outputs.

    found = fact_gradients(model, tok, facts, names, layer)     # delta^T u: a map's dense gradient
"""

from functools import partial
from itertools import accumulate

import torch
from torch import nn

from editcore.hooks import hooked
from editcore.instructedit import token_tree
from editcore.likelihood import above, enter
from editcore.model import batch_tokens
from editcore.suffix import head, quick
from editcore.tokens import batches, encode_pairs


def below(model, batch, layer, hidden=None):
    """What the blocks from `layer` on need to run on a TreeBatch; no edit of them changes it.

    hidden: the states that enter block `layer`, where they are known.
    """
    dtype = next(model.parameters()).dtype
    return enter(model, batch.ids, layer, hidden, position_ids=batch.positions,
                 attention_mask=batch.mask(dtype))


def logits(model, inputs, place):
    """(M, V) logits at places of a batch, in float32 or better, from what `below` gave."""
    return head(model, above(model, inputs).flatten(0, 1)[place])


def gradients(model, inputs, names, *, place, token, weight):
    """{map: (u (B, T, d_in), delta (B, T, d_out))}: inputs, and gradients at the outputs, of maps.

    The loss is the sum over predictions of weight (M,) times the NLL of token (M,) at place (M,).
    One pass forward and one back; no gradient of a parameter is formed.
    """
    seen = {}

    def watch(name, module, args, output):
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen[name] = (args[0].detach(), output)
        return output

    with hooked(model, {name: partial(watch, name) for name in names}), torch.enable_grad():
        nll = nn.functional.cross_entropy(logits(model, inputs, place), token, reduction="none")
        loss = (nll * weight.to(nll.dtype)).sum()
        slopes = torch.autograd.grad(loss, [seen[name][1] for name in names])
    return {name: (seen[name][0], slope) for name, slope in zip(names, slopes)}


def nonzero(found):
    """{map: (u (R, d_in), delta (R, d_out))} of the tokens where neither is all zero."""
    pairs = {}
    for name, (u, delta) in found.items():
        used = (u != 0).any(-1) & (delta != 0).any(-1)
        pairs[name] = (u[used], delta[used])
    return pairs


def fact_gradients(model, tok, facts, names, layer):
    """For each fact {map: (u (R, d_in), delta (R, d_out))}: gradients of its mean-token NLL.

    That of an unwanted continuation is subtracted. names: of the maps, all in blocks from `layer`
    on. ValueError names a fact that is too long.
    """
    answers = [[fact.target_new, fact.unwanted] if fact.unwanted else [fact.target_new]
               for fact in facts]
    texts = [(fact.text, answer) for fact, own in zip(facts, answers) for answer in own]
    labels = [f"record {fact.case_id}" for fact, own in zip(facts, answers) for _ in own]
    pairs = encode_pairs(tok, texts, labels)
    token_tree.check_pairs(model, pairs, labels)
    device = next(model.parameters()).device
    signs = [sign for own in answers for sign in (1, -1)[:len(own)]]
    weights = torch.tensor([sign / len(target) for sign, (_, target) in zip(signs, pairs)],
                           dtype=torch.float64, device=device)
    starts = accumulate(map(len, answers), initial=0)
    trees = [token_tree.build(pairs[start:start + len(own)], start)
             for own, start in zip(answers, starts)]
    found = [None] * len(facts)
    for group in batches([len(tree.ids) for tree in trees], 8 * batch_tokens(device)):
        batch = token_tree.pack([trees[i] for i in group], device)
        with quick(model):
            slopes = gradients(model, below(model, batch, layer), names, place=batch.place,
                               token=batch.token, weight=weights[batch.pair])
        for row, i in enumerate(group):
            found[i] = nonzero({name: (u[row], delta[row])
                                for name, (u, delta) in slopes.items()})
    return found
