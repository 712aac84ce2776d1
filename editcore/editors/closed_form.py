"""Keys, residuals and a second moment in; the closed-form update of one linear map out: what the family shares.

Every editor of the family minimises ‖(W + Δ) K − V‖² + (what is to be preserved), and so is one formula,

    Δ = R (weight·I + Kᵀ A⁺ K)⁻¹ (A⁺ K)ᵀ   with   R = V − W K,

with another A and weight (K (m, n) keys, C (m, m) second moment, d rows of W, p keys remembered):

    ROME       A = C, weight 0, one fact            arXiv:2202.05262 eq. 2 (equality constraint)
    EMMET      A = C, weight α                      arXiv:2403.14236
    MEMIT      A = C, weight λ                      arXiv:2210.07229 eq. 14: R Kᵀ (λC + K Kᵀ)⁻¹ by the push-through rule
    remembered A = C + K_p K_pᵀ / weight            λC → λC + K_p K_pᵀ
    ENCORE     A = C + (ridge / λ) I, weight λ      arXiv:2502.01636
    AlphaEdit  A⁺ = Q Qᵀ, weight λ                  arXiv:2410.02355; Q spans the eigenvectors of C under a threshold

So EMMET is MEMIT with λ = α, and AlphaEdit with Q = I and nothing remembered is MEMIT with C = I. All in float64.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bracket:
    """A⁺, by a Cholesky factor of A or by a basis."""

    lower: torch.Tensor | None = None   # (m, m) with A = lower lowerᵀ
    basis: torch.Tensor | None = None   # (m, r) orthonormal Q with A⁺ = Q Qᵀ

    def solve(self, keys):
        """A⁺ keys for rows of keys: (n, m) in, (n, m) out, float64."""
        keys = keys.double()
        if self.basis is not None:
            basis = self.basis.to(keys.device)
            return keys @ basis @ basis.T
        return torch.cholesky_solve(keys.T, self.lower.to(keys.device)).T


@dataclass(frozen=True)
class Memory:
    """Keys of earlier edits, with what solving beside them needs."""

    keys: torch.Tensor      # (p, m)
    solved: torch.Tensor    # (p, m): A⁺ keys
    lower: torch.Tensor     # (p, p) Cholesky factor of weight·I + K_pᵀ A⁺ K_p


def bracket(stats, name, ridge=0.0, null_space=0.0):
    """The Bracket of module `name`: C itself, C + ridge·I, or the projector on C's eigenvectors under `null_space`.

    ValueError if C is not positive definite where it must be, or no eigenvalue is under the threshold.
    """
    if null_space:
        values, vectors = torch.linalg.eigh(stats.moments[name].double())
        count = int((values < null_space).sum())
        if count == 0:
            raise ValueError(f"{name}: no eigenvalue of the second moment is under null_space {null_space}; they are "
                             f"{values[0]:.3g} to {values[-1]:.3g}")
        return Bracket(basis=vectors[:, :count])
    if ridge:
        moment = stats.moments[name].double()
        return Bracket(lower=torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype,
                                                                              device=moment.device)))
    return Bracket(lower=stats.factor(name))


def update(keys, solved, residual, weight, memory=None):
    """(left (n, d), right (n, m)) in float64 with Δ = leftᵀ right of the formula above.

    keys (n, m) are Kᵀ, solved (n, m) is (A⁺K)ᵀ, residual (n, d) is Rᵀ; memory: earlier keys that the update shall leave
    where they are, as far as `weight` lets it. ValueError if the facts' keys are linearly dependent and weight is 0.
    """
    keys, residual = keys.double(), residual.double()
    if memory is not None:      # A + K_p K_pᵀ / weight, inverted by the Woodbury identity
        cross = memory.keys @ solved.T
        solved = solved - torch.cholesky_solve(cross, memory.lower).T @ memory.solved
    small = _small(keys, solved, weight)
    lower, failed = torch.linalg.cholesky_ex(small)
    if failed:
        raise ValueError(f"the keys of {len(keys)} facts are linearly dependent: they cannot all be inserted exactly")
    return torch.cholesky_solve(residual, lower), solved


def remember(memory, bracket, keys, weight):
    """The Memory with `keys` (n, m) added; its factor grows by n rows instead of being computed anew.

    Deterministic: the same keys in the same portions give the same bits, so a killed run is taken up exactly.
    """
    if weight <= 0:
        raise ValueError("keys can only be remembered with a weight (λ) above 0")
    keys = keys.double()
    solved = bracket.solve(keys)
    corner = _small(keys, solved, weight)
    if memory is None:
        return Memory(keys, solved, torch.linalg.cholesky(corner))
    side = torch.linalg.solve_triangular(memory.lower, memory.keys @ solved.T, upper=False)     # (p, n)
    corner = torch.linalg.cholesky(corner - side.T @ side)
    top = torch.cat([memory.lower, torch.zeros_like(side)], 1)
    lower = torch.cat([top, torch.cat([side.T, corner], 1)], 0)
    return Memory(torch.cat([memory.keys, keys]), torch.cat([memory.solved, solved]), lower)


def _small(keys, solved, weight):
    """(n, n) weight·I + Kᵀ A⁺ K, symmetric."""
    small = keys @ solved.T
    return (small + small.T) / 2 + weight * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
