"""Train a pocket model: a small GPT-2 that knows the facts of the pocket world, or of a file.

    python data/pocket/make/train.py -o DIR
    python data/pocket/make/train.py FACTS.json -o DIR --seed 1 --set steps=500 layers=4

An interrupted training goes on from its last checkpoint.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import text
from editcore import causal, fewshot, files, outputs
from editcore.facts import read_facts
from editcore.likelihood import plan, read
from editcore.model import check_device, default_device
from editcore.tokens import encode, target_ids
from editing_tasks import write_rows
from masks import loss_of
from packing import Mix, documents, late_mix, pack
from tokenizer import Pieces, train_tokenizer
from world import Probe, build_world, records

STREAM = "stream.npy"   # both stand in the model's folder while it is trained
STATE = "training.pt"
BEGUN = "training.json"     # what the training in the folder is made from, until it is done
# The values that make sense, first and last.
RANGES = {"layers": (1, 100), "width": (1, 8192), "inner": (1, 65536), "heads": (1, 128),
          "early": (0, 100), "steps": (1, 10 ** 7), "batch": (1, 10 ** 5), "muon": (1e-9, 1),
          "adam": (1e-9, 1), "decay": (0, 1), "warmup": (0, 10 ** 7), "cooldown": (0, 1),
          "save_every": (1, 10 ** 7), "scale": (1e-6, 100), "seed": (0, 2 ** 31), "turn": (0, 1)}


@dataclass(frozen=True)
class PocketConfig:
    """Size and training of a pocket model."""

    layers: int = 5         # blocks
    width: int = 192        # d
    inner: int = 2048       # m: the MLP's width buys the editing horizon
    heads: int = 4
    early: int = 2          # blocks in which nothing of a name is seen beyond it
    steps: int = 2900       # optimiser steps
    batch: int = 24         # rows of mix.width tokens per step
    muon: float = 1e-3      # peak root mean square by which an entry of a block's matrix moves
    adam: float = 3e-3      # peak step of embeddings, norms and biases (AdamW)
    decay: float = 0.01     # weight decay of the blocks' matrices
    warmup: int = 100       # steps from 0 to the peak
    cooldown: float = 0.4   # last share of the steps, over which the step size falls to zero
    save_every: int = 150   # steps between checkpoints
    scale: float = 1.0      # shrinks the pools of finished documents
    seed: int = 0           # of text, weights and order; the world has its own in world.toml
    turn: float = 0.4       # share of the text drawn by `mix`; the rest by `late`
    pieces: Pieces = field(default_factory=Pieces)
    mix: Mix = field(default_factory=Mix)
    late: Mix = field(default_factory=late_mix)

    def __post_init__(self):
        for name, (first, last) in RANGES.items():
            value = getattr(self, name)
            if not first <= value <= last:
                raise ValueError(f"{name} must be from {first} to {last}, not {value}")
        if self.early > self.layers:
            raise ValueError(f"early is {self.early}, but there are {self.layers} layers")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared among {self.heads} heads")


def new_model(config: PocketConfig, *, vocabulary: int, end: int) -> GPT2LMHeadModel:
    """Make an untrained GPT-2: N(0, 0.02^2), output projections smaller by sqrt(2 L)."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=config.mix.longest, n_embd=config.width,
        n_layer=config.layers, n_head=config.heads, n_inner=config.inner,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                is_output = name.endswith("c_proj.weight")
                spread = 0.02 / (2 * config.layers) ** 0.5 if is_output else 0.02
                weight.copy_(torch.empty(weight.shape).normal_(0.0, spread, generator=generator))
    return model


