"""Facts in; MEMIT's changes of several layers' MLP output projections out (Meng et al. 2023, arXiv:2210.07229)."""

import contextlib
from dataclasses import dataclass

import torch

from editcore.contexts import Group
from editcore.delta import Delta, oriented
from editcore.editors import sources
from editcore.editors.value import Site, optimise
from editcore.model import module_of, name_of
from editcore.tokens import batches, pad
from editcore.trace import capture, run

STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Memit:
    """Settings of MEMIT; layers and lambda_ have no default, the rest is as published."""

    layers: tuple                       # edited layers, ascending; δ is optimised at the output of the last
    lambda_: float                      # weight of C against the new keys ("lambda" on the command line)
    steps: int = 20                     # evaluations of the loss; the last one does not step
    lr: float = 0.5                     # of Adam on δ
    stop_loss: float = 0.05             # a fact is done once its loss is below
    kl_factor: float = 0.0625           # weight of the KL term
    weight_decay: float = 0.5           # weight of ‖δ‖ / ‖h0‖²
    clamp: float = 0.75                 # ‖δ‖ is kept at or below clamp · ‖h0‖
    kl_prompt: str = "{} is a"          # prompt of the KL term
    kl_position: str = "subject"        # read there at the last "subject" token (published code) or the "last" token
    context_groups: tuple = (Group(10, 1, STARTS),)     # sampled context templates
    n_tokens: int = 0                   # tokens of the second moments; 0: all of the texts
    length: int = 512                   # their sequence length
    choices = {"kl_position": ("subject", "last")}


PAPER = {   # published settings by model
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "lambda_": 20000.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25},
    "llama-2-7b": {"layers": (4, 5, 6, 7, 8), "lambda_": 15000.0, "steps": 25},
    # λ acts against kᵀC⁻¹k, which is about m: λ / m as for GPT-J (1,900 here) left a fifth of single edits undone
    "pocket": {"layers": (0, 1), "lambda_": 300.0, "lr": 1.0, "steps": 40, "clamp": 4.0},
}


def prepare(model, tok, config, given):
    """Prepared context templates and second moments of all layers (from the unedited model, once a run)."""
    if not config.layers or list(config.layers) != sorted(set(config.layers)):
        raise ValueError(f"memit: layers are {config.layers}, but must ascend and be at least one")
    return sources.prepare(model, tok, config.layers, given, config)


def edit(model, tok, facts, config, prepared):
    """One Delta that inserts all facts together, spread over the layers; the model stays as it was."""
    values = _values(model, tok, facts, config, prepared)
    total = Delta({}, _info(values, range(len(facts))))
    for index, layer in enumerate(config.layers):
        keys, now = values.keys, values.h0
        if index:
            with total.applied(model):
                keys, now = look(model, values.problems, layer, config.layers[-1])
        residual = (values.h0 + values.delta - now) / (len(config.layers) - index)
        name = name_of(model, "mlp_out", layer)
        left, right = update(prepared.stats, name, mixed(keys), residual, config.lambda_)
        total = total + Delta({name + ".weight": _change(model, layer, left.T, right)})
    return _finite(total, "the batch")


def each(model, tok, facts, config, prepared):
    """A Delta a fact, each an edit of the current model on its own; all facts go through every pass together."""
    values = _values(model, tok, facts, config, prepared)
    found = {}
    for index, layer in enumerate(config.layers):
        keys, now = values.keys, values.h0
        if index:
            keys, now = look(model, values.problems, layer, config.layers[-1], found)
        residual = (values.h0 + values.delta - now) / (len(config.layers) - index)
        solved = prepared.stats.solve(name_of(model, "mlp_out", layer), mixed(keys).T).T
        scale = config.lambda_ + (solved * mixed(keys)).sum(1, keepdim=True)
        found[layer] = (residual.double(), solved / scale)
    return [_finite(Delta({name_of(model, "mlp_out", layer) + ".weight":
                           _change(model, layer, left[row, :, None], right[row, None])
                           for layer, (left, right) in found.items()}, _info(values, [row])), f"record {fact.case_id}")
            for row, fact in enumerate(facts)]


