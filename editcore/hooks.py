"""See or change what goes into or out of a model's modules during a forward pass."""

import contextlib
import inspect
from functools import partial

import torch


class Stop(Exception):
    """Raised inside a forward pass once all that is wanted was captured; `run` swallows it."""


@contextlib.contextmanager
def hooked(model, hooks, *, before=False, with_kwargs=False):
    """In the block, each named module calls its hook; on exit the hooks are removed.

        with hooked(model, {"transformer.h.3.mlp": lambda module, args, output: 2 * output}):
            model(input_ids=ids)

    Hooks are torch's; before: they run before the module; with_kwargs: they get keyword arguments.
    """
    with contextlib.ExitStack() as stack:
        for name, hook in hooks.items():
            module = model.get_submodule(name)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.enter_context(register(hook, with_kwargs=with_kwargs))
        yield


@contextlib.contextmanager
def capture(model, names, what="output", stop=True):
    """Collect the input or output tensor of each named module during the pass in the block.

        with capture(model, ["transformer.h.3.mlp.c_proj"], "input") as inputs:
            run(model, input_ids=ids, attention_mask=mask)
        keys = inputs["transformer.h.3.mlp.c_proj"]     # (B, T, m)

    stop=True ends the pass as soon as the last named module has run.
    """
    tensors = {}

    def collect(name, _, args, output=None):
        tensors[name] = first(args if what == "input" else output)
        if stop and len(tensors) == len(names):
            raise Stop

    hooks = {name: partial(collect, name) for name in names}
    with hooked(model, hooks, before=what == "input"):
        yield tensors


def replaced(model, name, change):
    """In the block, the named module's output h, or the first of a tuple, becomes change(h)."""
    def hook(_, args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hooked(model, {name: hook})


@contextlib.contextmanager
def called(model, names):
    """Collect the arguments by name, in order, with which each named module is called."""
    calls = []

    def collect(module, args, kwargs):
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        more = arguments.pop("kwargs", {})
        calls.append(arguments | more)

    with hooked(model, dict.fromkeys(names, collect), before=True, with_kwargs=True):
        yield calls


def first(output):
    """The tensor of a module's output: some blocks return it, some a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def run(model, **inputs):
    """Run the model without gradients and without a cache; None if a `capture` stopped it."""
    with torch.no_grad(), contextlib.suppress(Stop):
        return model(**inputs, use_cache=False)
