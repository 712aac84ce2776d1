"""editcore.editors.restrain: RECT, PRUNE and the anchor against their definitions, written out."""

import math
from dataclasses import dataclass

import pytest
import torch

from editcore.editors import restrain


def pair(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(6, 9, generator=draw), torch.randn(6, 9, generator=draw)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.75])
def test_rect_keeps_the_largest_relative_changes(keep):
    change, weight = pair()
    found, size = restrain.rect(change, weight, keep), (change / weight).abs()
    kept = found != 0
    assert int(kept.sum()) == round(keep * 54) and torch.equal(found[kept], change[kept])
    assert size[kept].min() > size[~kept].max()


def test_rect_of_everything_and_of_zero_weights():
    change, weight = pair()
    assert restrain.rect(change, weight, 1.0) is change
    weight[0, 0] = 0.0      # an infinite relative change comes first
    assert restrain.rect(change, weight, 1 / 54)[0, 0] == change[0, 0]


@pytest.mark.parametrize("base", [1.2, 2.0])
def test_prune_restrains_singular_values_above_the_weights(base):
    change, weight = pair()
    limit = torch.linalg.svdvals(weight.double())[0].item()
    before = torch.linalg.svdvals(10 * change.double())
    after = torch.linalg.svdvals(restrain.prune(10 * change, weight, base).double())
    expected = [limit + math.log(s / limit, base) if s > limit else s for s in before.tolist()]
    torch.testing.assert_close(after, torch.tensor(sorted(expected, reverse=True)).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(restrain.prune(1e-3 * change, weight, base), 1e-3 * change)


@dataclass(frozen=True)
class Pair:
    h0: torch.Tensor
    delta: torch.Tensor


def test_the_anchor_keeps_the_direction():
    h0, delta = pair()
    found = restrain.anchored(Pair(h0, delta), torch.arange(1.0, 7.0))
    new, old = h0 + found.delta, h0 + delta
    torch.testing.assert_close(new.norm(dim=1), torch.arange(1.0, 7.0))
    torch.testing.assert_close(torch.cosine_similarity(new, old), torch.ones(6))
