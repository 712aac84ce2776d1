"""Inputs and output gradients of linear maps in; the same, normalised and transformed by learned layers, out.

The hypernetwork of MEND (arXiv:2110.11309, section 3.2) as pure functions of tensors, and its file.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.files import atomic, sha256_text

FORMAT = "editcore-mend-1"
EPS = 1e-7      # beside the standard deviation: gradients of large models are small


@dataclass(frozen=True)
class Site:
    """One edited linear map."""

    name: str       # of its module
    inputs: int     # d_in
    outputs: int    # d_out
    size: float     # Frobenius norm of its unedited weight: tells one model from another of the same shape

    @property
    def shape(self):
        """The name that maps of one shape share."""
        return f"{self.inputs}x{self.outputs}"


@dataclass(frozen=True)
class Norm:
    """Running moments of rows (D,), in float64."""

    count: torch.Tensor     # () rows seen
    mean: torch.Tensor      # (D,)
    square: torch.Tensor    # (D,) sum of squared deviations from the mean


@dataclass(frozen=True)
class Network:
    """A hypernetwork for some linear maps, one set of layers for each distinct shape."""

    sites: tuple        # of Site
    settings: dict      # how it was made; rank, depth and norm are read here
    weights: dict       # name -> tensor, all of them learned
    norms: dict         # shape or module name -> Norm; empty without normalisation
    info: dict          # what else its file says

    def alpha(self, name):
        """() the learned step of one map; 1 where the network has none."""
        return self.weights.get(name + "/alpha", 1.0)

    def norm_of(self, site):
        """The Norm of a map, or None."""
        return self.norms.get(_owner(self.settings["norm"], site))


def start(sites, settings, dtype=torch.float32):
    """The Network before training: U, b and t zero, V ~ N(0, 1) from settings["seed"], s one, alpha as set."""
    draw, weights = torch.Generator().manual_seed(settings["seed"]), {}
    for site in sites:
        wide = site.inputs + site.outputs
        rank = min(settings["rank"], wide)
        for k in range(settings["depth"]):
            if f"{site.shape}/U{k}" not in weights:
                weights[f"{site.shape}/U{k}"] = torch.zeros(wide, rank, dtype=dtype)
                weights[f"{site.shape}/V{k}"] = torch.randn(rank, wide, generator=draw, dtype=dtype)
                weights[f"{site.shape}/b{k}"] = torch.zeros(wide, dtype=dtype)
            weights[f"{site.name}/s{k}"] = torch.ones(wide, dtype=dtype)
            weights[f"{site.name}/t{k}"] = torch.zeros(wide, dtype=dtype)
        weights[f"{site.name}/alpha"] = torch.tensor(settings["alpha"], dtype=dtype)
    norms = {_owner(settings["norm"], site): empty(site.inputs + site.outputs) for site in sites}
    return Network(tuple(sites), dict(settings), weights, {name: norm for name, norm in norms.items() if name}, {})


def empty(width):
    """The Norm of no rows."""
    zero = torch.zeros(width, dtype=torch.float64)
    return Norm(torch.zeros((), dtype=torch.float64), zero, zero.clone())


def seen(norm, rows):
    """The Norm with rows (R, D) added (Welford's update for a batch of rows)."""
    if not len(rows):
        return norm
    rows = rows.detach().double()
    mean, count = rows.mean(0), norm.count + len(rows)
    apart = mean - norm.mean
    square = norm.square + (rows - mean).square().sum(0) + apart.square() * (norm.count * len(rows) / count)
    return Norm(count, norm.mean + apart * (len(rows) / count), square)


def spread(norm):
    """(D,) standard deviation with R - 1 degrees of freedom; 1 for a feature that never varied, or of no rows.

    Without that a feature that was constant in training would be divided by almost nothing when it first varies.
    """
    found = (norm.square / (norm.count - 1).clamp(min=1)).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


def normalised(norm, rows):
    """Rows (R, D) less the mean, over the standard deviation, a feature at a time; as they are if norm is None."""
    if norm is None:
        return rows
    return (rows - norm.mean.to(rows.dtype)) / (spread(norm) + EPS).to(rows.dtype)


def watch(network, found):
    """The Network whose Norms have also seen {module name: (u (R, d_in), delta (R, d_out))}."""
    norms = dict(network.norms)
    for site in network.sites if norms else ():
        owner = _owner(network.settings["norm"], site)
        norms[owner] = seen(norms[owner], torch.cat(found[site.name], 1))
    return replace(network, norms=norms)


def transform(network, site, u, delta):
    """(u~ (R, d_in), delta~ (R, d_out)) of one map's u (R, d_in) and delta (R, d_out), in the weights' dtype.

    h = [u; delta] normalised, then for each layer h <- h + relu((U V h + b) * s + t). The gradient of relu is taken
    as 1 at 0, where every unit starts: with 0 nothing but alpha would ever learn.
    """
    weights = network.weights
    dtype = weights[site.name + "/alpha"].dtype
    h = normalised(network.norm_of(site), torch.cat([u, delta], 1).to(dtype))
    for k in range(network.settings["depth"]):
        U, V, b = (weights[f"{site.shape}/{part}{k}"] for part in "UVb")
        s, t = (weights[f"{site.name}/{part}{k}"] for part in "st")
        h = h + (((h @ V.T) @ U.T + b) * s + t).clamp(min=0)
    return h.split([site.inputs, site.outputs], 1)


def moved(network, device):
    """The Network on a device."""
    norms = {name: Norm(*(part.to(device) for part in (norm.count, norm.mean, norm.square)))
             for name, norm in network.norms.items()}
    return replace(network, norms=norms, weights={name: weight.to(device) for name, weight in network.weights.items()})


def tensors(network):
    """{name: tensor} of weights and Norms, on the CPU, for a file."""
    parts = {f"norm/{name}/{part}": getattr(norm, part) for name, norm in network.norms.items()
             for part in ("count", "mean", "square")}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in (network.weights | parts).items()}


