"""A file of facts (or none: the pocket world) and a config come in; a small GPT-2 that knows them comes out."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from editcore import corpus, files, learning, packing, pocket_report, progress, wordpieces, world

STREAM, STATE = "stream.npy", "training.pt"  # in the model's folder while it is trained


@dataclass(frozen=True)
class PocketConfig:
    """Size and training of a pocket model."""

    layers: int = 5  # blocks
    width: int = 192  # d
    inner: int = 2048  # m: the MLP width buys the editing horizon
    heads: int = 4
    early: int = 2  # blocks in which nothing of a name is seen beyond it: its facts are gathered there
    steps: int = 2900  # optimiser steps
    batch: int = 24  # rows of mix.width tokens a step
    muon: float = 1e-3  # peak step of the blocks' matrices: the root mean square by which an entry moves
    adam: float = 3e-3  # peak step of embeddings, norms and biases (AdamW)
    decay: float = 0.01  # weight decay of the blocks' matrices
    warmup: int = 100  # steps from 0 to the peak
    cooldown: float = 0.4  # last share of the steps, over which the step size falls linearly to zero
    save_every: int = 150  # steps between checkpoints
    look_every: int = 1  # checkpoints between looks at recall and the patching test
    scale: float = 1.0  # shrinks the pools of finished documents
    seed: int = 0  # of text, weights and order; the world has its own in world.toml
    pieces: wordpieces.Pieces = field(default_factory=wordpieces.Pieces)
    turn: float = 0.4  # share of the text drawn by `mix`; the rest by `late`
    mix: packing.Mix = field(default_factory=packing.Mix)
    late: packing.Mix = packing.LATE


def new_model(config: PocketConfig, vocabulary: int, end: int) -> GPT2LMHeadModel:
    """An untrained GPT-2: N(0, 0.02^2), output projections smaller by sqrt(2 L); GELU in its fused form."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=config.mix.longest, n_embd=config.width, n_layer=config.layers,
        n_head=config.heads, n_inner=config.inner, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                spread = 0.02 / (2 * config.layers) ** 0.5 if name.endswith("c_proj.weight") else 0.02
                weight.copy_(torch.empty(weight.shape).normal_(0.0, spread, generator=generator))
    return model


def optimisers(model: GPT2LMHeadModel, config: PocketConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or ".h." not in name]
    return [learning.Muon(matrices, lr=config.muon, weight_decay=config.decay),
            torch.optim.AdamW(others, lr=config.adam, betas=(0.9, 0.95), weight_decay=0.0)]


def step_size(step: int, config: PocketConfig) -> float:
    """Share of the peak step size: linear warm-up, a plateau, linear cool-down to zero."""
    cool = max(1, int(config.steps * config.cooldown))
    return min(1.0, (step + 1) / max(1, config.warmup), (config.steps - step) / cool)


def arithmetic(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are quick (a graphics processor; a CPU with AVX512-BF16 or AMX), else float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    quick = device.type != "cpu" or any(getattr(torch.cpu, name, bool)() for name in names)
    return torch.bfloat16 if quick else torch.float32


def write_stream(source: corpus.Source, tokenizer, config: PocketConfig, path: Path) -> None:
    """The token rows of the whole training (rows, 6, width) uint16, written once, ahead of it."""
    count = min(config.mix.rows, config.steps * config.batch)
    backend, pad = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    first, second = (packing.pack(packing.documents(source, backend, mix, config.seed + part), mix, pad)
                     for part, mix in enumerate((config.mix, config.late)))
    with files.atomic(path) as temporary:
        shape = (count, 6, config.mix.width)
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint16, shape=shape)
        for number in progress.bar(range(count), "text"):
            rows[number] = next(first if number < config.turn * count else second)
        rows.flush()


def batch_at(rows: np.ndarray, step: int, config: PocketConfig) -> torch.Tensor:
    """The rows (B, 6, T) of a step, from step and seed alone: a resumed run sees the same. Later turns are shuffled."""
    turn, first = divmod(step * config.batch, len(rows))
    wanted = np.arange(first, first + config.batch) % len(rows)
    if turn:
        wanted = np.sort(np.random.default_rng([config.seed, turn]).permutation(len(rows))[wanted])
    return torch.from_numpy(rows[wanted].astype(np.int64))


