"""Token rows that begin alike in; one row that holds every beginning once, its positions and its mask, out.

A causal model gives a token the same state whatever stands to its right. So the rows of one example (a question with
many replies, questions that must stay) are laid out as a tree of tokens in one row, in which a token sees those on its
way from the root only: nothing is computed twice, and nothing is padded.
"""

import contextlib
from dataclasses import dataclass

import torch

from editcore.likelihood import enter
from editcore.model import name_of


@dataclass(frozen=True)
class Tree:
    """T tokens in one row."""

    ids: torch.Tensor           # (1, T)
    positions: torch.Tensor     # (1, T) tokens before it on its way
    mask: torch.Tensor          # (1, 1, T, T) added to attention scores: 0 where a token is on the way, else the lowest
    ways: tuple                 # for each row, the places of its tokens


def grow(rows, dtype=torch.float32, device="cpu"):
    """The Tree of token rows; equal beginnings of any two are the same tokens of it."""
    children, parents, ids, ways = [{}], [], [], []
    for row in rows:
        node, way = 0, []
        for token in row:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                parents.append(node - 1)
                ids.append(token)
            node = children[node][token]
            way.append(node - 1)
        ways.append(tuple(way))
    sees, depth = torch.eye(len(ids), dtype=torch.bool), []
    for place, parent in enumerate(parents):
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
        if parent >= 0:
            sees[place] |= sees[parent]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]
    return Tree(torch.tensor([ids], device=device), torch.tensor([depth], device=device), mask.to(device), tuple(ways))


def below(model, tree, layer):
    """The BlockInputs of a Tree: what the blocks from `layer` on need to run on it."""
    return enter(model, tree.ids[:, :0], tree.ids, layer, position_ids=tree.positions, attention_mask=tree.mask)


@contextlib.contextmanager
def only(model, layer, places):
    """In the block, the MLP of one layer works at the given places (P,) of a row alone; elsewhere it gives 0.

    In the last layer no other token's MLP reaches what is predicted there.
    """
    def gather(_, args):
        return (args[0][:, places], *args[1:])

    def scatter(_, args, output):
        return output.new_zeros(1, size[-1], output.shape[-1]).index_copy(1, places, output)

    def measure(_, args):
        size.append(args[0].shape[1])

    size, mlp = [], model.get_submodule(name_of(model, "mlp", layer))
    handles = [mlp.register_forward_pre_hook(measure), mlp.register_forward_pre_hook(gather),
               mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
