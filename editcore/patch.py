"""Additions beside a model's weights in; sums, files and a model that works with them, its weights untouched, out.

The sibling of `delta` for editors that add something instead of changing a weight. A Patch holds a part for each module
it works on, and hooks that module's output while it is applied:

    with patch.applied(model):
        model(input_ids=ids)
"""

import contextlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.files import atomic
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


PARTS = {"codebook": Codebook, "beside": Beside}    # names of kinds in files


@dataclass(frozen=True)
class Patch:
    """What an edit adds beside the weights: module name -> Codebook or Beside."""

    parts: dict
    info: dict = field(default_factory=dict)    # settings, timings: strings, numbers, lists

    def __add__(self, other):
        """Both, module by module. ValueError if a module has parts of two kinds."""
        parts = self.parts | {name: part for name, part in other.parts.items() if name not in self.parts}
        for name in self.parts.keys() & other.parts.keys():
            if type(self.parts[name]) is not type(other.parts[name]):
                raise ValueError(f"patch: {name} has a part of another kind already")
            parts[name] = self.parts[name] + other.parts[name]
        return Patch(parts, dict(self.info or other.info))

    def norm(self, name=None):
        """Frobenius norm of the values of one module's part, or of all together, a float computed in float64."""
        parts = self.parts.values() if name is None else [self.parts[name]]
        return sum(part.values.detach().double().square().sum().item() for part in parts) ** 0.5

    def is_finite(self):
        """False if any entry is NaN or infinite."""
        return all(bool(torch.isfinite(value).all()) for part in self.parts.values()
                   for value in vars(part).values() if torch.is_tensor(value))

    @contextlib.contextmanager
    def applied(self, model, asked=None):
        """In the block the model works with the patch; its weights stay untouched, and on exit its hooks are gone.

        asked: for each pass of the model in the block (B, T) bool, the positions at which a codebook is looked up, read
        from the right where a pass has more tokens (as `prompt_ends` gives them). None: at every position of every
        pass. What is added at a position then depends on the tokens up to it alone, so padded rows, cached generation
        and continuations scored together agree. ValueError names a module that the model lacks or that does not fit.
        """
        self.check(model)
        handles = [model.get_submodule(name).register_forward_hook(_hook(part, asked))
                   for name, part in self.parts.items()]
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    def check(self, model):
        """ValueError if the model lacks a module or its widths differ."""
        modules = dict(model.named_modules())
        for name, part in self.parts.items():
            if name not in modules:
                raise ValueError(f"patch: the model has no module {name}")
            if not part.fits(modules[name], model.config.hidden_size):
                raise ValueError(f"patch: {name} has other widths than {tuple(part.keys.shape)} keys and "
                                 f"{tuple(part.values.shape)} values fit")

    def save(self, path):
        """Write a safetensors file: tensors under module/field, everything else as JSON in the metadata."""
        tensors, rest = {}, {}
        for name, part in self.parts.items():
            rest[name] = {"kind": next(kind for kind, made in PARTS.items() if isinstance(part, made))}
            for key, value in vars(part).items():
                if torch.is_tensor(value):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    rest[name][key] = value
        metadata = {"format": "editcore-patch-1", "info": json.dumps(self.info), "parts": json.dumps(rest)}
        with atomic(path) as tmp:
            save_file(tensors, tmp, metadata=metadata)


def load(path, device="cpu"):
    """The Patch of a safetensors file; FileNotFoundError or ValueError names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            head, parts = file.metadata() or {}, {}
            if head.get("format") != "editcore-patch-1":
                raise ValueError("its format is not editcore-patch-1")
            for name, rest in json.loads(head["parts"]).items():
                kind = PARTS[rest.pop("kind")]
                rest = {key: tuple(value) for key, value in rest.items()}
                parts[name] = kind(**rest, **{one.name: file.get_tensor(f"{name}/{one.name}") for one in fields(kind)
                                              if one.name not in rest})
            return Patch(parts, json.loads(head["info"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a patch file, or damaged ({error})") from error


def prompt_ends(made):
    """`asked` for a logprob.ScoringPlan: of every row, the last tokens of the prompts whose continuations it scores.

    That is where published GRACE looks its codebook up. A row that scores continuations of a prompt and of a longer
    one that it begins is looked up at both ends.
    """
    masks = [torch.zeros(batch.ids.shape, dtype=torch.bool) for batch in made.batches]
    first, ends = 0, set(made.back[made.starts].tolist())
    for mask, batch in zip(masks, made.batches):
        for place in (place for part in batch.parts for place in part.place[part.entry].tolist()):
            if first in ends:
                mask.view(-1)[place] = True
            first += 1
    prefix = torch.zeros(made.prefix.shape, dtype=torch.bool)
    return [prefix] * bool(made.prefix.numel()) + masks


def _hook(part, asked):
    """A forward hook with the part's output; of the masks `asked` one is used up at every pass."""
    masks = None if asked is None else iter(list(asked))

    def hook(_, args, output):
        x, first = args[0], output[0] if isinstance(output, tuple) else output
        mask = None
        if masks is not None:
            if (mask := next(masks, None)) is None:
                raise ValueError("patch: the model was run more often than `asked` has masks")
            mask = torch.nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0))
        first = part.output(x, first, mask)
        return (first, *output[1:]) if isinstance(output, tuple) else first
    return hook