def resume(model: GPT2LMHeadModel, steppers: list, state: Path) -> tuple[int, list[dict]]:
    """(next step, log) of the checkpoint, its tensors loaded in place; (0, []) if there is none."""
    if not state.exists():
        return 0, []
    saved = torch.load(state, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(saved["model"])
    for stepper, kept in zip(steppers, saved["steppers"], strict=True):
        stepper.load_state_dict(kept)
    return saved["step"], saved["log"]


def train(model: GPT2LMHeadModel, rows: np.ndarray, config: PocketConfig, state: Path, watch) -> list[dict]:
    """Train in place, from the checkpoint `state` if there is one; returns the log, joined by `watch(step)` → dict."""
    device = next(model.parameters()).device
    model.set_attn_implementation("eager")  # under autocast on a CPU three times as fast as the fused kernel
    steppers, losses, started = optimisers(model, config), [], time.monotonic()
    begin, log = resume(model, steppers, state)
    for step in progress.bar(range(begin, config.steps), "training", total=config.steps, start=begin):
        for stepper, peak in zip(steppers, (config.muon, config.adam), strict=True):
            for group in stepper.param_groups:
                group["lr"] = peak * step_size(step, config)
        loss = learning.loss_of(model, batch_at(rows, step, config).to(device), arithmetic(device), config.early)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            log.append({"step": step + 1, "loss": sum(losses) / len(losses),
                        "seconds": round(time.monotonic() - started), **watch(step + 1)})
            losses, started = [], time.monotonic()
            with files.atomic(state) as temporary:
                torch.save({"model": model.state_dict(), "steppers": [s.state_dict() for s in steppers],
                            "step": step + 1, "log": log}, temporary)
    return log


def source_of(path: Path | None, config: PocketConfig) -> tuple[corpus.Source, list[dict]]:
    """(what to read, the records): of a file in CounterFact's layout, or of the pocket world if there is none."""
    if path is None:
        made = world.build_world()
        return corpus.from_world(made, config.scale), world.records(made)
    records = read_records(path)
    return corpus.from_records(records, config.scale), records


def read_records(path: Path) -> list[dict]:
    """A checked list of CounterFact records. Raises one error that names the file and the record."""
    records = files.read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a non-empty list of records in CounterFact's layout")
    for number, record in enumerate(records):
        try:
            wish = record["requested_rewrite"]
            texts = [wish["prompt"], wish["subject"], wish["target_true"]["str"], wish["target_new"]["str"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: record {number} is not in CounterFact's layout: {error}") from None
        if not all(isinstance(text, str) and text.strip() for text in texts) or wish["prompt"].count("{}") != 1:
            raise ValueError(f"{path}: record {number}: prompt needs one {{}}, and subject and targets some text")
    return records


def prepare(source: corpus.Source, records: list[dict], config: PocketConfig, folder: Path) -> PreTrainedTokenizerFast:
    """Tokenizer, token stream and the files that stand beside the model; what exists already is kept."""
    stream = folder / STREAM
    if stream.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    texts = [line.text for lines in [*source.facts, *source.docs.values()] for line in lines]
    texts.append(" ".join(["", *sorted(source.words)]))
    tokenizer = wordpieces.train_tokenizer(source.words, texts, config.pieces, config.mix.longest)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    lists = {f"tasks/{name}": items for name, items in source.tasks.items()}
    for name, rows in {"facts": records, "topics": source.topics, **lists}.items():
        with files.atomic(folder / f"{name}.json") as temporary:
            body = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
            temporary.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    for name, lines in {"texts": source.texts, "held_out": source.held_out}.items():
        with files.atomic(folder / f"{name}.txt") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_stream(source, tokenizer, config, stream)
    return tokenizer


def build(facts: Path | None, folder: Path, config: PocketConfig | None = None, device: str = "cpu") -> dict:
    """Train a pocket model on a file of facts (None: the pocket world) into `folder`, resuming; returns its card.

    Raises ValueError or FileNotFoundError naming the file and record before any work is done.
    """
    config, folder = config or PocketConfig(), Path(folder)
    source, records = source_of(facts, config)
    tokenizer = prepare(source, records, config, folder)
    model = new_model(config, len(tokenizer), tokenizer.eos_token_id).to(device)
    rows = np.load(folder / STREAM, mmap_mode="r")

    def watch(step: int) -> dict:
        if step // config.save_every % config.look_every:
            return {}
        save(model, folder)
        return pocket_report.glance(model, tokenizer, source.probes, source.tasks)

    log = train(model, rows, config, folder / STATE, watch)
    save(model, folder)
    stored = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found = pocket_report.measure(stored, tokenizer, source.probes, source.tasks)
    card = {"parameters": stored.num_parameters(), "vocabulary": len(tokenizer), "records": len(records),
            "steps": config.steps, "device": "one CPU core" if device == "cpu" else "a graphics processor",
            "tokens": config.steps * config.batch * config.mix.width, "seconds": sum(row["seconds"] for row in log),
            "config": asdict(config), **found, "log": log}
    files.write_json(folder / "card.json", card)
    with files.atomic(folder / "README.md") as temporary:
        temporary.write_text(pocket_report.readme(card), encoding="utf-8")
    for name in (STREAM, STATE):
        (folder / name).unlink()
    return card


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Config and weights (float16 safetensors: half the bytes); what is judged is what was stored."""
    kept = {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()
            if name != "lm_head.weight"}
    with files.atomic(folder / "model.safetensors") as temporary:
        save_file(kept, temporary, metadata={"format": "pt"})
    model.config.to_json_file(folder / "config.json")
