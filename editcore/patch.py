"""Parts of a Patch: what GRACE and CaliNet add beside a model's weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from editcore.model import is_input_first

MARGIN = 1e-5       # what a split leaves between two entries
SLACK = 1e-4        # relative, of a widened radius: the same input in another batch differs by rounding


@dataclass(frozen=True)
class Codebook:
    """At a linear map: an input within an entry's radius gets that entry's output (GRACE, arXiv:2211.11031)."""

    keys: torch.Tensor      # (k, in) inputs of the map
    values: torch.Tensor    # (k, out) outputs that take the place of its own
    radii: torch.Tensor     # (k,) Euclidean; a negative one is never hit
    labels: tuple           # (k,) texts: what the entries say
    kind: ClassVar = "codebook"

    def output(self, x, y, asked=None):
        """y (B, T, out) with the nearest entry's value where x (B, T, in) lies within its radius; y itself if nowhere.

        asked (B, T) bool: positions that are looked at; None: all.
        """
        if asked is None:
            asked = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        places = asked.to(x.device).nonzero(as_tuple=True)
        distance, index = self.nearest(x[places])
        hit = distance <= self.radii.to(x.device)[index]
        if not hit.any():
            return y
        return y.index_put(tuple(place[hit] for place in places), self.values.to(y.device, y.dtype)[index[hit]])

    def nearest(self, queries):
        """(distance (q,), entry (q,)) of the entry nearest to each query (q, in)."""
        keys = self.keys.to(queries.device)
        # not by |a|² + |b|² - 2ab, which loses small distances to rounding
        distances = torch.cdist(queries.to(keys.dtype), keys, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.min(1)

    def insert(self, key, value, label, radius):
        """The Codebook after one more edit: key (in,), value (out,), and the radius of an entry that stands alone.

        With d the distance to the nearest entry i: beyond radius + radius_i a new entry; nearer, with i's own label, i
        is widened to reach the key and keeps its value; with another label a new entry of radius d / 2, and i is split
        off at d / 2 - 1e-5. A key that equals i's (d ≤ 2e-5: nothing left to split) takes over i's value and label.
        """
        distance, nearest = (part.item() for part in self.nearest(key[None]))
        radii, values, labels = self.radii.clone(), self.values.clone(), list(self.labels)
        near = distance <= radius + radii[nearest].item()
        if near and labels[nearest] == label:
            radii[nearest] = max(radii[nearest].item(), distance * (1 + SLACK))
            return Codebook(self.keys, values, radii, self.labels)
        if near and distance <= 2 * MARGIN:
            values[nearest], labels[nearest] = value, label
            return Codebook(self.keys, values, radii, tuple(labels))
        if near:
            radii[nearest], radius = distance / 2 - MARGIN, distance / 2
        return Codebook(torch.cat([self.keys, key[None]]), torch.cat([values, value[None]]),
                        torch.cat([radii, radii.new_tensor([radius])]), (*labels, label))

    def __add__(self, other):
        """This codebook after the other's entries, one by one: sequential edits summed from the left."""
        total = self
        for key, value, radius, label in zip(other.keys, other.values, other.radii, other.labels, strict=True):
            total = total.insert(key, value, label, radius.item())
        return total

    def fits(self, module, width):
        """True if keys and values have the widths of the module's weight."""
        shape = getattr(module, "weight", self.radii).shape
        return tuple(shape if is_input_first(module) else shape[::-1]) == (self.keys.shape[1], self.values.shape[1])


@dataclass(frozen=True)
class Beside:
    """Slots beside an MLP: y + GELU(x Kᵀ) V (CaliNet, arXiv:2210.03329)."""

    keys: torch.Tensor      # (s, d) K
    values: torch.Tensor    # (s, d) V
    kind: ClassVar = "beside"

    def output(self, x, y, asked=None):
        """y (B, T, d) with the slots' answer to x (B, T, d) added, at every position."""
        keys, values = self.keys.to(x.device), self.values.to(x.device)
        return y + (torch.nn.functional.gelu(x.to(keys.dtype) @ keys.T) @ values).to(y.dtype)

    def __add__(self, other):
        """The slots of both, which is the sum of their answers."""
        return Beside(torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values]))

    def fits(self, module, width):
        """True if keys and values have the model's width."""
        return self.keys.shape[1] == self.values.shape[1] == width
