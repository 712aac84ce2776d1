"""Run a model again only above one block, and only from one position of each row on.

A change at the output of block l, at one position of a row, leaves everything below l and before
that position as it was (attention is causal). `start` runs the model once and keeps what later
tokens read from earlier ones: keys and values of every block. `resume` then runs only the rest, for
changed states; the tokens of many rows lie side by side in a few lanes, without padding. How a
block is called is seen from a call of it: no architecture is named here.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from editcore.hooks import Stop, called, capture, first
from editcore.model import is_input_first, layout, module_of, n_layers, name_of
from editcore.tokens import pad

HEAD_ROWS = 8192    # rows of a half-precision head that are cast to float32 at a time
LANE = 64           # tokens of a lane: attention over it stays a small part of the work


@dataclass(frozen=True)
class Past:
    """Stands in for a cache in one block's attention: joins earlier keys and values with new."""

    keys: torch.Tensor      # (B, heads, P, head width)
    values: torch.Tensor    # (B, heads, P, head width)

    def update(self, keys, values, *_, **__):
        """(keys, values) of prefix and suffix, along the token axis."""
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


@dataclass(frozen=True)
class Tap:
    """Stands in for a cache to see a block's keys and values and to stop it there."""

    seen: list

    def update(self, keys, values, *_, **__):
        self.seen.extend((keys, values))
        raise Stop


@dataclass(frozen=True)
class State:
    """S tokens of each of B rows at the output of block `layer`, and what the blocks above need."""

    layer: int
    hidden: torch.Tensor    # (B, S, d) output of block `layer`, from each row's own position on
    past: tuple             # (keys, values) of each block above, before that position
    calls: tuple            # per block above: (constant keyword arguments, name of its cache)
    shared: dict            # keyword arguments with an entry per row: mask, positions, embeddings
    begin: torch.Tensor     # (B,) how many of the tokens in `past` a row has
    wanted: torch.Tensor    # (B, s) offsets in the suffix whose final states `resume` gives
    apart: bool             # each row is a lane of its own, in order
    lanes: object = None    # the same tokens as `resume` runs them: Lanes

    def rows(self, index):
        """The same State for some of the rows (index: int64 or bool tensor)."""
        state = replace(self, **{name: _pick(getattr(self, name), index) for name in
                                 ("hidden", "past", "shared", "begin", "wanted")})
        return replace(state, lanes=_lanes(state))


@dataclass(frozen=True)
class Lanes:
    """Suffixes of rows side by side: G lanes of W tokens; a token sees its own row's only."""

    tokens: torch.Tensor    # (G, W) places in the B S suffix tokens; padding repeats some token
    past: tuple             # (keys, values) of each block above, (G, heads, P', head width)
    shared: dict            # keyword arguments with an entry per lane
    last: torch.Tensor      # (G, w) places in a lane at which the last block runs, if `top`
    top: dict               # `shared` of a last block that runs at wanted offsets only, or empty
    places: torch.Tensor    # (B, s) of the wanted tokens in what the last block gives, G w or G W


