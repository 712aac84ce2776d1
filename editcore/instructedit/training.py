"""A model, an untrained hypernetwork and examples of edits in; the hypernetwork trained, its file and its losses out.

    network = train(model, mend.start(model, config), examples, Training(30000), folder)        # or ke.start

Adam lowers edit_weight L_edit + locality_weight L_loc of `hyperloss` (MEND, arXiv:2110.11309, section 3.3).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.files import atomic, sha256_text
from editcore.instructedit import hypernet
from editcore.instructedit.hyperloss import UNLIKELY, evaluate, kind_of, lay, losses
from editcore.progress import bar
from editcore.suffix import fused

STATE, RESULT, LOG = "state.safetensors", "network.safetensors", "losses.jsonl"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")     # what Adam keeps of a parameter


@dataclass(frozen=True)
class Training:
    """Settings of the training; examples has no default, the rest is as published."""

    examples: int                   # edits that are drawn in all (the published "iterations"), epoch after epoch
    lr: float = 1e-6                # of Adam; small models need about 1e-4
    alpha_lr: float = 1e-4          # of Adam for alpha
    edit_weight: float = 0.1        # of the loss on `after` and `against`
    locality_weight: float = 1.0    # of the loss on `locality`
    unlikely: str = "token"         # a key of hyperloss.UNLIKELY: p of a token, or of a "reply"
    clip: float = 100.0             # largest norm of the gradient of all parameters
    accumulate: int = 2             # examples a step
    warmup: int = 0                 # edits that the normaliser sees before the first step
    frozen: bool = False            # the normaliser stays as the warm-up left it
    every: int = 1000               # examples between checkpoints, and between looks at the validation examples
    snapshots: tuple = ()           # numbers of examples after which the hypernetwork is saved under its own name
    keep: bool = False              # keep what does not depend on the hypernetwork of every example, in memory
    seed: int = 0                   # of the order


def total(found, training):
    """The training loss of `losses`: edit_weight (edit + against) + locality_weight locality."""
    return training.edit_weight * (found["edit"] + found["against"]) + training.locality_weight * found["locality"]


def train(model, network, examples, training, folder, validation=()):
    """The Network after `training`, which is also folder/network.safetensors; losses in folder/losses.jsonl.

    A stopped training goes on from its last checkpoint to the same result, bit for bit. ValueError names a record that
    cannot be used or whose loss is not finite, a damaged file, or what has changed since the training there began.
    """
    folder, examples = Path(folder), list(examples)
    _check(examples, training)
    identity = _identity(network, examples, training, list(validation))
    if (finished := _finished(folder, identity, training, network)) is not None:
        return hypernet.moved(finished, _device(network))
    network = replace(network, weights={name: weight.detach().clone().requires_grad_()
                                        for name, weight in network.weights.items()})
    optimiser, laid = _optimiser(network, training), _from(model, network, examples, training.keep)
    with fused(model):
        network, done, log = _resumed(folder, network, optimiser, identity, training.examples) or \
            (_warm(network, laid, len(examples), training), 0, [])
        draws = _order(len(examples), training.seed, done)
        for number in bar(range(done + 1, training.examples + 1), "training", training.examples, done):
            index = next(draws)
            network, row = _learn(model, network, laid(index), training, examples[index].name)
            log.append({"example": number} | row)
            if number % training.accumulate == 0:
                log[-1]["gradient"] = _step(network, optimiser, training)
            if number in training.snapshots:
                hypernet.save(_result(network, identity, number), folder / f"network-{number}.safetensors")
            if number % training.every == 0 or number == training.examples:
                held = evaluate(model, network, validation, training.unlikely) if validation else {}
                log[-1] |= {f"validation_{name}": value for name, value in held.items()}
                _checkpoint(folder, network, optimiser, log, identity)
    result = _result(network, identity, training.examples)
    hypernet.save(result, folder / RESULT)
    return result


def _check(examples, training):
    if not examples:
        raise ValueError("training: there are no examples")
    for name in ("examples", "every", *(["snapshots"] if training.snapshots else [])):
        values = getattr(training, name)
        for value in values if name == "snapshots" else (values,):
            if value < 1 or value % training.accumulate:
                raise ValueError(f"training: {name} is {value}, but must be a multiple of accumulate, "
                                 f"{training.accumulate}")
    if training.unlikely not in UNLIKELY:
        raise ValueError(f"training: unlikely is {training.unlikely!r}, but must be one of {', '.join(UNLIKELY)}")


def _identity(network, examples, training, validation):
    """What the result depends on besides the code, as texts by name; more examples of the same training are welcome."""
    later = ("examples", "every", "snapshots", "keep")
    said = {name: value for name, value in asdict(training).items() if name not in later}
    first = [(name, tensor.double().sum().item(), tensor.double().square().sum().item())
             for name, tensor in hypernet.tensors(network).items()]
    return {"training": json.dumps(said), "settings": json.dumps(network.settings), "start": sha256_text(*first),
            "model": json.dumps([[site.name, round(site.size, 3)] for site in network.sites]),
            "examples": sha256_text(*examples), "validation": sha256_text(*validation)}


def _compare(found, wanted, path):
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{path}: {name} has changed since that training began ({found.get(name)} then, {value} "
                             "now); put it back, or take another folder")


def _finished(folder, identity, training, network):
    """The Network of a training that is done, or None."""
    if not (folder / RESULT).is_file():
        return None
    name, kind = kind_of(network)
    found = hypernet.load(folder / RESULT, "cpu", name, kind.begin)
    _compare(found.info.get("identity", {}), identity, folder / RESULT)
    return found if found.info["examples"] == training.examples else None


def _device(network):
    return next(iter(network.weights.values())).device


def _result(network, identity, done):
    return replace(network, weights={name: weight.detach().clone() for name, weight in network.weights.items()},
                   info={"examples": done, "identity": identity})


def _optimiser(network, training):
    groups = [[weight for name, weight in network.weights.items() if name.endswith("/alpha") == steps]
              for steps in (False, True)]
    rates = training.lr, training.alpha_lr
    return torch.optim.Adam([{"params": group, "lr": lr} for group, lr in zip(groups, rates)])


def _order(count, seed, done):
    """Indices of the examples to draw, without end, `done` of them left out; each epoch is shuffled from its number."""
    epoch, skip = divmod(done, count)
    while True:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(count, generator=draw).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def _from(model, network, examples, keep):
    """The function index -> Laid of that example; with keep, each is made once."""
    memory = {}

    def laid(index):
        made = memory.get(index) or lay(model, network, examples[index])
        if keep:
            memory[index] = made
        return made
    return laid


def _warm(network, laid, count, training):
    """The Network whose normaliser has seen the first edits that will be drawn."""
    draws = _order(count, training.seed, 0)
    for _ in range(training.warmup):
        network = hypernet.watch(network, laid(next(draws)).found)
    return network


def _learn(model, network, laid, training, name):
    """(Network with the example in its normaliser, its losses as floats); gradients are added to the weights'."""
    if not training.frozen:
        network = hypernet.watch(network, laid.found)
    found = losses(model, network, laid, training.unlikely)
    loss = total(found, training)
    if not torch.isfinite(loss):
        raise ValueError(f"record {name}: the loss is {loss.item()}; the model's weights may be broken, or lr is too "
                         "large")
    torch.autograd.backward(loss / training.accumulate, inputs=list(network.weights.values()))
    return network, {"record": str(name), **{key: value.item() for key, value in found.items()}, "loss": loss.item()}


