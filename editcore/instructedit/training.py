"""Train a hypernetwork: examples of edits, and a loop that survives a kill; see also `losses`.

    network = train(model, network, examples, Training(30000), folder)

Each example is edited as at test time, by a low-rank change that is never added to a weight. Adam
lowers edit_weight L_edit + locality_weight L_loc (MEND, arXiv:2110.11309, section 3.3; for
ConvSent arXiv:2206.06520, section 5).
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch

from editcore.files import atomic, sha256_text
from editcore.instructedit import mend
from editcore.instructedit.losses import encode_example, group, losses
from editcore.instructedit.records import edit_target, unwanted_target
from editcore.progress import bar
from editcore.suffix import quick
from editcore.tokens import encode_pairs

RESULT = "network.safetensors"
TOGETHER = 4    # examples that share a pass: attention over more of them costs more than it saves


@dataclass(frozen=True)
class Training:
    """Settings of the training; examples has no default, the others are as published."""

    examples: int                   # edits that are drawn in all, epoch after epoch
    lr: float = 1e-6                # of Adam; small models need about 1e-4
    alpha_lr: float = 1e-4          # of Adam for alpha
    edit_weight: float = 0.1        # of the loss on `after` and `against`
    reply_weight: float = 1.0       # of both where there is an `against`: times edit_weight
    locality_weight: float = 1.0    # of the loss on `locality`
    unlikely: Literal["token", "reply", "contrast"] = "token"   # the loss on `against`
    clip: float = 100.0             # largest norm of the gradient of all parameters
    accumulate: int = 2             # examples per step
    warmup: int = 0                 # edits that the normaliser observes before the first step
    frozen: bool = False            # the normaliser stays as the warm-up left it
    every: int = 1000               # examples between checkpoints
    snapshots: tuple = ()           # numbers of examples after which the network is saved as well
    keep: bool = False              # keep what does not depend on the network in memory
    seed: int = 0                   # of the order


# Examples -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    """One edit and what is asked after it, as (prompt ids, target ids) pairs."""

    name: str               # of the record, for errors and the log
    edit: tuple             # the gradients of their mean-token NLL, summed, are transformed ...
    after: tuple            # must be likely after it: the edit itself, rephrases, or replies
    locality: tuple = ()    # over these targets' positions the prediction must stay
    against: tuple = ()     # must be unlikely after it: replies of the other sentiment
    opposed: tuple = ()     # ... less those of these: what the edit makes less likely
    condition: tuple = ()   # ids of the text that KE reads an edit off


def training_example(tok, record, *, loss_on="edit", opposite=False, replies=4, seed=0,
                     condition=()):
    """The Example of an EditRecord behind its instruction; ValueError names the record.

    loss_on: what must be likely after the edit, the "edit" itself (InstructEdit) or its "rephrase"
    where there is one (MEND). ConvSent: a wanted reply, drawn with the seed, is the edit, with
    `opposite` less one opposite reply; up to `replies` others must be likely after it, as many
    opposite ones unlikely, and as many of another topic stay.
    """
    draw = random.Random(f"{seed} example {record.task} {record.case_id}")
    target = edit_target(record, seed)
    wanted = _sample(draw, [reply for reply in record.wanted if reply != target], replies)
    prompts = record.rephrase if loss_on == "rephrase" and record.rephrase else (record.prompt,)
    locality = []
    for ask in record.locality:
        answers = _sample(draw, ask.answers, replies) if record.topic else ask.answers[:1]
        locality += [(ask.prompt, answer) for answer in answers]
    opposed = unwanted_target(record, seed) if opposite else ""
    unwanted = _sample(draw, [reply for reply in record.unwanted if reply != opposed], replies)
    try:
        return Example(f"{record.task} {record.case_id}", _encode(tok, [(record.prompt, target)]),
                       after=_encode(tok, _crossed(prompts, wanted or (target,))),
                       locality=_encode(tok, locality),
                       against=_encode(tok, _crossed(prompts[:1], unwanted)), condition=condition,
                       opposed=_encode(tok, [(record.prompt, opposed)] if opposed else []))
    except ValueError as error:
        raise ValueError(f"{record.task} record {record.case_id}: {error}") from error


def _sample(draw, texts, count):
    """`count` of the texts, or all if there are fewer, in a drawn order."""
    return tuple(draw.sample(texts, min(count, len(texts))))


def _crossed(prompts, replies):
    """(prompt, reply) pairs: every reply with one of the prompts, or every prompt with it."""
    count = max(len(prompts), len(replies)) if replies else 0
    return [(prompts[i % len(prompts)], replies[i % len(replies)]) for i in range(count)]


def _encode(tok, texts):
    """(prompt ids, target ids) of (prompt, target) texts."""
    return tuple((tuple(ids), tuple(target)) for ids, target in encode_pairs(tok, texts))


# The loop -------------------------------------------------------------------------------------

def train(model, network, examples, training, folder):
    """Train a network; it is also folder/network.safetensors, its losses are in losses.jsonl.

    A stopped training goes on from its last checkpoint to the same result, bit for bit. ValueError
    names a record that cannot be used or whose loss is not finite, or what differs from the
    training that the folder holds.
    """
    folder = Path(folder)
    examples = list(examples)
    _check(examples, training)
    identity = _identity(network, examples, training)
    if (folder / RESULT).is_file():
        finished = mend.load(type(network), folder / RESULT)
        _compare(finished.info, identity, folder / RESULT)
        if finished.info["examples"] == training.examples:
            return finished.to(next(network.parameters()).device)
    optimiser = _optimiser(network, training)
    encoded = _encoder(model, network, examples, training.keep)
    with quick(model):
        log = _resume(folder, network, optimiser, identity)
        if len(log) > training.examples:
            raise ValueError(f"{folder}: {len(log)} examples are done, {training.examples} wanted; "
                             "take another folder")
        if not log:
            draws = _order(len(examples), training.seed, 0)
            for _ in range(training.warmup):
                network.observe(group(model, network, [encoded(next(draws))]).gradients[0])
        draws = _order(len(examples), training.seed, len(log))
        drawn = []
        for number in bar(range(len(log) + 1, training.examples + 1), "training",
                          training.examples, len(log)):
            drawn.append(encoded(next(draws)))
            if number % training.accumulate:
                continue
            log += _learn(model, network, drawn, training, number)
            log[-1]["gradient"] = _step(network, optimiser, training.clip)
            drawn = []
            if number in training.snapshots:
                mend.save(network, folder / f"network-{number}.safetensors", examples=number,
                          identity=identity)
            if number % training.every == 0 or number == training.examples:
                _checkpoint(folder, network, optimiser, log, identity)
    mend.save(network, folder / RESULT, examples=training.examples, identity=identity)
    return network


def _check(examples, training):
    if not examples:
        raise ValueError("training: there are no examples")
    for number in (training.examples, training.every, *training.snapshots):
        if number < 1 or number % training.accumulate:
            raise ValueError("training: examples, every and snapshots must be multiples of "
                             f"accumulate, {training.accumulate}; {number} is not")


def _identity(network, examples, training):
    """Hash of what the result depends on; more examples of one training are welcome."""
    kept = {name: value for name, value in asdict(training).items()
            if name not in ("examples", "every", "snapshots", "keep")}
    start = [(name, tensor.double().sum().item(), tensor.double().square().sum().item())
             for name, tensor in network.state_dict().items()]
    sites = [(site.name, round(site.size, 3)) for site in network.sites]
    return sha256_text(kept, network.settings, sites, start, examples)


def _compare(state, identity, path):
    if state["identity"] != identity:
        raise ValueError(f"{path}: settings, examples, first weights or model have changed since "
                         "that training began; put them back, or take another folder")


def _optimiser(network, training):
    alphas = [weight for name, weight in network.named_parameters() if name.endswith("alpha")]
    others = [weight for name, weight in network.named_parameters() if not name.endswith("alpha")]
    return torch.optim.Adam([{"params": others, "lr": training.lr},
                             {"params": alphas, "lr": training.alpha_lr}])


def _order(count, seed, done):
    """Indices of examples, without end, after the first `done`; shuffled every epoch."""
    epoch, skip = divmod(done, count)
    while True:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(count, generator=draw).tolist()[skip:]
        epoch += 1
        skip = 0


def _encoder(model, network, examples, keep):
    """The function index -> EncodedExample; with keep each is encoded once."""
    memory = {}

    def encoded(index):
        example = memory.get(index) or encode_example(model, network, examples[index])
        if keep:
            memory[index] = example
        return example
    return encoded


def _learn(model, network, encoded, training, number):
    """Add the gradients of a step's examples, the last of that number; return rows of the log."""
    rows = []
    for start in range(0, len(encoded), TOGETHER):
        part = encoded[start:start + TOGETHER]
        terms = losses(model, network, group(model, network, part), training.unlikely,
                       not training.frozen)
        total = 0
        for example, term in zip(part, terms):
            weight = training.edit_weight * (training.reply_weight if example.counts[2] else 1)
            loss = weight * (term["edit"] + term["against"])
            loss = loss + training.locality_weight * term["locality"]
            if not torch.isfinite(loss):
                raise ValueError(f"record {example.name}: the loss is {loss.item()}; the model's "
                                 "weights may be broken, or lr is too large")
            total = total + loss / training.accumulate
            rows.append({"example": number - len(encoded) + len(rows) + 1, "record": example.name,
                         **{key: value.item() for key, value in term.items()},
                         "loss": loss.item()})
        total.backward(inputs=list(network.parameters()))
    return rows


