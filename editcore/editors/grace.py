"""GRACE: a codebook at one linear map that answers the edited prompts only (arXiv:2211.11031).

The key of a fact is the map's input at the prompt's last token, its value a vector that takes the
place of the map's output there, trained until the target follows. Keys do not depend on what a
codebook at the same map holds already, so that `total + edit(...)` is one long codebook. Where it
is looked up afterwards: see `delta.Patch.applied`.
"""

import zlib
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from editcore.delta import Patch
from editcore.editors.settings import positive, whole
from editcore.editors.target_value import adam
from editcore.editors.teacher_forcing import check_finite, encode_batch, nll
from editcore.hooks import capture, replaced
from editcore.model import batch_tokens, in_out, name_of
from editcore.suffix import head, quick, resume, start
from editcore.tokens import batches

MARGIN = 1e-5       # what a split leaves between two entries
SLACK = 1e-4        # relative, of a widened radius: inputs differ by rounding from batch to batch


@dataclass(frozen=True)
class Settings:
    """Settings of GRACE; layer and part have no default."""

    layer: whole(0, 999)        # the layer with the codebook
    part: Literal["mlp_in", "mlp_out"]      # its linear map
    radius: positive() = 1.0    # ε of a new entry that stands alone, in units of the map's input
    lr: positive(1000) = 1.0    # of Adam on the value
    steps: whole(1, 10**5) = 100    # of Adam, all of them taken
    begin: Literal["own", "random"] = "own"     # value before training: the map's output; in [0, 1)
    seed: whole() = 0           # of random values; each fact draws its own


PAPER = {   # published settings by model
    "gpt2-xl": {"layer": 35, "part": "mlp_in"},
    "llama-2-7b": {"layer": 27, "part": "mlp_out"},
    "pocket": {"layer": 3, "part": "mlp_in"},   # not published: as deep as in gpt2-xl
    "smollm2": {"layer": 25, "part": "mlp_out"},    # not published: as deep as in llama-2-7b
}


@dataclass(frozen=True)
class Codebook:
    """A part of a Patch: an input within an entry's radius gets that entry's output."""

    keys: torch.Tensor      # (k, in) inputs of the map
    values: torch.Tensor    # (k, out) outputs that take the place of its own
    radii: torch.Tensor     # (k,) Euclidean; a negative one is never hit
    labels: tuple           # (k,) texts: what the entries say
    kind: ClassVar = "codebook"

    def output(self, x, y, positions=None):
        """Return y (B, T, out), the nearest value where x (B, T, in) lies within its radius.

        positions (B, T) bool: which are looked up; None: all.
        """
        if positions is None:
            positions = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        places = positions.to(x.device).nonzero(as_tuple=True)
        distance, index = self.nearest(x[places])
        hit = distance <= self.radii.to(x.device)[index]
        if not hit.any():
            return y
        values = self.values.to(y.device, y.dtype)[index[hit]]
        return y.index_put(tuple(place[hit] for place in places), values)

    def nearest(self, queries):
        """Return (distance (q,), entry (q,)) of the entry nearest to each query (q, in)."""
        keys = self.keys.to(queries.device)
        # not by |a|² + |b|² - 2ab, which loses small distances to rounding
        distances = torch.cdist(queries.to(keys.dtype), keys,
                                compute_mode="donot_use_mm_for_euclid_dist")
        return distances.min(1)

    def insert(self, key, value, label, radius):
        """Return the Codebook with one more edit: key (in,), value (out,), radius if it is lonely.

        With d the distance to the nearest entry i: beyond radius + radius_i a new entry; nearer,
        with i's own label, i is widened to reach the key and keeps its value; with another label a
        new entry of radius d / 2, and i is split off at d / 2 - 1e-5. A key that equals i's (d <=
        2e-5: nothing left to split) takes over i's value and label.
        """
        distance, nearest = (part.item() for part in self.nearest(key[None]))
        radii = self.radii.clone()
        near = distance <= radius + radii[nearest].item()
        if near and self.labels[nearest] == label:
            radii[nearest] = max(radii[nearest].item(), distance * (1 + SLACK))
            return Codebook(self.keys, self.values, radii, self.labels)
        if near and distance <= 2 * MARGIN:
            values = self.values.clone()
            values[nearest] = value
            labels = (*self.labels[:nearest], label, *self.labels[nearest + 1:])
            return Codebook(self.keys, values, radii, labels)
        if near:
            radii[nearest] = distance / 2 - MARGIN
            radius = distance / 2
        return Codebook(torch.cat([self.keys, key[None]]), torch.cat([self.values, value[None]]),
                        torch.cat([radii, radii.new_tensor([radius])]), (*self.labels, label))

    def __add__(self, other):
        """Insert the other's entries behind this codebook's, one by one."""
        total = self
        for entry in zip(other.keys, other.values, other.labels, other.radii.tolist(), strict=True):
            total = total.insert(*entry)
        return total

    def fits(self, module, width):
        """Say whether there are as many of all, and they have the widths of the module's weight."""
        n = len(self.labels)
        linear = getattr(getattr(module, "weight", None), "ndim", 0) == 2
        widths = in_out(module) if linear else (0, 0)
        shapes = [tuple(part.shape) for part in (self.keys, self.values, self.radii)]
        return shapes == [(n, widths[0]), (n, widths[1]), (n,)]


