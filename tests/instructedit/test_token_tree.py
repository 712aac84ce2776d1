"""Token trees: shared beginnings stand once; states equal those of the rows run one by one."""

import pytest
import torch
from conftest import make

from editcore import likelihood
from editcore.instructedit import edit_gradients, token_tree
from editcore.model import module_of, n_layers

PAIRS = [((1, 2), (3, 4, 5)), ((1, 2), (3, 6)), ((1, 2, 3), (7,)), ((9,), (2, 2))]


def test_what_texts_share_stands_once_and_prompt_ends_apart():
    tree = token_tree.build(PAIRS[:3], 10)
    assert tree.ids == [1, 2, 3, 4, 2, 3] and tree.parents == [-1, 0, 1, 2, 0, 4]
    assert tree.ends_prompt == [False, True, False, False, False, True]
    assert tree.predictions == [(1, 3, 10), (2, 4, 10), (3, 5, 10), (1, 3, 11), (2, 6, 11),
                                (5, 7, 12)]


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neox", "llama", "qwen3", "mistral"])
@pytest.mark.parametrize("layer", [0, 2])
def test_states_equal_those_of_the_rows(kind, layer):
    model = make(kind, 50, dtype=torch.float64)
    batch = token_tree.pack([token_tree.build(PAIRS[:3]), token_tree.build(PAIRS[3:], 3)])
    made = likelihood.above(model, edit_gradients.below(model, batch, layer)).flatten(0, 1)
    entry = 0
    for number, (prompt, target) in enumerate(PAIRS):
        states = likelihood.states(model,
                                   torch.tensor([[*prompt, *target[:-1]]]))[0, len(prompt) - 1:]
        part = slice(entry, entry + len(target))
        assert batch.token[part].tolist() == list(target)
        assert set(batch.pair[part].tolist()) == {number}
        torch.testing.assert_close(made[batch.place[part]], states, rtol=1e-5, atol=1e-6)
        entry += len(target)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_last_mlp_is_needed_at_the_places_that_are_read_only(kind):
    model = make(kind, 50, dtype=torch.float64)
    batch = token_tree.pack([token_tree.build(PAIRS)])
    inputs, places = edit_gradients.below(model, batch, 2), batch.place.unique()
    weight = module_of(model, "mlp_out", 2).weight.requires_grad_()
    found = []
    for few in (places, torch.arange(batch.ids.shape[1])):
        with token_tree.last_mlp_at(model, few):
            made = likelihood.above(model, inputs)[0, places]
        found.append((made, *torch.autograd.grad(made.square().sum(), [weight])))
    weight.requires_grad_(False)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not module_of(model, "mlp", n_layers(model) - 1)._forward_hooks


def test_bad_pairs_are_named():
    model = make("gpt2", 50)
    for pair, words in ((((3,), ()), "here: the target has no tokens"),
                        (((), (3,)), "here: the prompt has no tokens"),
                        (((3,) * 70, (4,)), "here: 70 tokens, but the model takes at most 64")):
        with pytest.raises(ValueError, match=words):
            token_tree.check_pairs(model, [pair], ["here"])