def _step(network, optimiser, clip):
    """One step of Adam; return the norm of the gradient before it was clipped."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad()
    return norm.item()


def _checkpoint(folder, network, optimiser, log, identity):
    """Write the log, then the state, which says how much of the log counts."""
    with atomic(folder / "losses.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    with atomic(folder / "state.pt") as tmp:
        torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(),
                    "examples": len(log), "identity": identity}, tmp)


def _resume(folder, network, optimiser, identity):
    """Put the checkpoint's state back; return the log of the examples that are done."""
    path = folder / "state.pt"
    losses_path = folder / "losses.jsonl"
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = state["examples"]
        before = {"identity": state["identity"]}
    except (LookupError, TypeError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise _damaged(path, error) from error
    _compare(before, identity, path)
    try:
        network.load_state_dict(state["network"], strict=True)
        optimiser.load_state_dict(state["optimiser"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
    try:
        lines = losses_path.read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines[:done]]
        if len(log) < done or not all(isinstance(row, dict) for row in log):
            raise ValueError(f"{len(log)} of {done} lines")
    except (OSError, ValueError) as error:
        raise _damaged(losses_path, error) from error
    return log


def _damaged(path, error):
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{path}: damaged, or not a checkpoint ({reason}); remove {path.parent} to "
                      "start anew")
