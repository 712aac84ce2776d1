"""Facts in; changes of MLP matrices that a trained network reads off their texts and gradients out (arXiv:2104.08164).

A bidirectional LSTM reads "old >> new || prompt" into c; for each edited matrix W (out, in) a two-layer network turns c
into vectors r_A, r_B (out), c_A, c_B (in) and a gate g, and with η = scale · σ(g)

    ΔW = η · (softmax(r_A) c_Aᵀ ⊙ ∇_W L + softmax(r_B) c_Bᵀ)

Over a prompt of b tokens ∇_W L is a sum of b outer products, so ΔW has rank b + 1 at most and is kept as two factors.
All parameters are a dict of tensors; `edit_with` is differentiable in them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.delta import Delta, oriented
from editcore.editors.forced import counted, forced, nll
from editcore.files import atomic
from editcore.generate import continuations
from editcore.model import is_input_first, name_of
from editcore.tail import head
from editcore.tokens import encode, target_ids

UNTRAINED = "untrained"     # the `network` that is no file: the start of training
START = 1e-3                # size of c_A and c_B there, beside that of all other outputs
LSTM = tuple(f"lstm.{kind}_l0{way}" for way in ("", "_reverse") for kind in
             ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))      # torch.lstm's order


@dataclass(frozen=True)
class Ke:
    """Settings of KE; network is needed to edit, what follows scale to begin a training."""

    layers: tuple = (-3, -2, -1)    # whose MLP's linear maps are edited; negative ones count from the last
    network: str = ""               # file of trained parameters (see `save`); "untrained": the start of training
    scale: float = 1.0              # largest η
    hidden: int = 512               # state of the LSTM, a direction
    width: int = 768                # of c
    inner: int = 128                # hidden layer of each matrix's network
    seed: int = 0                   # of the first parameters


PAPER = {   # the last three layers, as published for the editors compared; the pocket model takes the defaults
    "gpt2-xl": {"layers": (45, 46, 47)},
    "llama-2-7b": {"layers": (29, 30, 31)},
    "pocket": {},
}


def prepare(model, tok, config, given):
    """The network's parameters; ValueError names a file that is missing, damaged or made for another model."""
    if not config.network:
        raise ValueError(f"network: KE edits with a trained network; give the file with its parameters, or {UNTRAINED}")
    if config.network == UNTRAINED:
        return fresh(model, config, torch.Generator().manual_seed(config.seed))
    params, _ = load(config.network, next(model.parameters()).device)
    width, hidden = params["condition.weight"].shape
    wanted = shapes(model, config.layers, hidden // 2, width)
    for name, shape in wanted.items():
        if name not in params:
            raise ValueError(f"{config.network}: no parameter {name}; it was trained for another model or other layers")
        found = tuple(params[name].shape)
        if found != tuple(b if a is None else a for a, b in zip(shape, found)):
            raise ValueError(f"{config.network}: {name} is {found}, the model needs {shape}")
    return params


def edit(model, tok, facts, config, prepared):
    """The Delta of all facts: the sum of each one's changes, which are read off the model as it is."""
    total = Delta({}, {"editor": "ke"})
    for fact in facts:
        with torch.no_grad():
            factors, _ = gradients(model, forced(model, tok, [fact]), matrices(model, config.layers))
            made = edit_with(prepared, condition(model, tok, fact), factors, config.scale)
        total = total + Delta({name + ".weight": oriented(left, right, model.get_submodule(name))
                               for name, (left, right) in made.items()})
    return total


def edit_with(params, embedded, factors, scale=1.0):
    """{matrix: (left (out, b + 1), right (b + 1, in))} with ΔW = left @ right, differentiable in params.

    embedded (T, d): the condition text's embeddings; factors {matrix: (u (b, in), δ (b, out))}: ∇_W L = Σ δ_b u_bᵀ.
    """
    c, made = read(params, embedded), {}
    for name, (u, delta) in factors.items():
        r_a, r_b, c_a, c_b, gate = vectors(params, name, c, (delta.shape[1], u.shape[1]))
        left = torch.cat([delta.T * r_a.softmax(0)[:, None], r_b.softmax(0)[:, None]], 1)
        made[name] = scale * gate.sigmoid() * left, torch.cat([u * c_a, c_b[None]])
    return made


def read(params, embedded):
    """c (width,) of embeddings (T, d): the LSTM's last states of both directions, then one linear map."""
    embedded = embedded.to(params["condition.weight"].dtype)
    zero = embedded.new_zeros(2, 1, params["lstm.weight_hh_l0"].shape[1])
    _, last, _ = torch.lstm(embedded[:, None], (zero, zero), [params[name] for name in LSTM], True, 1, 0.0, False,
                            True, False)
    return params["condition.weight"] @ last[:, 0].flatten() + params["condition.bias"]


def vectors(params, name, c, shape):
    """(r_A (out,), r_B (out,), c_A (in,), c_B (in,), g ()) of one matrix; shape (out, in)."""
    first, second = ((params[f"{name}/{part}.weight"], params[f"{name}/{part}.bias"]) for part in ("first", "second"))
    made = second[0] @ torch.tanh(first[0] @ c + first[1]) + second[1]
    *parts, gate = made.split([shape[0], shape[0], shape[1], shape[1], 1])
    return *parts, gate[0]


def fresh(model, config, generator):
    """Parameters before training, float32: drawn as torch's layers are, but c_A and c_B (and with them ΔW) nearly 0."""
    params = {}
    for name, shape in shapes(model, config.layers, config.hidden, config.width, config.inner).items():
        bound = (config.hidden if name in LSTM else shape[-1]) ** -0.5
        params[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    for name, (rows, _) in sizes(model, config.layers).items():
        for part in ("weight", "bias"):
            params[f"{name}/second.{part}"][2 * rows:-1] *= START
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in params.items()}


def shapes(model, layers, hidden, width, inner=None):
    """{parameter: shape} of the network for a model's layers; inner None leaves that size open (None)."""
    d = model.config.hidden_size
    made = {name: (4 * hidden, hidden if "_hh" in name else d) if "weight" in name else (4 * hidden,) for name in LSTM}
    made |= {"condition.weight": (width, 2 * hidden), "condition.bias": (width,)}
    for name, (rows, columns) in sizes(model, layers).items():
        out = 2 * (rows + columns) + 1
        made |= {f"{name}/first.weight": (inner, width), f"{name}/first.bias": (inner,),
                 f"{name}/second.weight": (out, inner), f"{name}/second.bias": (out,)}
    return made


def matrices(model, layers):
    """Names of the linear maps in the MLPs of `layers`."""
    found = []
    for layer in counted(model, layers):
        place = name_of(model, "mlp", layer)
        found += [f"{place}.{name}" for name, module in model.get_submodule(place).named_modules()
                  if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    return found


def sizes(model, layers):
    """{matrix: (out, in)}, whatever the orientation in which the model stores it."""
    modules = {name: model.get_submodule(name) for name in matrices(model, layers)}
    return {name: tuple(one.weight.shape)[::-1 if is_input_first(one) else 1] for name, one in modules.items()}


def condition(model, tok, fact):
    """(T, d) embeddings of "old >> new || prompt"; where the record has no old answer, what the model goes on with."""
    old = getattr(fact, "target_true", "")
    if not old:
        old = tok.decode(continuations(model, tok, [fact.text], len(target_ids(tok, fact.target_new)))[0]).strip()
    (ids,) = encode(tok, [f"{old} >> {fact.target_new} || {fact.text}"])
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(ids, device=next(model.parameters()).device))


def gradients(model, rows, names):
    """({matrix: (u (b, in), δ (b, out))}, loss) of the mean-token NLL of one Forced row, detached, float32 or better.

    Tokens where either is all zero are left out. Nothing of the model changes.
    """
    inputs, outputs, handles = {}, {}, []

    def keep(_, args, output, name):
        inputs[name], outputs[name] = args[0], output if output.requires_grad else output.requires_grad_()

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: keep(module, args, output, name)))
    try:
        with torch.enable_grad():
            hidden = model.base_model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).last_hidden_state
            loss = nll(head(model, hidden[0, rows.begin + rows.offsets[0]])[None], rows.targets, rows.weights)[0]
            found = torch.autograd.grad(loss, [outputs[name] for name in names])
    finally:
        for handle in handles:
            handle.remove()
    return {name: _pairs(inputs[name], delta) for name, delta in zip(names, found, strict=True)}, loss.detach()


def _pairs(u, delta):
    """(u (b, in), δ (b, out)) of (1, T, ·) tensors at the tokens where neither is all zero."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, delta = u[0].detach().to(wide), delta[0].to(wide)
    kept = (u != 0).any(1) & (delta != 0).any(1)
    return u[kept], delta[kept]


def save(path, params, info=None):
    """Write parameters as safetensors, `info` (settings of the training) as JSON in the metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in params.items()}
    with atomic(path) as tmp:
        save_file(tensors, tmp, metadata={"format": "editcore-ke-1", "info": json.dumps(info or {})})


def load(path, device="cpu"):
    """(parameters, info) of a file; FileNotFoundError or ValueError names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            head_of = file.metadata() or {}
            if head_of.get("format") != "editcore-ke-1":
                raise ValueError("its format is not editcore-ke-1")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(head_of["info"])   # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a KE file, or damaged ({error})") from error
