"""editcore.editors.solve: every member of the family against a dense float64 least-squares problem, and limit cases."""

import pytest
import torch

from editcore.editors import closed_form as solve
from editcore.moments import Moments

M, D, DRAW = 24, 7, 3


def given(count, earlier=0, seed=DRAW):
    """(Moments, C, keys (n, m), residual (n, d), earlier keys (p, m))."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(M, M, generator=draw, dtype=torch.float64)
    moment = root @ root.T / M + 0.1 * torch.eye(M)
    keys, residual, past = (torch.randn(n, w, generator=draw, dtype=torch.float64)
                            for n, w in ((count, M), (count, D), (earlier, M)))
    return Moments({"a": moment}, 9), moment, keys, residual, past


def change(stats, keys, residual, weight, memory=None, **how):
    left, right = solve.update(keys, solve.bracket(stats, "a", **how).solve(keys), residual, weight, memory)
    return left.T @ right


def least_squares(keys, residual, preserved):
    """argmin over Δ (d, m) of ‖Δ K − R‖² + Σ ‖Δ p‖² over the rows p of `preserved`, by one dense lstsq."""
    wanted = torch.cat([residual, torch.zeros(len(preserved), D, dtype=residual.dtype)])
    return torch.linalg.lstsq(torch.cat([keys, preserved]), wanted, driver="gelsd").solution.T


@pytest.mark.parametrize("count", [1, 5, 40])
def test_memit_is_the_least_squares_solution(count):
    stats, moment, keys, residual, _ = given(count)
    root = torch.linalg.cholesky(3.0 * moment).T       # Σ ‖Δ p‖² = tr(Δ λC Δᵀ)
    torch.testing.assert_close(change(stats, keys, residual, 3.0), least_squares(keys, residual, root))


@pytest.mark.parametrize("portions", [(6,), (1,) * 6, (2, 1, 3)])
def test_remembered_keys_are_preserved_too(portions):
    stats, moment, keys, residual, past = given(4, 6)
    bracket, memory = solve.bracket(stats, "a"), None
    for part in past.split(portions):
        memory = solve.remember(memory, bracket, part, 3.0)
    root = torch.linalg.cholesky(3.0 * moment).T
    expected = least_squares(keys, residual, torch.cat([root, past]))
    torch.testing.assert_close(change(stats, keys, residual, 3.0, memory), expected)
    assert torch.equal(memory.keys, past)
    small = 3.0 * torch.eye(6) + past @ torch.linalg.solve(moment, past.T)
    torch.testing.assert_close(memory.lower @ memory.lower.T, small)


def test_the_same_portions_give_the_same_bits():
    stats, _, _, _, past = given(1, 6)
    bracket, made = solve.bracket(stats, "a"), []
    for _ in range(2):
        memory = None
        for part in past.split(2):
            memory = solve.remember(memory, bracket, part, 3.0)
        made.append(memory)
    assert all(torch.equal(getattr(made[0], name), getattr(made[1], name)) for name in ("keys", "solved", "lower"))


def test_encore_adds_a_norm_term():
    stats, moment, keys, residual, _ = given(5)
    root = torch.linalg.cholesky(3.0 * moment).T
    expected = least_squares(keys, residual, torch.cat([root, 10.0 ** 0.5 * torch.eye(M, dtype=root.dtype)]))
    torch.testing.assert_close(change(stats, keys, residual, 3.0, ridge=10.0 / 3.0), expected)


def test_emmet_is_the_equality_constraint_and_rome_with_one_fact():
    stats, moment, keys, residual, _ = given(5)
    found = change(stats, keys, residual, 0.0)
    torch.testing.assert_close(found @ keys.T, residual.T)      # every fact is met exactly
    inverse = torch.linalg.inv(moment)                          # KKT: Δ C = Λ Kᵀ, Δ K = R
    expected = residual.T @ torch.linalg.inv(keys @ inverse @ keys.T) @ keys @ inverse
    torch.testing.assert_close(found, expected)
    one, u = change(stats, keys[:1], residual[:1], 0.0), inverse @ keys[0]
    torch.testing.assert_close(one, torch.outer(residual[0], u) / (u @ keys[0]))


def test_emmet_in_a_batch_is_memit_with_its_alpha_for_lambda():
    stats, moment, keys, residual, _ = given(5)
    inverse = torch.linalg.inv(moment)
    expected = residual.T @ torch.linalg.inv(keys @ inverse @ keys.T + 0.1 * torch.eye(5)) @ keys @ inverse
    torch.testing.assert_close(change(stats, keys, residual, 0.1), expected)


@pytest.mark.parametrize("earlier", [0, 6])
def test_alphaedit_is_the_published_formula(earlier):
    stats, moment, keys, residual, past = given(5, earlier)
    values, vectors = torch.linalg.eigh(moment)
    limit = values[10:12].mean().item()
    projector = vectors[:, :11] @ vectors[:, :11].T
    bracket = solve.bracket(stats, "a", null_space=limit)
    memory = solve.remember(None, bracket, past, 2.0) if earlier else None
    bracketed = past.T @ past @ projector + keys.T @ keys @ projector + 2.0 * torch.eye(M)
    expected = residual.T @ keys @ projector @ torch.linalg.inv(bracketed)
    found = change(stats, keys, residual, 2.0, memory, null_space=limit)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ vectors[:, 11:], torch.zeros(D, M - 11).double())    # C's large directions stay


def test_alphaedit_with_the_whole_space_is_memit_with_the_identity():
    stats, _, keys, residual, _ = given(5)
    identity = Moments({"a": torch.eye(M)}, 9)
    found = change(stats, keys, residual, 2.0, null_space=1e9)
    torch.testing.assert_close(found, change(identity, keys, residual, 2.0))


def test_errors():
    stats, _, keys, residual, past = given(4, 2)
    with pytest.raises(ValueError, match="keys of 2 facts are linearly dependent"):
        change(stats, keys[:1].expand(2, -1), residual[:2], 0.0)
    with pytest.raises(ValueError, match="a: no eigenvalue of the second moment is under null_space 1e-09; they are"):
        solve.bracket(stats, "a", null_space=1e-9)
    with pytest.raises(ValueError, match="weight .λ. above 0"):
        solve.remember(None, solve.bracket(stats, "a"), past, 0.0)