def start(model, ids, mask, *, begin, layer, wanted, apart=False):
    """State at the output of block `layer` for the tokens of each row from position begin[row] on.

    ids, mask (B, T), right-padded; begin (B,) int64; wanted (B, s) offsets from there whose final
    states are wanted: the suffix ends with the largest. Runs all blocks on what stands before and
    the blocks up to `layer` on the suffix, without gradients: modules that a `capture` watches are
    seen twice, last with the suffix. apart: `resume` keeps the rows as they are, for hooks that
    look at them. ValueError if a row exceeds the model's attention window.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and ids.shape[1] > window:
        raise ValueError(f"a row of {ids.shape[1]} tokens is longer than the model's attention "
                         f"window of {window}")
    prefix = max(int(begin.max()), 1)
    width = int(wanted.max()) + 1
    positions = begin[:, None] + torch.arange(width, device=ids.device)
    positions = positions.clamp(max=ids.shape[1] - 1)
    (call,), _ = _calls(model, ids, mask, [0])
    calls, cache = _calls(model, ids[:, :prefix], mask[:, :prefix], range(n_layers(model)))
    hidden = _at(next(iter(call.values())), positions)
    shared = {"attention_mask": _visible(begin, prefix, width, hidden.dtype),
              "position_ids": positions}
    if call.get("position_embeddings") is not None:
        shared["position_embeddings"] = _at(call["position_embeddings"], positions)
    past = tuple((level.keys, level.values) for level in cache.layers)
    calls = tuple(map(_call, calls))
    with torch.no_grad():
        for number in range(layer + 1):
            hidden = _block(model, number, calls[number], hidden, past=Past(*past[number]),
                            shared=shared)
    state = State(layer, hidden, past[layer + 1:], calls[layer + 1:], shared, begin, wanted, apart)
    return replace(state, lanes=_lanes(state))


def resume(model, state, hidden):
    """(B, s, d) states after the last block and the final norm at the wanted offsets.

    hidden (B, S, d) takes the place of block `state.layer`'s output. Where few offsets are wanted
    the last block reads keys and values of the whole suffix, and does the rest of its work at those
    offsets only.
    """
    lanes = state.lanes
    block = partial(_block, model)
    hidden = hidden.flatten(0, 1).index_select(0, lanes.tokens.flatten())
    hidden = hidden.unflatten(0, lanes.tokens.shape)                    # (G, W, d)
    layers = range(state.layer + 1, n_layers(model))
    *steps, last = zip(layers, state.calls, strict=True) if state.calls else [None]
    for (layer, call), past in zip(steps, lanes.past):
        hidden = block(layer, call, hidden, past=Past(*past), shared=lanes.shared)
    if lanes.top:
        seen = []
        with contextlib.suppress(Stop):
            block(*last, hidden, past=Tap(seen), shared=lanes.shared)
        past = [torch.cat(pair, -2) for pair in zip(lanes.past[-1], seen)]
        hidden = block(*last, _at(hidden, lanes.last), past=Past(*past), shared=lanes.top)
    elif last:
        hidden = block(*last, hidden, past=Past(*lanes.past[-1]), shared=lanes.shared)
    hidden = hidden.flatten(0, 1).index_select(0, lanes.places.flatten())
    return model.get_submodule(layout(model).norm)(hidden.unflatten(0, lanes.places.shape))


def head(model, hidden):
    """(..., V) logits of states (..., d) after the final norm, in float32 or better.

    Half precision would tie tokens: its steps are .5 at logits of 80. Only a part of the vocabulary
    is cast at a time.
    """
    module = model.get_output_embeddings()
    weight = module.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == wide:
        return module(hidden)
    parts = [hidden.to(wide) @ part.to(wide).T for part in weight.split(HEAD_ROWS)]
    bias = getattr(module, "bias", None)
    return torch.cat(parts, -1) if bias is None else torch.cat(parts, -1) + bias.to(wide)


@contextlib.contextmanager
def fused(model):
    """In the block, GPT-2's tanh-GELU is one operation of torch, not eight (equal to rounding)."""
    places = [(parent, name, child) for parent in model.modules()
              for name, child in parent.named_children() if isinstance(child, NewGELUActivation)]
    try:
        for parent, name, _ in places:
            setattr(parent, name, torch.nn.GELU("tanh"))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


@contextlib.contextmanager
def quick(model):
    """In the block, float32 linear maps on a CPU are computed by oneDNN (equal to rounding).

    Twice as fast as torch's choice, MKL, on processors where that leaves out the widest registers,
    and no slower elsewhere. Maps whose weights take gradients stay as they are. Blocks may nest.
    """
    maps = [module for module in model.modules()
            if type(module) in (torch.nn.Linear, Conv1D) and _suits(module)
            and "forward" not in vars(module)]
    try:
        for module in maps:
            module.forward = partial(_mapped, module)
        with fused(model):
            yield
    finally:
        for module in maps:
            del module.forward


