"""A model, token rows and a position in each in; the state to run only the blocks above one, from those positions on.

A change that enters at the output of block l, at one position of a row, leaves everything below l and everything before
that position as it was (attention is causal). `start` runs the model once and keeps what later tokens read from earlier
ones (keys and values of every block); `resume` then runs the rest again for changed states, and only it. How a block is
called is seen from a call of it, so no architecture is named here.
"""

import contextlib
import inspect
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache

from editcore.hooks import Stop, capture
from editcore.model import layout, module_of, n_layers, name_of


@dataclass(frozen=True)
class Past:
    """Stands in for a cache in one block's attention: what it stored before, joined with what it is given now."""

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
    """Where to go on: S tokens of each of B rows at the output of block `layer`, and what the blocks above need."""

    layer: int
    hidden: torch.Tensor    # (B, S, d) output of block `layer`; S tokens from each row's own position on
    past: tuple             # (keys, values) of each block above, before that position
    calls: tuple            # for each block above: (its constant keyword arguments, name of its cache argument)
    shared: dict            # keyword arguments with one entry a row: attention mask, position ids, position embeddings
    wanted: torch.Tensor    # (B, s) offsets in the suffix whose final states `resume` gives
    top: dict               # `shared` for the last block if that runs at the wanted offsets only; else empty

    def rows(self, index):
        """The same State for some of the rows (index: int64 or bool tensor)."""
        def pick(value):
            return tuple(map(pick, value)) if isinstance(value, tuple) else value[index]
        shared, top = ({name: pick(value) for name, value in some.items()} for some in (self.shared, self.top))
        return replace(self, hidden=self.hidden[index], past=pick(self.past), shared=shared, top=top,
                       wanted=self.wanted[index])


def start(model, ids, mask, begin, layer, wanted):
    """State at the output of block `layer` for the tokens of each row from position begin[row] on.

    ids, mask (B, T), right-padded; begin (B,) int64; wanted (B, s) offsets from there whose final states are wanted:
    the suffix ends with the largest. Runs all blocks on what stands before, blocks up to `layer` on the suffix, without
    gradients. Modules that a `capture` watches are seen twice, last with the suffix. ValueError if a row is longer than
    the model's attention window.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and ids.shape[1] > window:
        raise ValueError(f"a row of {ids.shape[1]} tokens is longer than the model's attention window of {window}")
    device, kept = ids.device, max(int(begin.max()), 1)
    positions = begin[:, None] + torch.arange(int(wanted.max()) + 1, device=device)
    inside = positions.clamp(max=ids.shape[1] - 1)
    (first,), _ = _calls(model, ids, mask, [0])
    bound, cache = _calls(model, ids[:, :kept], mask[:, :kept], range(n_layers(model)))
    hidden = _at(next(iter(first.values())), inside)
    shared = {"attention_mask": _visible(begin, kept, positions.shape[1], hidden.dtype), "position_ids": inside}
    if first.get("position_embeddings") is not None:
        shared["position_embeddings"] = tuple(_at(part, inside) for part in first["position_embeddings"])
    past = tuple((one.keys, one.values) for one in cache.layers)
    below = State(-1, hidden, past, tuple(map(_call, bound)), shared, wanted, {})
    with torch.no_grad():
        hidden = _blocks(model, below, hidden, layer + 1)
    state = replace(below, layer=layer, hidden=hidden, past=past[layer + 1:], calls=below.calls[layer + 1:])
    return replace(state, top=_top(state))


def resume(model, state, hidden):
    """(B, s, d) states after the last block and the final norm at the wanted offsets.

    hidden (B, S, d) takes the place of block `state.layer`'s output. Where few offsets are wanted the last block reads
    keys and values of the whole suffix, and does the rest of its work at those offsets only.
    """
    count = len(state.calls) - bool(state.top)
    hidden = _blocks(model, state, hidden, count)
    if state.top:
        seen = []
        with contextlib.suppress(Stop):
            _block(model, state, hidden, count, Tap(seen))
        keys, values = (torch.cat(pair, -2) for pair in zip(state.past[-1], seen))
        last = replace(state, shared=state.top)
        hidden = _block(model, last, _at(hidden, state.wanted), count, Past(keys, values))
    else:
        hidden = _at(hidden, state.wanted)
    return model.get_submodule(layout(model).norm)(hidden)


def head(model, hidden):
    """(..., V) logits of states (..., d) after the final norm, in float32 or better."""
    logits = model.get_output_embeddings()(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def fused(model):
    """In the block, GPT-2's tanh-GELU, eight operations in transformers, is torch's single one (equal to rounding)."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
              if isinstance(child, NewGELUActivation)]
    try:
        for parent, name, _ in places:
            setattr(parent, name, torch.nn.GELU("tanh"))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _blocks(model, state, hidden, count):
    """hidden after the first `count` blocks above `state.layer`."""
    for number in range(count):
        hidden = _block(model, state, hidden, number, Past(*state.past[number]))
    return hidden


def _block(model, state, hidden, number, past):
    """hidden after block number `number` above `state.layer`."""
    constant, slot = state.calls[number]
    varying = {name: value for name, value in state.shared.items() if name in constant}
    output = module_of(model, "block", state.layer + 1 + number)(hidden, **{**constant, **varying, slot: past})
    return output[0] if isinstance(output, tuple) else output


def _calls(model, ids, mask, layers):
    """(arguments by name of each block in `layers`, cache) of a forward pass that stops in the last one's attention."""
    bound, handles = [], []

    def bind(block, args, kwargs):
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        bound.append({**arguments, **arguments.pop("kwargs", {})})

    for layer in layers:
        handles.append(module_of(model, "block", layer).register_forward_pre_hook(bind, with_kwargs=True))
    cache = DynamicCache()
    try:
        with capture(model, [name_of(model, "attn", layers[-1])]), torch.no_grad(), contextlib.suppress(Stop):
            model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return bound, cache


def _call(bound):
    """(constant keyword arguments, name of the cache argument) of a block."""
    slot = next(name for name, value in bound.items() if isinstance(value, Cache))
    return {name: value for name, value in list(bound.items())[1:] if name not in (slot, "cache_position")}, slot


def _top(state):
    """`State.top`: empty unless fewer than three quarters of the suffix are wanted (below that it saves work)."""
    width = state.hidden.shape[1]
    if not state.calls or 4 * state.wanted.shape[1] >= 3 * width:
        return {}
    top = {name: tuple(_at(part, state.wanted) for part in value) if isinstance(value, tuple)
           else _at(value, state.wanted) for name, value in state.shared.items() if name != "attention_mask"}
    seen = _at(state.shared["attention_mask"][:, 0], state.wanted)
    # The wanted tokens stand among the suffix's keys already: their second copies stay hidden.
    again = seen.new_full((*seen.shape[:2], seen.shape[1]), torch.finfo(seen.dtype).min)
    return {**top, "attention_mask": torch.cat([seen, again], -1)[:, None]}


def _at(values, positions):
    """(B, S, ...) entries of values (B or 1, T, ...) at positions (B, S)."""
    values = values.expand(positions.shape[0], *values.shape[1:])
    return values[torch.arange(len(positions), device=positions.device)[:, None], positions]


def _visible(begin, kept, width, dtype):
    """(B, 1, S, P + S) additive mask: the suffix sees its row's tokens before begin[row], and itself causally."""
    device = begin.device
    prefix = (torch.arange(kept, device=device) < begin[:, None])[:, None, None, :].expand(-1, -1, width, -1)
    suffix = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(len(begin), 1, -1, -1)
    seen = torch.cat([prefix, suffix], -1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
