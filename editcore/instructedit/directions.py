"""A model and edit records in; the directions of their gradients, raw and made by a hypernetwork, and cosines, out.

The gradient of a linear map for edit i is G_i = sum_b u_b delta_b^T over its tokens, and what MEND makes of it the
same sum of transformed factors. Of what is called the editing gradient direction (InstructEdit, arXiv:2402.16123,
section 5.2) two readings are offered: vec(G) / |vec(G)| ("G", transformed "G~"), and the mean over tokens of a factor
("u", "delta", "u~", "delta~"). All G together, n vectors of d_in d_out numbers, are never formed:

    <G_i, G_j> = sum_b,b' (u_b . u'_b') (delta_b . delta'_b').

    found = gradients(model, tok, records, config, Asked("full"))           # raw factors of every edit
    made = edits(network, found)                                            # transformed ones
    C = cosines(gram(stacked(made, name)))                                  # (n, n)
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize, one_hot

from editcore.instructedit import examples, hypernet, instructions, mend

MEANS = {"u": 0, "delta": 1}    # reading B: which of a pair of factors
TOGETHER = "together"           # all maps: their gradients behind each other as one vector
TOKENS = 2048                   # most tokens in a block of the product of tokens with tokens
ROOM = 2 ** 25                  # most numbers in a slice of gradients: 256 MB in float64


@dataclass(frozen=True)
class Asked:
    """What stands before the prompts of the edits."""

    style: str = "full"         # a key of instructions.STYLES
    number: int | None = None   # of the description; None: drawn for each record
    seen: int = instructions.SEEN   # how many descriptions it is drawn from
    seed: int = 0               # of the draw, and of ConvSent's wanted reply
    table: tuple = ()           # (task, descriptions) pairs that replace instructions.DESCRIPTIONS


@dataclass(frozen=True)
class Factors:
    """Pairs of factors of n edits of one linear map, edit after edit."""

    u: torch.Tensor         # (R, d_in), R tokens of all edits
    delta: torch.Tensor     # (R, d_out)
    counts: tuple           # (n,) tokens of each edit


def gradients(model, tok, records, config, asked):
    """For each EditRecord {module name: (u (R, d_in), delta (R, d_out))}: raw factors of the gradients of its edit.

    config: the editor's Mend, which names the maps. ValueError names a record that is too long for the model.
    """
    facts = [replace(examples.asked(one, put(one, asked), asked.seed), case_id=f"{one.task} {one.case_id}")
             for one in records]
    names = [site.name for site in mend.sites(model, config)]
    return [found for _, found in mend.captured(model, tok, [facts], config, (names, None))]


def put(record, asked):
    """The function prompt -> prompt in the frame of `asked` for this record."""
    number = instructions.drawn(record, asked.seed, asked.seen) if asked.number is None else asked.number
    return instructions.prefix(record, number, asked.style, instructions.DESCRIPTIONS | dict(asked.table))


@torch.no_grad()
def edits(network, found):
    """`gradients` as a hypernetwork transforms them: for each edit {module name: (alpha u~, delta~)}.

    Their sums are the weights' changes but for the sign that all edits share; alpha weighs maps against each other in
    `together`, and within one map only its sign matters.
    """
    made = []
    for one in found:
        pairs = {site.name: hypernet.transform(network, site, *one[site.name]) for site in network.sites}
        made.append({name: (network.alpha(name) * u, delta) for name, (u, delta) in pairs.items()})
    return made


def stacked(found, name):
    """The Factors of one map of many edits."""
    pairs = [one[name] for one in found]
    return Factors(torch.cat([u for u, _ in pairs]), torch.cat([delta for _, delta in pairs]),
                   tuple(len(u) for u, _ in pairs))


def gram(a, b=None, way=""):
    """(n, m) exact inner products <G_i, G_j> of the gradients of Factors a and b (None: of a with itself), in float64.

    way: "factors" multiplies tokens with tokens, the sum above in blocks; "slices" forms a few rows of every G at a
    time and multiplies those; "": what takes fewer operations, for edits of many tokens the latter.
    """
    b = a if b is None else b
    work = costs(a, b)
    return {"factors": _by_factors, "slices": _by_slices}[way or min(work, key=work.get)](a, b)


def costs(a, b):
    """{way: multiplications} of the Gram matrix of two Factors."""
    wide, high = a.u.shape[1], a.delta.shape[1]
    return {"factors": len(a.u) * len(b.u) * (wide + high),
            "slices": (len(a.counts) * len(b.counts) + len(a.u) + len(b.u)) * wide * high}


def _by_factors(a, b):
    """Blocks of edits; owner (tokens, edits) adds up the products of the tokens of two edits."""
    out = a.u.new_zeros(len(a.counts), len(b.counts), dtype=torch.float64)
    for rows, u, delta, owner in _blocks(a):
        for columns, other_u, other_delta, other in _blocks(b):
            if a is b and columns.start < rows.start:
                out[rows, columns] = out[columns, rows].T
            else:
                out[rows, columns] = owner.T @ ((u @ other_u.T) * (delta @ other_delta.T)) @ other
    return out


def _blocks(factors):
    """(slice of edits, u, delta, owner (tokens, edits)) of neighbouring edits of TOKENS together, in float64."""
    first, token = 0, 0
    while first < len(factors.counts):
        last, size = first + 1, factors.counts[first]
        while last < len(factors.counts) and size + factors.counts[last] <= TOKENS:
            size, last = size + factors.counts[last], last + 1
        own = torch.arange(last - first).repeat_interleave(torch.tensor(factors.counts[first:last]))
        part = slice(token, token + size)
        yield (slice(first, last), factors.u[part].double(), factors.delta[part].double(),
               one_hot(own, last - first).to(factors.u.device, torch.float64))
        first, token = last, token + size


def _by_slices(a, b):
    """A few rows of all G at a time, as many as ROOM allows."""
    n, m = len(a.counts), 0 if a is b else len(b.counts)
    wide = max(1, ROOM // ((n + m) * a.delta.shape[1]))
    out = a.u.new_zeros(n, m or n, dtype=torch.float64)
    for start in range(0, a.u.shape[1], wide):
        rows = _slice(a, slice(start, start + wide))
        out += rows @ (rows if a is b else _slice(b, slice(start, start + wide))).T
    return out


def _slice(factors, rows):
    """(n, rows * d_out) these rows of every G, in float64."""
    out = factors.u.new_empty(len(factors.counts), factors.u[:1, rows].shape[1], factors.delta.shape[1],
                              dtype=torch.float64)
    for one, u, delta in zip(out, factors.u[:, rows].split(factors.counts), factors.delta.split(factors.counts)):
        torch.mm(u.double().T, delta.double(), out=one)
    return out.flatten(1)


def cosines(inner):
    """(n, n) cosines, a float64 array, of the Gram matrix (n, n) of n vectors; ValueError names one of length 0."""
    lengths = inner.diagonal().clamp(min=0).sqrt()
    if not (lengths > 0).all():
        raise ValueError(f"directions: gradient {int((lengths > 0).int().argmin())} is zero or not a number")
    found = (inner / lengths[:, None] / lengths[None, :]).clamp(-1, 1)
    return ((found + found.T) / 2).fill_diagonal_(1).cpu().numpy()


def means(found, name, side):
    """(n, d) float64 means over tokens of one side (a key of MEANS) of one map's factors: reading B."""
    return torch.stack([one[name][MEANS[side]].double().mean(0) for one in found])


def views(found, names=None, mark=""):
    """Yields (reading, map, cosines (n, n)) of `gradients` or `edits`, for each map and for all of them TOGETHER.

    mark goes behind the names of the means: "~" for transformed ones. names: of the maps, all by default.
    """
    whole, every = f"G{mark}", 0
    for name in names or found[0]:
        for side in MEANS:
            vectors = normalize(means(found, name, side))
            yield side + mark, name, cosines(vectors @ vectors.T)
        inner = gram(stacked(found, name))
        every = every + inner
        yield whole, name, cosines(inner)
    if len(names or found[0]) > 1:
        yield whole, TOGETHER, cosines(every)
