"""editcore.branches: states and gradients on a tree of tokens equal those of the rows run one by one."""

import pytest
import torch
from conftest import make

from editcore import likelihood as logprob
from editcore.instructedit import token_tree as branches
from editcore.model import module_of, n_layers

ROWS = [(1, 2, 3, 4, 5), (1, 2, 3, 7, 8, 9), (1, 2, 3), (4, 4, 2), (1, 2, 3, 4, 5), (1, 9, 9, 9)]


def test_a_tree_holds_every_beginning_once():
    tree = branches.grow(ROWS)
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 4, 4, 2, 9, 9, 9]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 1, 2, 3]]
    assert [tuple(tree.ids[0, list(way)].tolist()) for way in tree.ways] == ROWS
    for way in tree.ways:
        for depth, place in enumerate(way):
            assert (tree.mask[0, 0, place] == 0).nonzero().flatten().tolist() == sorted(way[:depth + 1])


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("layer", [0, 2])
def test_states_equal_those_of_the_rows(kind, layer):
    model = make(kind, 50, dtype=torch.float64)
    tree = branches.grow(ROWS, torch.float64)
    made = logprob.above(model, branches.below(model, tree, layer))[0]
    for row, way in zip(ROWS, tree.ways):
        torch.testing.assert_close(made[list(way)], logprob.states(model, torch.tensor([row]))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_last_mlp_is_needed_at_the_places_that_are_read_only(kind):
    model = make(kind, 50, dtype=torch.float64)
    tree, last = branches.grow(ROWS, torch.float64), n_layers(model) - 1
    kept, places = branches.below(model, tree, 2), torch.tensor([tree.ways[0][-1], tree.ways[5][-1]])
    weight = module_of(model, "mlp_out", 2).weight.requires_grad_()
    found = []
    for few in (False, True):
        with branches.only(model, last, places if few else torch.arange(tree.ids.shape[1])):
            made = logprob.above(model, kept)[0, places]
        found.append((made, *torch.autograd.grad(made.square().sum(), [weight])))
    weight.requires_grad_(False)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not module_of(model, "mlp", last)._forward_hooks and not module_of(model, "mlp", last)._forward_pre_hooks
