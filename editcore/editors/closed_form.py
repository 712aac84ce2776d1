"""Solve the closed-form update that MEMIT and its kin share.

ROME is the special case of one fact; rome.py computes it itself, as its public code mixes two
keys.

Every editor of the family minimises ‖(W + Δ) K − V‖² + (what is to be preserved), and so is one
formula,

    Δ = R (weight·I + Kᵀ A⁺ K)⁻¹ (A⁺ K)ᵀ   with   R = V − W K,

with another A and weight (K (m, n) keys, C (m, m) second moment, d rows of W, p keys remembered):

    ROME       A = C, weight 0, one fact            arXiv:2202.05262 eq. 2 (equality constraint)
    EMMET      A = C, weight α                      arXiv:2403.14236
    MEMIT      A = C, weight λ                      arXiv:2210.07229 eq. 14: R Kᵀ (λC + K Kᵀ)⁻¹,
                                                    by the push-through rule
    remembered A = C + K_p K_pᵀ / weight            λC → λC + K_p K_pᵀ
    ENCORE     A = C + (ridge / λ) I, weight λ      arXiv:2502.01636
    AlphaEdit  A⁺ = Q Qᵀ, weight λ                  arXiv:2410.02355; Q spans the eigenvectors of C
                                                    under a threshold

So EMMET is MEMIT with λ = α, and AlphaEdit with Q = I and nothing remembered is MEMIT with C = I.
RECT, PRUNE and the norm anchor (NAS) make an update milder. All in float64.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Inverse:
    """A⁺, by a Cholesky factor of A or by a basis."""

    lower: torch.Tensor | None = None   # (m, m) with A = lower lowerᵀ
    basis: torch.Tensor | None = None   # (m, r) orthonormal Q with A⁺ = Q Qᵀ

    def solve(self, keys):
        """Return A⁺ keys for rows of keys: (n, m) in, (n, m) out, float64."""
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


def inverse(moments, name, ridge=0.0, null_space=0.0):
    """Return the Inverse of a module: of C, of C + ridge·I, or by C's eigenvectors < null_space."""
    if null_space:
        values, vectors = torch.linalg.eigh(moments.moments[name].double())
        count = int((values < null_space).sum())
        if count == 0:
            raise ValueError(f"{name}: no eigenvalue of the second moment is under null_space "
                             f"{null_space}; they are {values[0]:.3g} to {values[-1]:.3g}")
        return Inverse(basis=vectors[:, :count])
    if ridge:
        moment = moments.moments[name].double()
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        return Inverse(lower=torch.linalg.cholesky(moment + ridge * identity))
    return Inverse(lower=moments.factor(name))


def update(keys, solved, residual, weight, memory=None):
    """Return (left (n, d), right (n, m)) in float64 with Δ = leftᵀ right of the formula above.

    keys (n, m): Kᵀ; solved (n, m): (A⁺K)ᵀ; residual (n, d): Rᵀ; memory: earlier keys that shall
    stay. ValueError if the keys are linearly dependent and weight is 0.
    """
    keys = keys.double()
    if memory is not None:      # A + K_p K_pᵀ / weight, inverted by the Woodbury identity
        cross = memory.keys @ solved.T
        solved = solved - torch.cholesky_solve(cross, memory.lower).T @ memory.solved
    lower, failed = torch.linalg.cholesky_ex(_gram(keys, solved, weight))
    if failed:
        raise ValueError(f"the keys of {len(keys)} facts are linearly dependent: they cannot all "
                         "be inserted exactly")
    return torch.cholesky_solve(residual.double(), lower), solved


def remember(memory, inverse, keys, weight):
    """Return the Memory with `keys` (n, m) added, for a weight above 0.

    The same keys in the same portions give the same bits, so that a killed run is taken up exactly.
    """
    keys = keys.double()
    solved = inverse.solve(keys)
    corner = _gram(keys, solved, weight)
    if memory is None:
        return Memory(keys, solved, torch.linalg.cholesky(corner))
    cross = memory.keys @ solved.T                                              # (p, n)
    side = torch.linalg.solve_triangular(memory.lower, cross, upper=False)      # (p, n)
    corner = torch.linalg.cholesky(corner - side.T @ side)
    top = torch.cat([memory.lower, torch.zeros_like(side)], 1)
    lower = torch.cat([top, torch.cat([side.T, corner], 1)], 0)
    return Memory(torch.cat([memory.keys, keys]), torch.cat([memory.solved, solved]), lower)


def _gram(keys, solved, weight):
    """(n, n) weight·I + Kᵀ A⁺ K, symmetric."""
    gram = keys @ solved.T
    identity = torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    return (gram + gram.T) / 2 + weight * identity


def rect(change, weight, keep):
    """Keep the share `keep` of entries with the largest |ΔW_ij / W_ij|: RECT, arXiv:2401.04700."""
    size = (change.double() / (weight.double() + 1e-8)).abs()
    rank = max(1, int((1 - keep) * size.numel()))
    limit = size.flatten().kthvalue(rank).values    # which itself is kept, as in the public code
    return torch.where(size >= limit, change, torch.zeros_like(change))


def prune(change, weight, base):
    """Restrain the singular values of the total `change` of `weight`: PRUNE, arXiv:2405.16821.

    With s the largest singular value of the unedited weight, those of the change above s become s +
    log_base(σ / s). The result belongs on the *unedited* weight.
    """
    limit = torch.linalg.matrix_norm(weight.double(), ord=2)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    if not (values > limit).any():
        return change
    mild = limit + torch.log(values / limit) / torch.log(torch.tensor(base).double())
    return ((left * torch.where(values > limit, mild, values)) @ right).to(change.dtype)


def norm_anchor(values, norms, most):
    """Rescale v* = mlp + δ to `norms` (n,): NAS, arXiv:2602.02543.

    Directions stay; a v* longer than `most` times its norm is given up, and δ is 0.
    """
    v_star = values.mlp + values.delta
    scale = (norms.to(v_star) / v_star.norm(dim=1))[:, None]
    delta = torch.where(most * scale < 1, torch.zeros_like(v_star), scale * v_star - values.mlp)
    return replace(values, delta=delta)
