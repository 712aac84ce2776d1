"""A model and module names in; what goes into or out of those modules during a forward pass captured or replaced."""

import contextlib

import torch


class Stop(Exception):
    """Raised inside a forward pass once everything asked for has been captured; never leaves `capture`."""


@contextlib.contextmanager
def capture(model, names, what="output", stop=True):
    """Keep the input or output tensor of each named module during the forward pass in the block.

        with capture(model, ["transformer.h.3.mlp.c_proj"], "input") as kept:
            run(model, input_ids=ids, attention_mask=mask)
        k = kept["transformer.h.3.mlp.c_proj"]        # (B, T, m)

    With stop, the pass ends as soon as the last named module has run (`run` swallows the exception that does it).
    Tuples are reduced to their first item (some blocks return a tensor, some a tuple). Hooks are removed on exit.
    """
    kept, handles = {}, []

    def keep(name, value):
        kept[name] = value[0] if isinstance(value, tuple) else value
        if stop and len(kept) == len(names):
            raise Stop

    for name in names:
        module = model.get_submodule(name)
        if what == "input":
            hook = module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        else:
            hook = module.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        handles.append(hook)
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def run(model, **inputs):
    """The model's output on `inputs` (None when a capture stopped it), without gradients and without a cache."""
    with torch.no_grad(), contextlib.suppress(Stop):
        return model(**inputs, use_cache=False)


@contextlib.contextmanager
def replaced(model, name, change):
    """In the block, the named module's output h (tensor) becomes change(h); undone on exit.

    A tuple output keeps its other items.
    """
    def hook(_, args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
