"""Compare the directions of edits: what editors make of gradients, and their exact cosines.

    edits = gradients(model, tok, records, config, editor="InstructEdit")
    edits += gradients(model, tok, records, other, editor="MEND")
    cosine = cosines(edits)                     # (n, n); sqrt(2 - 2 cosine) is a distance for t-SNE
    edits.task, edits.editor                    # (n,) what each row is

The gradient of a linear map for edit i is G_i = sum_b u_b delta_b^T over its tokens, and what MEND
makes of it the same sum of transformed factors. The "editing gradient direction" of
arXiv:2402.16123, section 5.2, can be read in two ways: vec(G) / |vec(G)|, and the mean over tokens
of a factor, u or delta.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from editcore.instructedit import mend, trained_editors
from editcore.instructedit.edit_gradients import fact_gradients
from editcore.instructedit.records import record_as_fact

STAGES = ("raw", "untrained", "trained")
FACTORS = {"u": 0, "delta": 1}
ROOM = 2 ** 25          # most numbers in a slice of the gradients: 256 MB in float64


@dataclass(frozen=True)
class Edits:
    """n edits as factors of their gradients, and what each of them is."""

    factors: tuple          # for each edit {map: (u (R, d_in), delta (R, d_out))}
    task: np.ndarray        # (n,)
    case_id: np.ndarray     # (n,)
    editor: np.ndarray      # (n,) the name given to `gradients`

    def __add__(self, other):
        """Both, one after another."""
        arrays = [np.concatenate([getattr(self, name), getattr(other, name)])
                  for name in ("task", "case_id", "editor")]
        return Edits(self.factors + other.factors, *arrays)

    def __len__(self):
        return len(self.factors)

    @property
    def maps(self):
        """Names of the edited maps, in the order of the blocks."""
        return list(self.factors[0])


def gradients(model, tok, records, config, *, editor="", stage="trained", style="", description=-1,
              folder="results/editors"):
    """The Edits of EditRecords by the MEND of a HypernetworkConfig, behind its instructions.

    stage: "trained" gives alpha u~ and delta~, whose sum is the weights' change but for a sign that
    all edits share; "untrained" the same of the trained normaliser alone; "raw" the gradient.
    style, description: another instruction than the config's, as in `scores.Case`. ValueError
    names a record that is too long for the model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, but must be one of {', '.join(STAGES)}")
    instructed = trained_editors.instructed(config, records, style=style, description=description)
    facts = [replace(record_as_fact(record, config.seed, config.opposite),
                     case_id=f"{record.task} {record.case_id}")
             for record in instructed]
    settings, _ = trained_editors.configured(config)
    names = [site.name for site in mend.sites(model, settings.layers, settings.parts)]
    factors = fact_gradients(model, tok, facts, names,
                             min(mend.layer_numbers(model, settings.layers)))
    if stage != "raw":
        network = _network(config, stage, folder).to(next(model.parameters()).device)
        factors = [_transformed(network, found) for found in factors]
    return Edits(tuple(factors), np.array([record.task for record in records]),
                 np.array([record.case_id for record in records]), np.full(len(records), editor))


def _network(config, stage, folder):
    """The trained MendNetwork of a config, or its normaliser with layers as before the training."""
    network = mend.load(mend.MendNetwork, trained_editors.train(config, folder))
    if stage == "trained":
        return network
    untrained = mend.MendNetwork(network.sites, network.settings)
    untrained.norms.load_state_dict(network.norms.state_dict())
    return untrained


@torch.no_grad()
def _transformed(network, found):
    """{map: (alpha u~, delta~)}: alpha weighs the maps against each other."""
    steps = network.steps()
    return {name: (steps[name] * u, delta) for name, (u, delta) in network(found).items()}


def gram(edits, name, part="G"):
    """(n, n) exact inner products of all edits in one map, float64.

    part: "G" of the whole gradients, of which a few rows at a time are formed, or "u", "delta" of
    the means of a factor over an edit's tokens.
    """
    pairs = [factors[name] for factors in edits.factors]
    if part != "G":
        means = torch.stack([pair[FACTORS[part]].double().mean(0) for pair in pairs])
        return means @ means.T
    d_in, d_out = (side.shape[1] for side in pairs[0])
    height = max(1, ROOM // (len(pairs) * d_out))
    inner = torch.zeros(len(pairs), len(pairs), dtype=torch.float64, device=pairs[0][0].device)
    for start in range(0, d_in, height):
        rows = torch.stack([(u[:, start:start + height].double().T @ delta.double()).flatten()
                            for u, delta in pairs])
        inner += rows @ rows.T
    return inner


def cosines(edits, name="", part="G"):
    """(n, n) cosines between the directions of all edits, a float64 array; exact up to rounding.

    name: of a map; "": all maps together, their gradients behind each other as one vector. part: as
    for `gram`. ValueError names an edit whose gradient is zero or not a number.
    """
    inner = sum(gram(edits, one, part) for one in ([name] if name else edits.maps))
    lengths = inner.diagonal().clamp(min=0).sqrt()
    if not (lengths > 0).all():
        index = int((lengths > 0).int().argmin())
        raise ValueError(f"record {edits.task[index]} {edits.case_id[index]}: its gradient is zero "
                         "or not a number")
    cosine = (inner / lengths[:, None] / lengths[None, :]).clamp(-1, 1)
    return ((cosine + cosine.T) / 2).fill_diagonal_(1).cpu().numpy()


def compare(first, second):
    """How edits of the same records by two editors differ in size and direction: a DataFrame.

    One row per record and map, and one of all maps together (map ""): task, case_id, map, norm and
    other: the lengths of the first and second edit, ratio: norm / other, cosine between the two
    (NaN where one is zero). Trained edits are the changes of the weights. ValueError for other
    records.
    """
    named = [list(zip(edits.task, edits.case_id)) for edits in (first, second)]
    if named[0] != named[1]:
        raise ValueError("compare: the two editors have edited different records")
    rows = []
    for name, mine, others in zip(named[0], first.factors, second.factors):
        inner = {key: [_inner(a[key], b[key]) for a, b in
                       ((mine, mine), (others, others), (mine, others))] for key in mine}
        inner[""] = np.sum(list(inner.values()), axis=0)
        rows += [(*name, key, *products) for key, products in inner.items()]
    table = pd.DataFrame(rows, columns=["task", "case_id", "map", "norm", "other", "cosine"])
    table[["norm", "other"]] = table[["norm", "other"]].clip(lower=0) ** 0.5
    table["ratio"] = table["norm"] / table["other"]
    table["cosine"] = table["cosine"] / (table["norm"] * table["other"])
    return table[["task", "case_id", "map", "norm", "other", "ratio", "cosine"]]


def _inner(first, second):
    """Inner product of two gradients of one map, each (u (R, d_in), delta (R, d_out))."""
    (u, delta), (v, slope) = ((side.double() for side in pair) for pair in (first, second))
    return ((u @ v.T) * (delta @ slope.T)).sum().item()