def update(stats, name, keys, residual, weight):
    """(left (n, d), right (n, m)) in float64 with leftᵀ right = R Kᵀ (λC + K Kᵀ)⁻¹, eq. 14 of arXiv:2210.07229.

    keys (n, m) are Kᵀ, residual (n, d) is Rᵀ, weight is λ. With A = λC the inverse of the m × m bracket becomes one of
    n × n (Woodbury): R (I + KᵀA⁻¹K)⁻¹ (A⁻¹K)ᵀ, so that C's Cholesky factor serves every edit.
    """
    keys, residual = keys.double(), residual.double()
    solved = stats.solve(name, keys.T).T / weight
    small = torch.eye(len(keys), dtype=keys.dtype, device=keys.device) + keys @ solved.T
    return torch.cholesky_solve(residual, torch.linalg.cholesky((small + small.T) / 2)), solved


def mixed(keys):
    """(n, m) in float64: half the plain prompt's key and half the mean of the other contexts', of keys (n, c, m)."""
    keys = keys.double()
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2 if keys.shape[1] > 1 else keys[:, 0]


def look(model, problems, layer, last, changes=None):
    """(keys (n, c, m) of `layer`, states (n, d) of block `last` for context 0) at the lookup positions.

    changes {layer: (left (n, d), right (n, m))}: the model of fact i has leftᵢ rightᵢᵀ added to those layers' weights.
    Rows end at the lookup position.
    """
    rows = [ids[:lookup + 1] for one in problems for ids, lookup in zip(one.rows[:-1], one.lookups)]
    per, device = len(problems[0].first), next(model.parameters()).device
    source, target = name_of(model, "mlp_out", layer), name_of(model, "block", last)
    keys, states = [None] * len(rows), [None] * len(problems)
    for group in _groups(rows, per):
        plain = group[0] % per == 0
        ids, mask = pad([rows[i] for i in group], device=device)
        ends = (torch.arange(len(group), device=device), mask.sum(1) - 1)
        with contextlib.ExitStack() as hooks:
            for place, (left, right) in (changes or {}).items():
                facts = torch.tensor([row // per for row in group], device=device)
                hooks.enter_context(_rowwise(model, place, left[facts], right[facts]))
            key = hooks.enter_context(capture(model, [source], "input", stop=not plain))
            state = hooks.enter_context(capture(model, [target])) if plain else {}
            run(model, input_ids=ids, attention_mask=mask)
        for row, found in zip(group, key[source][ends]):
            keys[row] = found
        for row, found in zip(group, state[target][ends] if plain else ()):
            states[row // per] = found
    states = torch.stack(states)
    return torch.stack(keys).unflatten(0, (-1, per)), states.to(torch.promote_types(states.dtype, torch.float32))


def _groups(rows, per):
    """Batches of row indices: the plain prompts, which run further up, apart from the others."""
    for kind in (lambda i: i % per == 0, lambda i: i % per):
        picked = [i for i in range(len(rows)) if kind(i)]
        for batch in batches([len(rows[i]) for i in picked]):
            yield [picked[i] for i in batch]


@contextlib.contextmanager
def _rowwise(model, layer, left, right):
    """In the block, row b of a batch sees left[b] right[b]ᵀ added to the layer's W; left (B, d), right (B, m)."""
    def hook(_, args, output):
        amount = (args[0] * right[:, None].to(output.dtype)).sum(-1, keepdim=True)
        return output + amount * left[:, None].to(output.dtype)

    handle = module_of(model, "mlp_out", layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _values(model, tok, facts, config, prepared):
    """Values of all facts: δ at the output of the last layer, keys of the first."""
    site = Site(config.layers[-1], "block", config.layers[0])
    return optimise(model, tok, facts, prepared.contexts, site, config)


def _change(model, layer, left, right):
    """The stored form of W += left right: low rank while that is smaller than the matrix."""
    module = module_of(model, "mlp_out", layer)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    if left.shape[1] * (left.shape[0] + right.shape[1]) >= left.shape[0] * right.shape[1]:
        return oriented(left, right, module).dense().to(dtype)
    return oriented(left.to(dtype), right.to(dtype), module)


def _info(values, rows):
    return {"editor": "memit", "losses": [values.losses[i][-1] for i in rows],
            "evaluations": [len(values.losses[i]) for i in rows]}


def _finite(delta, label):
    if not delta.is_finite():
        raise ValueError(f"{label}: the update is not finite")
    return delta