def _step(network, optimiser, training):
    """One step of Adam; the norm of the gradient before it was clipped."""
    norm = torch.nn.utils.clip_grad_norm_(list(network.weights.values()), training.clip)
    optimiser.step()
    optimiser.zero_grad()
    return norm.item()


def _checkpoint(folder, network, optimiser, log, identity):
    """Write the log, then the state, which says how much of the log counts: a kill leaves one state or the other."""
    with atomic(folder / LOG) as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    moments = {f"adam/{name}/{part}": optimiser.state[weight][part].detach().cpu().contiguous()
               for name, weight in network.weights.items() for part in MOMENTS}
    words = hypernet.words(network) | {"examples": str(len(log)), "identity": json.dumps(identity)}
    with atomic(folder / STATE) as tmp:
        save_file(hypernet.tensors(network) | moments, tmp, metadata=words)


def _resumed(folder, network, optimiser, identity, wanted):
    """(Network, examples done, log) of the checkpoint in `folder`, Adam's moments put back; None if there is none."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            words, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _compare(json.loads(words["identity"]), identity, path)
        done, device = int(words["examples"]), _device(network)
        saved = hypernet.moved(hypernet.built(words, found, kind_of(network)[1].begin), device)
        with torch.no_grad():
            for name, weight in network.weights.items():
                weight.copy_(saved.weights[name])
                optimiser.state[weight] = {part: found[f"adam/{name}/{part}"].clone().to(
                    "cpu" if part == "step" else device) for part in MOMENTS}
        if done > wanted:
            raise ValueError(f"{path}: {done} examples are done already, {wanted} are wanted; take another folder")
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()[:done]
        if len(lines) < done:
            raise ValueError(f"{folder / LOG} has {len(lines)} lines, but {done} examples are done")
        return replace(network, norms=saved.norms), done, [json.loads(line) for line in lines]
    except (SafetensorError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint ({error}); remove it to start anew") from error