def edit(model, tok, facts, config, prepared=None):
    """Return a Patch of all facts, inserted in their order."""
    patches = edit_each(model, tok, facts, config)
    info = {"editor": "grace", "nll": [patch.info["nll"][0] for patch in patches]}
    return replace(sum(patches[1:], patches[0]), info=info)


def edit_each(model, tok, facts, config, prepared=None):
    """Return one Patch per fact; the values are trained as many at a time as suit the device."""
    batch = encode_batch(model, tok, facts)
    device = batch.ids.device
    patches = {}
    for indices in batches(batch.mask.sum(1).tolist(), 4 * batch_tokens(device)):
        rows = batch.rows(torch.tensor(indices, device=device))
        with quick(model):
            results = train_values(model, rows, [facts[i] for i in indices], config)
        for index, key, value, loss in zip(indices, *results):
            book = Codebook(key[None], value[None], key.new_tensor([config.radius]),
                            (facts[index].target_new.strip(),))
            patches[index] = Patch({name_of(model, config.part, config.layer): book},
                                   {"editor": "grace", "nll": [loss.item()]})
    return [patches[index] for index in range(len(facts))]


def train_values(model, batch, facts, config):
    """Return (keys (n, in), values (n, out), loss (n,) before the last step), each fact on its own.

    Adam in float32 or better on the mean-token NLL of the targets of the Batch; only what lies
    above the map, from the prompt's last token on, is run.
    """
    name = name_of(model, config.part, config.layer)
    state = start(model, batch.ids, batch.mask, begin=batch.begin, layer=config.layer - 1,
                  wanted=batch.offsets, apart=True)
    with (torch.no_grad(), capture(model, [name], "input", stop=False) as inputs,
          capture(model, [name], stop=False) as outputs):
        resume(model, state, state.hidden)
    wide = torch.promote_types(outputs[name].dtype, torch.float32)
    values = outputs[name][:, 0].to(wide, copy=True)
    if config.begin == "random":
        for value, fact in zip(values, facts):
            seed = zlib.crc32(f"{config.seed} {fact.case_id}".encode())
            value.copy_(torch.rand(len(value), generator=torch.Generator().manual_seed(seed)))
    moments = (torch.zeros_like(values), torch.zeros_like(values))
    loss = torch.full((len(values),), torch.nan)
    for step in range(config.steps):
        live = values.clone().requires_grad_()

        def answer(h, live=live):
            return torch.cat([live[:, None].to(h.dtype), h[:, 1:]], 1)

        with replaced(model, name, answer):
            loss = nll(head(model, resume(model, state, state.hidden)), batch)
        check_finite(loss, facts, step + 1)
        (gradient,) = torch.autograd.grad(loss.sum(), live)
        adam(values, moments, gradient, step=step + 1, lr=config.lr)
    return inputs[name][:, 0].to(wide), values, loss.detach()
