"""closed_form: every member of the family against a dense float64 least-squares problem."""

import math
from dataclasses import dataclass

import pytest
import torch

from editcore.editors import closed_form
from editcore.moments import Moments

M = 24
D = 7


@dataclass
class Problem:
    """A second moment C, keys (n, m), residuals (n, d) and earlier keys (p, m)."""

    count: int
    earlier: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        root = draw(M, M)
        self.moment = root @ root.T / M + 0.1 * torch.eye(M)
        self.moments = Moments({"a": self.moment}, 9)
        self.keys = draw(self.count, M)
        self.residual = draw(self.count, D)
        self.past = draw(self.earlier, M)

    def change(self, weight, memory=None, **settings):
        solved = closed_form.inverse(self.moments, "a", **settings).solve(self.keys)
        left, right = closed_form.update(self.keys, solved, self.residual, weight, memory)
        return left.T @ right

    def remembered(self, portions, weight, **settings):
        inverse = closed_form.inverse(self.moments, "a", **settings)
        memory = None
        for part in self.past.split(portions):
            memory = closed_form.remember(memory, inverse, part, weight)
        return memory

    def least_squares(self, *preserved):
        """argmin over Δ (d, m) of ‖Δ K − R‖² + Σ ‖Δ p‖² over the rows p, by one dense lstsq."""
        preserved = torch.cat(preserved)
        zeros = torch.zeros(len(preserved), D, dtype=torch.float64)
        rows = torch.cat([self.keys, preserved])
        wanted = torch.cat([self.residual, zeros])
        return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T

    def root(self, weight):
        """Rows p with Σ ‖Δ p‖² = tr(Δ weight·C Δᵀ)."""
        return torch.linalg.cholesky(weight * self.moment).T


@pytest.mark.parametrize("count", [1, 5, 40])
def test_memit_is_the_least_squares_solution(count):
    problem = Problem(count)
    found = problem.change(3.0)
    torch.testing.assert_close(found, problem.least_squares(problem.root(3.0)))
    bracket = 3.0 * problem.moment + problem.keys.T @ problem.keys
    expected = problem.residual.T @ problem.keys @ torch.linalg.inv(bracket)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("portions", [(6,), (1,) * 6, (2, 1, 3)])
def test_remembered_keys_are_preserved_too(portions):
    problem = Problem(4, earlier=6)
    memory = problem.remembered(portions, 3.0)
    expected = problem.least_squares(problem.root(3.0), problem.past)
    torch.testing.assert_close(problem.change(3.0, memory), expected)
    gram = problem.past @ torch.linalg.solve(problem.moment, problem.past.T)
    torch.testing.assert_close(memory.lower @ memory.lower.T, 3.0 * torch.eye(6) + gram)
    again = problem.remembered(portions, 3.0)
    assert torch.equal(memory.keys, problem.past) and torch.equal(memory.lower, again.lower)


def test_encore_adds_a_norm_term():
    problem = Problem(5)
    norm = 10.0 ** 0.5 * torch.eye(M, dtype=torch.float64)
    expected = problem.least_squares(problem.root(3.0), norm)
    torch.testing.assert_close(problem.change(3.0, ridge=10.0 / 3.0), expected)


def test_emmet_is_the_equality_constraint_and_rome_with_one_fact():
    problem = Problem(5)
    found = problem.change(0.0)
    torch.testing.assert_close(found @ problem.keys.T, problem.residual.T)      # met exactly
    keys = problem.keys
    inverse = torch.linalg.inv(problem.moment)      # KKT: Δ C = Λ Kᵀ, Δ K = R
    right = keys @ inverse
    expected = problem.residual.T @ torch.linalg.inv(right @ keys.T) @ right
    torch.testing.assert_close(found, expected)
    alone = Problem(1)
    u = torch.linalg.inv(alone.moment) @ alone.keys[0]
    expected = torch.outer(alone.residual[0], u) / (u @ alone.keys[0])
    torch.testing.assert_close(alone.change(0.0), expected)


@pytest.mark.parametrize("earlier", [0, 6])
def test_alphaedit_is_the_published_formula(earlier):
    problem = Problem(5, earlier)
    values, vectors = torch.linalg.eigh(problem.moment)
    limit = values[10:12].mean().item()
    projector = vectors[:, :11] @ vectors[:, :11].T
    memory = problem.remembered(6, 2.0, null_space=limit) if earlier else None
    gram = problem.past.T @ problem.past + problem.keys.T @ problem.keys
    bracket = gram @ projector + 2.0 * torch.eye(M)
    expected = problem.residual.T @ problem.keys @ projector @ torch.linalg.inv(bracket)
    found = problem.change(2.0, memory, null_space=limit)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ vectors[:, 11:], torch.zeros(D, M - 11).double())


def test_alphaedit_with_the_whole_space_is_memit_with_the_identity():
    problem = Problem(5)
    found = problem.change(2.0, null_space=1e9)
    problem.moments = Moments({"a": torch.eye(M)}, 9)
    torch.testing.assert_close(found, problem.change(2.0))


def test_errors():
    problem = Problem(2)
    problem.keys = problem.keys[:1].expand(2, -1)
    with pytest.raises(ValueError, match="keys of 2 facts are linearly dependent"):
        problem.change(0.0)
    with pytest.raises(ValueError, match="a: no eigenvalue .* is under null_space 1e-09; they are"):
        problem.change(1.0, null_space=1e-9)


@dataclass(frozen=True)
class Pair:
    mlp: torch.Tensor
    delta: torch.Tensor


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.75])
def test_rect_keeps_the_largest_relative_changes(pair, keep):
    change, weight = pair
    found = closed_form.rect(change, weight, keep)
    size = (change / weight).abs()
    rest = found == 0
    assert int((~rest).sum()) == 55 - int((1 - keep) * 54)
    assert torch.equal(found[~rest], change[~rest])
    assert size[~rest].min() > size[rest].max()
    weight[0, 0] = 0.0      # an infinite relative change comes first
    assert closed_form.rect(change, weight, 1 / 54)[0, 0] == change[0, 0]


@pytest.mark.parametrize("base", [1.2, 2.0])
def test_prune_restrains_singular_values_above_the_weights(pair, base):
    change, weight = pair
    limit = torch.linalg.svdvals(weight.double())[0].item()
    before = torch.linalg.svdvals(10 * change.double())
    after = torch.linalg.svdvals(closed_form.prune(10 * change, weight, base).double())
    expected = [limit + math.log(s / limit, base) if s > limit else s for s in before.tolist()]
    expected = torch.tensor(sorted(expected, reverse=True)).double()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(closed_form.prune(1e-3 * change, weight, base), 1e-3 * change)


def test_the_norm_anchor_keeps_the_direction_and_gives_up_what_is_far_longer(pair):
    values = Pair(*pair)
    before = values.mlp + values.delta
    norms = before.norm(dim=1) / torch.tensor([0.2, 0.5, 1.0, 1.9, 2.1, 9.0])
    found = values.mlp + closed_form.norm_anchor(values, norms, most=2).delta
    torch.testing.assert_close(found[:4].norm(dim=1), norms[:4])
    torch.testing.assert_close(torch.cosine_similarity(found, before)[:4], torch.ones(4))
    assert torch.equal(found[4:], values.mlp[4:])
