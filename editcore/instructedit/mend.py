"""Edit with MEND: a trained network turns the gradient of an edit into a low-rank weight change.

MEND (arXiv:2110.11309), also with instructions in the prompts (InstructEdit, arXiv:2402.16123):
those differ in the text that a network is trained on and in nothing here. For a linear map y = W x
the gradient of a loss is sum_b delta_b u_b^T, u_b the input and delta_b = dL/dy at token b. The
network maps (u_b, delta_b) to (u~_b, delta~_b); the edit, of rank at most the number of tokens, is

    W <- W - alpha sum_b delta~_b u~_b^T,       alpha learned, one per matrix.

A positive alpha descends: the untrained network takes one step down the gradient of normalised
factors. (The published code adds instead and starts at 1e-4; alpha = -1e-4 is that start.)
"""

import contextlib
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from editcore.delta import Delta, oriented
from editcore.editors.settings import ascending, real, whole
from editcore.files import load_tensors, save_tensors
from editcore.hooks import hooked
from editcore.instructedit.edit_gradients import fact_gradients
from editcore.model import is_input_first, layout, module_of, n_layers, name_of

UNTRAINED = "untrained"     # the `network` that is no file: the start of training
FORMAT = "editcore-mend-2"
EPS = 1e-7                  # beside the standard deviation: gradients of large models are small


@dataclass(frozen=True)
class Settings:
    """Settings of MEND; all but network must be what the network was trained with."""

    network: str = ""               # file of the trained network, or "untrained"
    layers: ascending(-999) = (-3, -2, -1)    # edited blocks; negative ones count from the last
    parts: Literal["all", "mlp_in", "mlp_out"] = "all"      # which of their MLP's maps
    rank: whole(1) = 1920           # of the network's layers, at most d_in + d_out
    depth: whole(1, 99) = 2         # residual low-rank layers
    alpha: real(-1000, 1000) = 1e-4     # step at the start of training, learned from there
    seed: whole() = 0               # of the first weights


PAPER = {   # published, but for the sign of alpha; pocket: what learns in seconds; smollm2: swept
    "gpt2-xl": {"layers": (45, 46, 47)},
    "llama-2-7b": {"layers": (29, 30, 31)},
    "pocket": {"layers": (-2, -1), "rank": 64, "alpha": 1e-3},
    "smollm2": {"rank": 64, "alpha": 3e-4},
}


@dataclass(frozen=True)
class Site:
    """One edited linear map."""

    name: str       # of its module
    inputs: int     # d_in
    outputs: int    # d_out
    size: float     # Frobenius norm of its unedited weight: tells models of one shape apart

    @property
    def shape(self):
        """The name that maps of one shape share."""
        return f"{self.inputs}x{self.outputs}"


class RunningNorm(nn.Module):
    """Normalises features by the mean and standard deviation of all rows observed so far."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(width, dtype=torch.float64))     # deviations

    def observe(self, rows):
        """Add rows (R, D) to the moments (Welford's update for a batch of rows)."""
        if len(rows):
            rows = rows.detach().double()
            mean = rows.mean(0)
            shift = mean - self.mean
            count = self.count + len(rows)
            self.square += (rows - mean).square().sum(0)
            self.square += shift.square() * (self.count * len(rows) / count)
            self.mean += shift * (len(rows) / count)
            self.count += len(rows)

    def forward(self, rows):
        """Normalise rows (R, D); a feature that never varied is only centred."""
        std = (self.square / (self.count - 1).clamp(min=1)).sqrt()
        std = torch.where(std > 0, std, torch.ones_like(std)) + EPS
        return (rows - self.mean.to(rows.dtype)) / std.to(rows.dtype)


class LowRankLayer(nn.Module):
    """The weights of h <- h + relu((U V h + b) * s + t) that maps of one shape share."""

    def __init__(self, width, rank, generator):
        super().__init__()
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.V = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, h, scale, shift):
        """Apply the layer to rows (R, D).

        The gradient of relu is taken as 1 at 0, where every unit starts: with 0 nothing but alpha
        would ever learn.
        """
        return h + ((h @ self.V.T @ self.U.T + self.b) * scale + shift).clamp(min=0)


