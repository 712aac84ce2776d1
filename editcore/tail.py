"""A model, token rows and a position in each in; the state to run only the blocks above one, from those positions on.

A change that enters at the output of block l, at one position of a row, leaves everything below l and everything before
that position as it was (attention is causal). `start` runs the whole model once and keeps what later tokens read from
earlier ones (keys and values of the blocks above l); `resume` then runs the rest again for changed states, and only it.
"""

import inspect
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from editcore.model import layout, module_of, n_layers


@dataclass(frozen=True)
class Past:
    """Stands in for a cache in one block's attention: what it stored before, joined with what it is given now."""

    keys: torch.Tensor      # (B, heads, P, head width)
    values: torch.Tensor    # (B, heads, P, head width)

    def update(self, keys, values, *_, **__):
        """(keys, values) of prefix and suffix, along the token axis."""
        if not self.keys.shape[-2]:
            return keys, values
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)

    def rows(self, index):
        return Past(self.keys[index], self.values[index])


@dataclass(frozen=True)
class State:
    """Where to go on: S tokens of each of B rows at the output of block `layer`, and what the blocks above need."""

    layer: int
    hidden: torch.Tensor    # (B, S, d) output of block `layer`; S tokens from each row's own position on
    past: tuple             # a Past for each block above
    calls: tuple            # for each block above: (its constant keyword arguments, name of its cache argument)
    shared: dict            # keyword arguments with one entry a row: mask, position ids, position embeddings

    def rows(self, index):
        """The same State for some of the rows (index: int64 or bool tensor)."""
        shared = {name: tuple(part[index] for part in value) if isinstance(value, tuple) else value[index]
                  for name, value in self.shared.items()}
        return replace(self, hidden=self.hidden[index], past=tuple(past.rows(index) for past in self.past),
                       shared=shared)


def start(model, ids, mask, begin, layer, width):
    """State at the output of block `layer` for `width` tokens of each row, from position begin[row] on.

    ids, mask (B, T), right-padded; begin (B,) int64. Positions past a row's end are computed and mean nothing. One pass
    of the whole model without gradients. ValueError if a row is longer than the model's attention window.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and ids.shape[1] > window:
        raise ValueError(f"a row of {ids.shape[1]} tokens is longer than the model's attention window of {window}")
    arguments, output = _watched(model, ids, mask, layer)
    positions = begin[:, None] + torch.arange(width, device=ids.device)
    inside = positions.clamp(max=ids.shape[1] - 1)
    kept = max(int(begin.max()), 0)
    cache = arguments.pop("cache")
    past = tuple(Past(one.keys[:, :, :kept].contiguous(), one.values[:, :, :kept].contiguous())
                 for one in cache.layers[layer + 1:])
    hidden = _at(output, inside)
    shared = {"attention_mask": _visible(begin, kept, width, hidden.dtype), "position_ids": inside}
    calls = tuple(_call(bound, shared, inside) for bound in arguments["blocks"])
    return State(layer, hidden, past, calls, shared)


def resume(model, state, hidden):
    """(B, S, d) states after the last block and the final norm, when block `state.layer` gives `hidden` (B, S, d)."""
    for index, ((constant, slot), past) in enumerate(zip(state.calls, state.past, strict=True), state.layer + 1):
        varying = {name: value for name, value in state.shared.items() if name in constant}
        output = module_of(model, "block", index)(hidden, **{**constant, **varying, slot: past})
        hidden = output[0] if isinstance(output, tuple) else output
    return model.get_submodule(layout(model).norm)(hidden)


def head(model, hidden):
    """(..., V) logits of states (..., d) after the final norm, in float32 or better."""
    logits = model.get_output_embeddings()(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _watched(model, ids, mask, layer):
    """({"blocks": bound arguments of each block above `layer`, "cache": filled cache}, output (B, T, d) of `layer`)."""
    blocks, kept, handles = [], [], []

    def bind(block, args, kwargs):
        bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        blocks.append({**bound, **bound.pop("kwargs", {})})

    def keep(_, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles.append(module_of(model, "block", layer).register_forward_hook(keep))
    for index in range(layer + 1, n_layers(model)):
        handles.append(module_of(model, "block", index).register_forward_pre_hook(bind, with_kwargs=True))
    cache = DynamicCache()
    try:
        model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return {"blocks": blocks, "cache": cache}, kept[0]


def _call(bound, shared, positions):
    """(constant keyword arguments, name of the cache argument) of one block; adds what varies by row to `shared`."""
    slot = next(name for name, value in bound.items() if isinstance(value, Cache))
    constant = {name: value for name, value in list(bound.items())[1:] if name != slot}
    if constant.get("position_embeddings") is not None and "position_embeddings" not in shared:
        shared["position_embeddings"] = tuple(_at(part, positions) for part in constant["position_embeddings"])
    constant.pop("cache_position", None)
    return constant, slot


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