class _Product(torch.autograd.Function):
    """x weightᵀ + bias by oneDNN, for a weight and a bias that take no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        return _Product.apply(gradient, ctx.weight.T, None), None, None


def _suits(module):
    weight = module.weight
    return (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
            and weight.device.type == "cpu" and weight.dtype == torch.float32
            and not any(parameter.requires_grad for parameter in module.parameters()))


def _mapped(module, x):
    weight = module.weight.T if is_input_first(module) else module.weight
    return _Product.apply(x, weight, module.bias)


def _block(model, layer, call, hidden, *, past, shared):
    """hidden after a block, called as `call` says with what the rows share and a cache."""
    constant, slot = call
    varying = {name: value for name, value in shared.items() if name in constant}
    block = module_of(model, "block", layer)
    return first(block(hidden, **constant | varying | {slot: past}))


def _calls(model, ids, mask, layers):
    """(arguments of each block in `layers`, cache) of a pass that stops in the last attention."""
    cache = DynamicCache()
    names = [name_of(model, "block", layer) for layer in layers]
    with (called(model, names) as calls, capture(model, [name_of(model, "attn", layers[-1])]),
          torch.no_grad(), contextlib.suppress(Stop)):
        model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return calls, cache


def _call(bound):
    """(constant keyword arguments, name of the cache argument) of a block."""
    slot = next(name for name, value in bound.items() if isinstance(value, Cache))
    left_out = (slot, "cache_position")
    constant = {name: value for name, value in list(bound.items())[1:] if name not in left_out}
    return constant, slot


def _lanes(state):
    """The Lanes of a State."""
    size, width = state.hidden.shape[:2]
    device = state.hidden.device
    needed = [width] * size if state.apart else (state.wanted.amax(1) + 1).tolist()
    before = state.begin.tolist()
    groups = [[row] for row in range(size)] if state.apart else _grouped(needed)
    owner, real = pad([[row for row in group for _ in range(needed[row])] for group in groups], -1,
                      device)                                           # (G, W)
    offset, _ = pad([[step for row in group for step in range(needed[row])] for group in groups],
                    0, device)
    source, _ = pad([[row for row in group for _ in range(before[row])] for group in groups], -2,
                    device)                                             # (G, P')
    place, _ = pad([[step for row in group for step in range(before[row])] for group in groups],
                   0, device)
    rows = owner.clamp(min=0)

    def earlier(values):
        return values.transpose(1, 2)[source.clamp(min=0), place].transpose(1, 2).contiguous()

    past = tuple((earlier(keys), earlier(values)) for keys, values in state.past)
    shared = {name: _pick(value, (rows, offset)) for name, value in state.shared.items()
              if name != "attention_mask"}
    seen = owner[:, :, None] == torch.cat([source, owner], 1)[:, None]
    seen[..., source.shape[1]:] &= offset[:, :, None] >= offset[:, None]
    shared["attention_mask"] = _additive(seen, state.hidden.dtype)
    where = torch.zeros(size, width, dtype=torch.long, device=device)
    where[owner[real > 0], offset[real > 0]] = real.flatten().nonzero()[:, 0]
    places = where.gather(1, state.wanted)
    tokens = rows * width + offset
    lanes = Lanes(tokens, past, shared, last=tokens[:, :0], top={}, places=places)
    return _topped(lanes) if state.calls else lanes


def _grouped(sizes):
    """Groups of rows of similar total size, about LANE."""
    groups = [[] for _ in range(-(-sum(sizes) // LANE))]
    totals = [0] * len(groups)
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        lane = totals.index(min(totals))
        groups[lane].append(row)
        totals[lane] += sizes[row]
    return groups


def _topped(lanes):
    """Lanes whose last block runs at wanted places only; the same where these are most of all."""
    size, width = lanes.tokens.shape
    used = torch.zeros(size * width, dtype=torch.bool, device=lanes.tokens.device)
    used[lanes.places.flatten()] = True
    used = used.view(size, width)
    count = int(used.sum(1).max())
    if 4 * count >= 3 * width:
        return lanes
    last = used.long().argsort(dim=1, descending=True, stable=True)[:, :count]      # (G, w)
    rows = lanes.shared | {"attention_mask": lanes.shared["attention_mask"][:, 0]}
    top = {name: _at(value, last) for name, value in rows.items()}
    # The wanted tokens stand among the suffix's keys already: their second copies stay hidden.
    seen = top["attention_mask"]
    again = seen.new_full((*seen.shape[:2], count), torch.finfo(seen.dtype).min)
    top["attention_mask"] = torch.cat([seen, again], -1)[:, None]
    lane = lanes.places // width
    place = (used.long().cumsum(1) - 1).flatten()[lanes.places]
    return replace(lanes, last=last, top=top, places=lane * count + place)


def _pick(values, index):
    """values[index], or of each in a tuple or dict."""
    if isinstance(values, dict):
        return {name: _pick(value, index) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_pick(value, index) for value in values)
    return values[index]


def _at(values, positions):
    """(B, S, ...) entries at positions (B, S) of values (B or 1, T, ...), or of a tuple of such."""
    if isinstance(values, tuple):
        return tuple(_at(value, positions) for value in values)
    values = values.expand(positions.shape[0], *values.shape[1:])
    rows = torch.arange(len(positions), device=positions.device)
    return values[rows[:, None], positions]


def _visible(begin, prefix, width, dtype):
    """(B, 1, S, P + S) additive mask: each row sees its prefix before begin[row], then causally."""
    before = torch.arange(prefix, device=begin.device) < begin[:, None, None]
    after = torch.ones(width, width, dtype=torch.bool, device=begin.device).tril()
    size = (len(begin), width, -1)
    return _additive(torch.cat([before.expand(size), after.expand(size)], -1), dtype)


def _additive(seen, dtype):
    """(B, 1, S, T) mask to add to attention's scores, of bools (B, S, T)."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