class MapWeights(nn.Module):
    """What a hypernetwork learns for one map alone: s, t per layer and alpha."""

    def __init__(self, width, depth, alpha):
        super().__init__()
        self.scale = nn.ParameterList([torch.ones(width) for _ in range(depth)])
        self.shift = nn.ParameterList([torch.zeros(width) for _ in range(depth)])
        self.alpha = nn.Parameter(torch.tensor(alpha))


class MendNetwork(nn.Module):
    """MEND's hypernetwork: low-rank layers per shape; scales, shifts and alpha per map."""

    format = FORMAT
    fixed = ("layers", "parts", "rank", "depth")    # settings that an edit shares with it

    def __init__(self, sites, settings):
        super().__init__()
        self.sites = tuple(sites)
        self.settings = dict(settings)
        generator = torch.Generator().manual_seed(settings["seed"])
        self.layers = nn.ModuleDict()
        self.maps = nn.ModuleList()
        self.norms = nn.ModuleDict()
        for site in self.sites:
            width = site.inputs + site.outputs
            if site.shape not in self.layers:
                rank = min(settings["rank"], width)
                self.layers[site.shape] = nn.ModuleList(
                    [LowRankLayer(width, rank, generator) for _ in range(settings["depth"])])
                self.norms[site.shape] = RunningNorm(width)
            self.maps.append(MapWeights(width, settings["depth"], settings["alpha"]))

    def forward(self, gradients, condition=None):
        """{map: (u~ (R, d_in), delta~ (R, d_out))} of {map: (u, delta)}: the edit without alpha."""
        return {site.name: self._transform(site, own, *gradients[site.name])
                for site, own in zip(self.sites, self.maps)}

    def _transform(self, site, own, u, delta):
        h = self.norms[site.shape](torch.cat([u, delta], 1).to(own.alpha.dtype))
        for layer, scale, shift in zip(self.layers[site.shape], own.scale, own.shift):
            h = layer(h, scale, shift)
        return h.split([site.inputs, site.outputs], 1)

    def observe(self, gradients):
        """Add {map: (u, delta)} to the running moments."""
        for site in self.sites:
            self.norms[site.shape].observe(torch.cat(gradients[site.name], 1))

    def steps(self):
        """{map: alpha}."""
        return {site.name: own.alpha for site, own in zip(self.sites, self.maps)}

    def conditions(self, model, tok, facts):
        """The token ids that the network reads beside each fact's gradients: none."""
        return [()] * len(facts)


# Networks and their files ---------------------------------------------------------------------

def prepare(model, tok, config, inputs=None):
    """The MendNetwork of config.network, checked against the model and the settings."""
    return prepared(MendNetwork, model, config, {})


def prepared(kind, model, config, more):
    """A network of class `kind`, untrained or from its file; errors name the file.

    more: settings of the network beside those of the editor.
    """
    if not config.network:
        raise ValueError("network names no file; make one with `python -m editcore train` and give "
                         f"network=FILE, or {UNTRAINED} for an untrained one")
    wanted = sites(model, config.layers, getattr(config, "parts", "all"))
    settings = {**asdict(config), "layers": layer_numbers(model, config.layers), **more}
    del settings["network"]
    device = next(model.parameters()).device
    if config.network == UNTRAINED:
        return kind(wanted, settings).to(device)
    network = load(kind, config.network).to(device)
    for name in kind.fixed:
        if network.settings[name] != settings[name]:
            raise ValueError(f"{config.network}: trained with {name} = {network.settings[name]}, "
                             f"not {settings[name]}")
    for site, trained in zip(wanted, network.sites, strict=True):
        alike = (site.name, site.shape) == (trained.name, trained.shape)
        if not alike or abs(site.size / trained.size - 1) > 1e-4:
            raise ValueError(f"{config.network}: trained for {trained}, the model has {site}")
    return network


def save(network, path, **info):
    """Write a network: its state, settings and sites."""
    metadata = {"format": network.format, "settings": network.settings, "info": info,
                "sites": [list(asdict(site).values()) for site in network.sites]}
    save_tensors(path, network.state_dict(), metadata)


def load(kind, path):
    """Read a network of class `kind`; FileNotFoundError or ValueError names the file."""
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != kind.format:
        raise ValueError(f"{path}: no hypernetwork of format {kind.format}, "
                         f"but {metadata.get('format')}")
    network = kind([Site(*site) for site in metadata["sites"]], metadata["settings"])
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a whole hypernetwork: {error}") from error
    network.info = metadata["info"]
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} is not finite")
    return network


