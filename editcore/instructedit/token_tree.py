"""Lay out prompts and continuations as trees of tokens, so that what they share is computed once.

A causal model gives a token the same state whatever stands to its right. So all that is asked about
one edit is a single row: a tree in which each token sees those on its way from the root.
"""

import contextlib
from dataclasses import dataclass

import torch

from editcore.hooks import hooked
from editcore.model import max_length, n_layers, name_of
from editcore.tokens import check_lengths, pad


@dataclass(frozen=True)
class TokenTree:
    """(prompt ids, target ids) pairs as one tree: all but the last token of a target are nodes."""

    ids: list               # (T,) token of each node
    parents: list           # (T,) node that it follows; -1 begins a text
    ends_prompt: list       # (T,) bool, whether a prompt ends here
    predictions: list       # per target token (node that predicts it, token, number of its pair)


@dataclass(frozen=True)
class TreeBatch:
    """Trees as right-padded rows of one forward pass, and the predictions that are read."""

    ids: torch.Tensor           # (B, T)
    positions: torch.Tensor     # (B, T) tokens before each one on its way
    visible: torch.Tensor       # (B, T, T) bool, whether token t (dim 1) sees token s (dim 2)
    ends_prompt: torch.Tensor   # (B, T) bool, the last token of each prompt
    place: torch.Tensor         # (M,) position b * T + t that predicts a target token
    token: torch.Tensor         # (M,) the token
    pair: torch.Tensor          # (M,) number of the pair it belongs to, as given to `build`

    def mask(self, dtype):
        """(B, 1, T, T) mask that is added to attention scores."""
        zeros = torch.zeros(self.visible.shape, dtype=dtype, device=self.ids.device)
        return zeros.masked_fill(~self.visible, torch.finfo(dtype).min)[:, None]


def build(pairs, first=0):
    """Grow the TokenTree of pairs, which are numbered from `first`.

    A token that ends a prompt is another node than the same token on the way to a longer one: that
    is where edits with codebooks are looked up.
    """
    nodes = {}
    tree = TokenTree([], [], [], [])
    for number, (prompt, target) in enumerate(pairs, first):
        node = -1
        for place, token in enumerate([*prompt, *target[:-1]]):
            key = (node, token, place == len(prompt) - 1)
            if key not in nodes:
                nodes[key] = len(tree.ids)
                tree.ids.append(token)
                tree.parents.append(node)
                tree.ends_prompt.append(key[2])
            node = nodes[key]
            if place >= len(prompt) - 1:
                tree.predictions.append((node, target[place - len(prompt) + 1], number))
    return tree


def pack(trees, device="cpu"):
    """Lay trees out as the TreeBatch of one pass; predictions stay in the order of pairs."""
    ids, mask = pad([tree.ids for tree in trees])
    width = ids.shape[1]
    visible = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    ends = torch.zeros_like(mask, dtype=torch.bool)
    predictions = []
    for row, tree in enumerate(trees):
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                visible[row, node] |= visible[row, parent]
        ends[row, :len(tree.ids)] = torch.tensor(tree.ends_prompt)
        predictions += [(row * width + node, token, pair) for node, token, pair in tree.predictions]
    place, token, pair = torch.tensor(predictions).T
    parts = (ids, visible.sum(-1) - 1, visible, ends, place, token, pair)
    return TreeBatch(*(part.to(device) for part in parts))


def beside(batches):
    """TreeBatches of one row each as one row; predictions and pairs stay as they are."""
    widths = torch.tensor([0, *(batch.ids.shape[1] for batch in batches)])
    places = [batch.place + begin for batch, begin in zip(batches, widths.cumsum(0).tolist())]
    ids, positions, ends = (torch.cat([getattr(batch, name) for batch in batches], 1)
                            for name in ("ids", "positions", "ends_prompt"))
    visible = torch.block_diag(*(batch.visible[0] for batch in batches))[None]
    token, pair = (torch.cat([getattr(batch, name) for batch in batches])
                   for name in ("token", "pair"))
    return TreeBatch(ids, positions, visible, ends, torch.cat(places), token, pair)


def only(batch, predictions):
    """(TreeBatch, tokens (S,)): those of a single row that some predictions (M,) bool need."""
    needed = batch.visible[0, batch.place[predictions]].any(0)
    tokens = needed.nonzero()[:, 0]
    place = (needed.cumsum(0) - 1)[batch.place[predictions]]
    return TreeBatch(batch.ids[:, tokens], batch.positions[:, tokens],
                     batch.visible[:, tokens][..., tokens], batch.ends_prompt[:, tokens], place,
                     batch.token[predictions], batch.pair[predictions]), tokens


def check_pairs(model, pairs, labels):
    """ValueError names the label of a pair too long for the model, or with an empty side."""
    for label, (prompt, target) in zip(labels, pairs, strict=True):
        if not prompt or not target:
            raise ValueError(f"{label}: the {'target' if prompt else 'prompt'} has no tokens")
    check_lengths([[*prompt, *target[:-1]] for prompt, target in pairs], labels, max_length(model))


@contextlib.contextmanager
def last_mlp_at(model, places):
    """In the block, the last layer's MLP works at places (P,) of a single row; else it is 0.

    No other token's MLP reaches what is predicted there.
    """
    widths = []

    def gather(_, args):
        widths.append(args[0].shape[1])
        return (args[0][:, places], *args[1:])

    def scatter(_, args, output):
        return output.new_zeros(1, widths[-1], output.shape[-1]).index_copy(1, places, output)

    name = name_of(model, "mlp", n_layers(model) - 1)
    with hooked(model, {name: gather}, before=True), hooked(model, {name: scatter}):
        yield