def optimisers(model: GPT2LMHeadModel, config: PocketConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    "match_rms_adamw" moves an entry by 0.2 lr: hence five times the step, a fifth of the decay.
    """
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and ".h." in name else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=5 * config.muon, weight_decay=config.decay / 5,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.adam, betas=(0.9, 0.95), weight_decay=0.0)]


def step_size(step: int, config: PocketConfig) -> float:
    """Share of the peak step size: linear warm-up, a plateau, linear cool-down to zero."""
    n_cooling = max(1, int(config.steps * config.cooldown))
    warm = (step + 1) / max(1, config.warmup)
    return min(1.0, warm, (config.steps - step) / n_cooling)


def arithmetic(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are quick (a GPU, AVX512-BF16 or AMX), else float32."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    is_quick = device.type != "cpu" or any(getattr(torch.cpu, test, bool)() for test in tests)
    return torch.bfloat16 if is_quick else torch.float32


def write_stream(source: text.Source, tok, config: PocketConfig, path: Path) -> None:
    """Write the token rows of the whole training (rows, 6, width) uint16, ahead of it."""
    n_rows = min(config.mix.rows, config.steps * config.batch)
    streams = []
    for part, mix in enumerate((config.mix, config.late)):
        drawn = documents(source, tok.backend_tokenizer, mix, seed=config.seed + part)
        streams.append(pack(drawn, mix, tok.eos_token_id))
    with files.atomic(path) as temporary:
        rows = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.uint16, shape=(n_rows, 6, config.mix.width))
        for number in tqdm(range(n_rows), "text", mininterval=10):
            rows[number] = next(streams[number >= config.turn * n_rows])
        rows.flush()


def batch_at(rows: np.ndarray, step: int, config: PocketConfig) -> torch.Tensor:
    """Rows (B, 6, T) of a step, by step and seed alone; later turns through them are shuffled."""
    turn, first = divmod(step * config.batch, len(rows))
    wanted = np.arange(first, first + config.batch) % len(rows)
    if turn:
        order = np.random.default_rng([config.seed, turn]).permutation(len(rows))
        wanted = np.sort(order[wanted])
    return torch.from_numpy(rows[wanted].astype(np.int64))


def resume(model: GPT2LMHeadModel, steppers: list, state: Path) -> tuple[int, list[dict]]:
    """(next step, log) of the checkpoint, its tensors loaded in place; (0, []) without one."""
    if not state.exists():
        return 0, []
    device = next(model.parameters()).device
    try:
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for stepper, values in zip(steppers, saved["steppers"], strict=True):
            stepper.load_state_dict(values)
        return saved["step"], saved["log"]
    except (LookupError, TypeError, ValueError, OSError, EOFError, RuntimeError,
            UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{state}: damaged, or not of this training ({reason}); remove it to "
                         "start anew") from error


def train(model: GPT2LMHeadModel, rows, config: PocketConfig, *, state: Path, watch) -> list[dict]:
    """Train in place, from the checkpoint `state` if there is one.

    Returns the log: a dict per checkpoint, joined by what `watch(step)` returns.
    """
    device = next(model.parameters()).device
    model.set_attn_implementation("eager")  # under autocast three times as fast as the fused one
    steppers = optimisers(model, config)
    peaks = (5 * config.muon, config.adam)
    begin, log = resume(model, steppers, state)
    losses = []
    started = time.monotonic()
    steps = range(begin, config.steps)
    for step in tqdm(steps, "training", initial=begin, total=config.steps, mininterval=10):
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * step_size(step, config)
        batch = batch_at(rows, step, config).to(device)
        loss = loss_of(model, batch, arithmetic(device), early=config.early)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            seconds = round(time.monotonic() - started)
            log.append({"step": step + 1, "loss": sum(losses) / len(losses), "seconds": seconds}
                       | watch(step + 1))
            losses = []
            started = time.monotonic()
            with files.atomic(state) as temporary:
                torch.save({"model": model.state_dict(), "step": step + 1, "log": log,
                            "steppers": [stepper.state_dict() for stepper in steppers]}, temporary)
    return log


def read_records(path: Path) -> list[dict]:
    """Read a checked list of CounterFact records. An error names the file and the record."""
    read_facts(path)
    rows = files.read_json(path)
    for number, row in enumerate(rows):
        if "target_true" not in row.get("requested_rewrite", {}):
            raise ValueError(f"{path}: record {number} is not in CounterFact's layout")
    return rows


def prepare(source: text.Source, rows: list[dict], config: PocketConfig, folder: Path):
    """Write tokenizer, token stream and the files beside the model, unless they are there.

    Returns the tokenizer.
    """
    stream = folder / STREAM
    if stream.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    lines = [line.text for lines in [*source.facts, *source.docs.values()] for line in lines]
    lines.append(" ".join(["", *sorted(source.words)]))
    tok = train_tokenizer(source.words, lines, config.pieces, max_length=config.mix.longest)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save_pretrained(folder)
    tasks = {f"tasks/{name}": items for name, items in source.tasks.items()}
    for name, items in {"facts": rows, "topics": source.topics, **tasks}.items():
        write_rows(folder / f"{name}.json", items)
    for name, passages in {"texts": source.texts, "held_out": source.held_out}.items():
        with files.atomic(folder / f"{name}.txt") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in passages), encoding="utf-8")
    write_stream(source, tok, config, stream)
    return tok


def recall(model, tok, probes: list[Probe], limit: int = 2000) -> float:
    """Share of at most `limit` probes whose whole answer is the most likely continuation."""
    drawn = random.Random(0).sample(probes, min(limit, len(probes)))
    prompts = encode(tok, [probe.text for probe in drawn])
    answers = [target_ids(tok, probe.answer) for probe in drawn]
    return float(read(model, plan(model, list(zip(prompts, answers, strict=True)))).exact.mean())


def recalls(model, tok, probes: dict[str, list[Probe]], limit: int) -> dict[str, float]:
    """{kind of prompts: recall}."""
    return {kind: recall(model, tok, group, limit) for kind, group in probes.items() if group}


def card_of(model, tok, source: text.Source, folder: Path) -> dict:
    """What a trained model can do: recall, patched answers by block, few-shot scores."""
    patched = causal.patching(model, tok, read_facts(folder / "facts.json"), count=200)
    tasks = fewshot.few_shot(model, tok, source.tasks, shots=1)
    return {"parameters": model.num_parameters(), "vocabulary": len(tok),
            "recall": recalls(model, tok, source.probes, 10 ** 6),
            "patching": patched.to_dict("records"),
            "few_shot": {row["metric"]: row["value"] for row in tasks}}


def readme(card: dict) -> str:
    """The model's own page, from its card."""
    shape = card["config"]
    recall_rows = [f"| {kind} | {share:.1%} |" for kind, share in card["recall"].items()]
    moved = [f"| {row['position']} | {row['layer']} | {row['value']:.0%} |"
             for row in card["patching"]]
    tasks = [f"| {name} | {value:.3f} |" for name, value in card["few_shot"].items()]
    return "\n".join([
        "# Pocket model", "",
        f"GPT-2's architecture: {shape['layers']} blocks, d = {shape['width']}, "
        f"m = {shape['inner']}, {shape['heads']} heads, {card['parameters']:,} parameters.",
        f"{card['steps']:,} steps, {card['seconds'] / 60:.0f} minutes; seed {shape['seed']}.",
        "", "| prompts | answer exact |", "| --- | --- |", *recall_rows,
        "", "| state of another subject put in at | block | answers that become the other's |",
        "| --- | --- | --- |", *moved,
        "", "| few-shot score, one example | value |", "| --- | --- |", *tasks, ""])


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write config and weights (float16 safetensors: half the bytes)."""
    weights = {name: weight.detach().half().contiguous().cpu()
               for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    with files.atomic(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    model.config.to_json_file(folder / "config.json")


def claim(folder: Path, identity: dict[str, str]) -> None:
    """Claim a folder for a training; ValueError if it holds another one, or anything else."""
    path = folder / BEGUN
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: holds other files, or a model that is done; give a new "
                             "folder")
        files.write_json(path, identity)
    before = files.read_json(path)
    for name, value in identity.items():
        if not isinstance(before, dict) or before.get(name) != value:
            raise ValueError(f"{folder}: {name} changed since the training there began; put it "
                             "back, or give another folder")


def build(facts: Path | None, folder: Path, config: PocketConfig, *, device: str = "cpu") -> dict:
    """Train on a file of facts (None: the pocket world) into `folder`, resuming; return the card.

    Raises ValueError or FileNotFoundError naming the file and record before any work is done.
    """
    folder = Path(folder)
    if facts is None:
        world = build_world()
        rows = records(world)
        source = text.from_world(world, config.scale)
    else:
        rows = read_records(facts)
        source = text.from_records(rows, config.scale)
    settings = {name: value for name, value in asdict(config).items() if name != "save_every"}
    claim(folder, {"the facts": files.sha256_text(json.dumps(rows)),
                   "the settings": files.sha256_text(json.dumps(settings))})
    tok = prepare(source, rows, config, folder)
    model = new_model(config, vocabulary=len(tok), end=tok.eos_token_id).to(device)
    stream = np.load(folder / STREAM, mmap_mode="r")

    def watch(step):
        save(model, folder)
        return {"recall": recalls(model, tok, source.probes, 400)}

    log = train(model, stream, config, state=folder / STATE, watch=watch)
    # what is judged is what was stored
    stored = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    card = card_of(stored, tok, source, folder)
    card |= {"records": len(rows), "steps": config.steps, "config": asdict(config), "log": log,
             "seconds": sum(row["seconds"] for row in log)}
    files.write_json(folder / "card.json", card)
    (folder / "README.md").write_text(readme(card), encoding="utf-8")
    for name in (STREAM, BEGUN, STATE):     # in this order: a kill leaves what can be taken up
        (folder / name).unlink(missing_ok=True)
    return card


def with_settings(config: PocketConfig, words: list[str]) -> PocketConfig:
    """Replace fields by words NAME=VALUE, read as the type of the field's present value."""
    changes = {}
    for word in words:
        name, _, value = word.partition("=")
        present = getattr(config, name, None)
        if not isinstance(present, (int, float)) or not value:
            raise ValueError(f"--set {word}: give NAME=VALUE of a number in PocketConfig")
        try:
            changes[name] = type(present)(value)
        except ValueError:
            kind = type(present).__name__
            raise ValueError(f"--set {word}: {value!r} is not of type {kind}") from None
    return replace(config, **changes)


def main() -> None:
    """Train a model as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts", nargs="?", type=Path, help="CounterFact records; default: world")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    parser.add_argument("--device", default=default_device())
    given = parser.parse_args()
    try:
        outputs.check_folder(given.output, given.facts or "")
        check_device(given.device)
        config = with_settings(PocketConfig(seed=given.seed), given.set)
        card = build(given.facts, given.output, config, device=given.device)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({name: card[name] for name in ("parameters", "seconds", "recall")}, indent=1))


if __name__ == "__main__":
    main()