def words(network):
    """{name: text} of the rest, for a file's metadata."""
    sites = [[site.name, site.inputs, site.outputs, site.size] for site in network.sites]
    parts = {"settings": network.settings, "sites": sites, "info": network.info}
    said = {name: json.dumps(value) for name, value in parts.items()}
    return {"format": network.settings.get("format", FORMAT)} | said


def save(network, path):
    """Write the Network as a safetensors file, settings and maps as JSON in its metadata."""
    with atomic(path) as tmp:
        save_file(tensors(network), tmp, metadata=words(network))


def digest(path):
    """Hash of what a hypernetwork's file says, which two files of one Network share: their bytes differ by chance."""
    try:
        with safe_open(path, "np") as file:
            parts = {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in sorted(file.keys())}
            return sha256_text(sorted((file.metadata() or {}).items()), parts)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a hypernetwork file, or damaged ({error})") from error


def load(path, device="cpu", format=FORMAT, begin=start):
    """The Network of a file; FileNotFoundError or ValueError names the file, and the tensor that is missing or odd.

    begin(sites, settings) -> an untrained Network of that format, for the shapes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            texts = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a hypernetwork file, or damaged ({error})") from error
    if texts.get("format") != format:
        raise ValueError(f"{path}: not a hypernetwork file: its format is {texts.get('format')}, not {format}")
    try:
        return moved(built(texts, found, begin), device)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole hypernetwork: {error}") from error


def built(texts, found, begin=start):
    """The Network of what `words` and `tensors` gave. ValueError names a tensor that is missing, odd or not finite."""
    sites = tuple(Site(*site) for site in json.loads(texts["sites"]))
    shape = begin(sites, json.loads(texts["settings"]))

    def take(name, like):
        if name not in found or found[name].shape != like.shape:
            raise ValueError(f"{name} is {tuple(found[name].shape) if name in found else 'missing'}, "
                             f"not {tuple(like.shape)}")
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{name} is not finite")
        return found[name].clone()      # in memory of its own: products of tensors inside a file's may round otherwise

    norms = {name: Norm(*(take(f"norm/{name}/{part}", getattr(norm, part)) for part in ("count", "mean", "square")))
             for name, norm in shape.norms.items()}
    return replace(shape, weights={name: take(name, weight) for name, weight in shape.weights.items()}, norms=norms,
                   info=json.loads(texts["info"]))


def _owner(norm, site):
    """Whose Norm a map uses: "" without normalisation."""
    return {"shape": site.shape, "map": site.name, "none": ""}[norm]
