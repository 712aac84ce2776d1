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
from editcore.editors.teacher_forcing import counted, forced, nll
from editcore.files import atomic
from editcore.generate import continuations
from editcore.instructedit import hypernet
from editcore.model import is_input_first, name_of
from editcore.suffix import head
from editcore.tokens import encode, target_ids

FORMAT = "editcore-ke-1"
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


PAPER = {   # the last three layers, as published for the editors compared; what learns fast on the pocket model
    "gpt2-xl": {"layers": (45, 46, 47)},
    "llama-2-7b": {"layers": (29, 30, 31)},
    "pocket": {"layers": (-2, -1), "scale": 30.0, "hidden": 64, "width": 64, "inner": 32},
}


def prepare(model, tok, config, given):
    """The network's parameters; ValueError names a file that is missing, damaged or made for another model."""
    if not config.network:
        raise ValueError(f"network: KE edits with a trained network; give the file with its parameters, or {UNTRAINED}")
    if config.network == UNTRAINED:
        return fresh(model, config, torch.Generator().manual_seed(config.seed))
    params, _ = load(config.network, next(model.parameters()).device)
    width, hidden = params["condition.weight"].shape
    wanted = shapes(sizes(model, config.layers), model.config.hidden_size, (hidden // 2, width, None))
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
    wanted = sizes(model, config.layers)
    for name, shape in shapes(wanted, model.config.hidden_size, (config.hidden, config.width, config.inner)).items():
        bound = (config.hidden if name in LSTM else shape[-1]) ** -0.5
        params[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    for name, (rows, _) in wanted.items():
        for part in ("weight", "bias"):
            params[f"{name}/second.{part}"][2 * rows:-1] *= START
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in params.items()}


def start(model, config):
    """The untrained parameters as a hypernet.Network, which `editcore.hyper` trains as it trains MEND's."""
    found = sizes(model, config.layers)
    sites = tuple(hypernet.Site(name, columns, rows, model.get_parameter(name + ".weight").double().norm().item())
                  for name, (rows, columns) in found.items())
    settings = {"format": FORMAT, "layers": list(counted(model, config.layers)), "embedded": model.config.hidden_size,
                **{name: getattr(config, name) for name in ("hidden", "width", "inner", "scale", "seed")}}
    weights = fresh(model, config, torch.Generator().manual_seed(config.seed))
    return hypernet.Network(sites, settings, weights, {}, {})


def begin(sites, settings):
    """A Network of zeros with the shapes of one that `start` made."""
    wanted = {site.name: (site.outputs, site.inputs) for site in sites}
    sized = tuple(settings[name] for name in ("hidden", "width", "inner"))
    weights = {name: torch.zeros(shape) for name, shape in shapes(wanted, settings["embedded"], sized).items()}
    return hypernet.Network(tuple(sites), dict(settings), weights, {}, {})


def factors(network, embedded, found):
    """`edit_with` of a Network as pairs {matrix: (right (b + 1, in), -leftᵀ (b + 1, out))}, as `mend.stepped` takes."""
    made = edit_with(network.weights, embedded, found, network.settings["scale"])
    return {name: (right, -left.T) for name, (left, right) in made.items()}


def shapes(matrices, d, widths):
    """{parameter: shape} for {matrix: (out, in)}, embeddings of d and (hidden, width, inner).

    inner None leaves that size open (None).
    """
    hidden, width, inner = widths
    made = {name: (4 * hidden, hidden if "_hh" in name else d) if "weight" in name else (4 * hidden,) for name in LSTM}
    made |= {"condition.weight": (width, 2 * hidden), "condition.bias": (width,)}
    for name, (rows, columns) in matrices.items():
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
    """(T, d) embeddings of `conditions` of one fact."""
    return embeddings(model, conditions(model, tok, [fact])[0])


def conditions(model, tok, facts):
    """Token ids of "old >> new || prompt" of each fact; an unknown old answer is what the model goes on with."""
    found = [getattr(fact, "target_true", "") for fact in facts]
    missing = {}
    for index, old in enumerate(found):
        if not old:
            missing.setdefault(len(target_ids(tok, facts[index].target_new)), []).append(index)
    for count, group in missing.items():
        said = continuations(model, tok, [facts[index].text for index in group], count)
        for index, ids in zip(group, said):
            found[index] = tok.decode(ids).strip()
    return encode(tok, [f"{old} >> {fact.target_new} || {fact.text}" for old, fact in zip(found, facts)])


def embeddings(model, ids):
    """(T, d) of a list of T tokens."""
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
        save_file(tensors, tmp, metadata={"format": FORMAT, "info": json.dumps(info or {})})


def load(path, device="cpu"):
    """(parameters, info) of a file; FileNotFoundError or ValueError names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            head_of = file.metadata() or {}
            if head_of.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(head_of["info"])   # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a KE file, or damaged ({error})") from error