def layer_numbers(model, layers):
    """The edited blocks counted from 0, ascending; ValueError for none or a repeated one."""
    numbers = sorted(layer + n_layers(model) if layer < 0 else layer for layer in layers)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"layers is {layers}, but must name at least one block, each once")
    return numbers


def sites(model, layers, parts="all"):
    """The Sites of the edited maps in block order; within a block: in, gate if any, out."""
    every = [part for part in ("mlp_in", "mlp_gate", "mlp_out") if getattr(layout(model), part)]
    found = []
    for layer in layer_numbers(model, layers):
        for part in every if parts == "all" else [parts]:
            module = module_of(model, part, layer)
            shape = module.weight.shape if is_input_first(module) else module.weight.shape[::-1]
            size = module.weight.double().norm().item()
            found.append(Site(name_of(model, part, layer), *shape, size))
    return tuple(found)


# Edits ----------------------------------------------------------------------------------------

@torch.no_grad()
def fact_factors(model, tok, facts, network):
    """For each fact what the network makes of its gradients, {map: (u~, delta~)}."""
    conditions = network.conditions(model, tok, facts)
    names = [site.name for site in network.sites]
    found = fact_gradients(model, tok, facts, names, min(network.settings["layers"]))
    if any(map(len, conditions)):
        return [network(slopes, embeddings(model, ids)) for slopes, ids in zip(found, conditions)]
    together = network(_joined(found))      # row by row, each fact's among them
    parts = {name: [side.split([len(slopes[name][0]) for slopes in found]) for side in sides]
             for name, sides in together.items()}
    return [{name: (us[i], deltas[i]) for name, (us, deltas) in parts.items()}
            for i in range(len(facts))]


@torch.no_grad()
def embeddings(model, ids):
    """(T, d) embeddings of the text that a network reads; None if there is none."""
    if not len(ids):
        return None
    return model.get_input_embeddings()(torch.tensor(ids, device=next(model.parameters()).device))


@contextlib.contextmanager
def edited_forward(model, network, *edits, sizes=None):
    """In the block, each map's output is that of W - alpha sum_b delta~_b u~_b^T, never formed.

    edits: factors, one edit for all tokens; of several each has its part of a row, of as many
    tokens as sizes {map: [tokens of each edit]} says. Gradients reach the factors and alpha, and
    pass through to earlier maps.
    """
    steps = network.steps()

    def step(name, module, args, output):
        parts = args[0].split(sizes[name], 1) if sizes else args
        changes = [(part.to(u.dtype) @ u.T) @ delta
                   for part, (u, delta) in zip(parts, [edit[name] for edit in edits])]
        return output + (torch.cat(changes, 1) * -steps[name]).to(output.dtype)

    with hooked(model, {name: partial(step, name) for name in steps}):
        yield


def low_rank(model, network, factors):
    """The same edit as a Delta of LowRank changes in the model's own orientation."""
    steps = network.steps()
    return Delta({name + ".weight": oriented((-steps[name] * delta.T).detach(), u.detach(),
                                             model.get_submodule(name))
                  for name, (u, delta) in factors.items()})


def edit(model, tok, facts, config, prepared):
    """One Delta with all facts: the sum of each one's change, made from the model as it is."""
    return edit_groups(model, tok, [facts], config, prepared=[prepared])[0]


def edit_groups(model, tok, groups, config, *, prepared, current=None):
    """One Delta per group of facts; prepared: the network of each group (the same for all).

    current: the Delta that each group's model carries already; without it all share their passes.
    """
    if current is not None:
        deltas = []
        for group, network, carried in zip(groups, prepared, current):
            with carried.applied(model):
                deltas.append(edit(model, tok, group, config, network))
        return deltas
    network = prepared[0]
    factors = iter(fact_factors(model, tok, sum(map(list, groups), []), network))
    return [low_rank(model, network, _joined([next(factors) for _ in group])) for group in groups]


def _joined(parts):
    """The factors of several facts as those of one edit."""
    return {name: tuple(torch.cat(sides) for sides in zip(*[part[name] for part in parts]))
            for name in parts[0]}
