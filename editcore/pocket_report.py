"""A pocket model and its probes come in; recall, the patching test and few-shot scores come out as tidy numbers."""

import random

import torch

from editcore import fewshot_tasks as tasks

# Text before a prompt must not matter.
PREFIXES = ("The factory makes shoes. ", "People in the street say that. ", "<|endoftext|>")


def batches(texts: list, size: int = 256):
    """Slices of at most `size`."""
    return (texts[at : at + size] for at in range(0, len(texts), size))


def answers_right(model, tokenizer, prompts: list[str], answers: list[str]) -> list[bool]:
    """Whether every token of " answer" is the most probable one after its prompt (teacher-forced)."""
    right = []
    for pairs in batches(list(zip(prompts, answers, strict=True))):
        heads = [tokenizer(prompt).input_ids for prompt, _ in pairs]
        tails = [tokenizer(" " + answer).input_ids for _, answer in pairs]
        whole = {"input_ids": [head + tail for head, tail in zip(heads, tails, strict=True)]}
        padded = tokenizer.pad(whole, return_tensors="pt").to(model.device)
        with torch.no_grad():
            best = model(**padded).logits.argmax(-1).tolist()
        right += [row[len(h) - 1 : len(h) + len(t) - 1] == t for row, h, t in zip(best, heads, tails, strict=True)]
    return right


def recall(model, tokenizer, probes: list, limit: int, seed: int = 0, prefix: str = "") -> float:
    """Share of at most `limit` probes whose answer is exact; `prefix` (with its final space) stands before each."""
    chosen = random.Random(seed).sample(probes, min(limit, len(probes)))
    right = answers_right(model, tokenizer, [prefix + p.text for p in chosen], [p.answer for p in chosen])
    return sum(right) / max(1, len(right))


def states(model, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The residual stream after every block: L tensors (1, T, d)."""
    kept: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: kept.append(first(out))) for block in model.transformer.h]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return tuple(kept)


def first(out):
    """A block's hidden states, whether it returns them alone or in a tuple."""
    return out[0] if isinstance(out, tuple) else out


def patched(model, ids: torch.Tensor, layer: int, at: int, state: torch.Tensor) -> torch.Tensor:
    """Logits (V,) at the last token when the residual stream after block `layer` at token `at` is `state` (d,)."""
    def replace(_, __, out):
        hidden = first(out).clone()
        hidden[0, at] = state
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = model.transformer.h[layer].register_forward_hook(replace)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    handle.remove()
    return logits


def subject_end(tokenizer, text: str, end: int) -> int:
    """Index of the token that ends at character `end`."""
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    return next(i for i, (_, b) in enumerate(offsets) if b >= end)


def patching(model, tokenizer, probes: list, count: int = 60, seed: int = 0) -> list[dict]:
    """Rows {where: "subject" | "last", layer, share}: how often the answer becomes that of the state's subject.

    Two probes of one wording with different one-token answers; the state after block `layer` at the last subject token
    (or at the last prompt token) of one replaces that of the other.
    """
    rng, groups = random.Random(seed), {}
    for probe in probes:
        if len(tokenizer(" " + probe.answer).input_ids) == 1 and not probe.text.endswith(probe.subject):
            groups.setdefault(probe.prompt, []).append(probe)
    groups = {wording: group for wording, group in groups.items() if len({p.answer for p in group}) > 1}
    layers, hits = len(model.transformer.h), {}
    for _ in range(count):
        group = groups[rng.choice(sorted(groups))]
        to, of = rng.sample(group, 2)
        while of.answer == to.answer:
            to, of = rng.sample(group, 2)
        ids = [tokenizer(p.text, return_tensors="pt").input_ids.to(model.device) for p in (to, of)]
        ends = [subject_end(tokenizer, p.text, p.prompt.index("{}") + len(p.subject)) for p in (to, of)]
        wanted, source = tokenizer(" " + of.answer).input_ids[0], states(model, ids[1])
        for layer in range(layers):
            for where, (put, take) in {"subject": ends, "last": (-1, -1)}.items():
                logits = patched(model, ids[0], layer, put, source[layer][0, take])
                hits[where, layer] = hits.get((where, layer), 0) + int(logits.argmax() == wanted)
    return [{"where": where, "layer": layer, "share": n / count} for (where, layer), n in sorted(hits.items())]


def few_shot(model, tokenizer, name: str, items: list[dict], shots: int, seed: int = 0) -> float:
    """Accuracy by label probability; an item's shots are drawn from the others, labels in turn, in random order.

    Of a prompt longer than the model's positions the end is read.
    """
    rng, right = random.Random(f"{seed} {name}"), []
    labels = [tokenizer(" " + word).input_ids[0] for word in tasks.task(name).labels]
    prompts = []
    for item in items:
        drawn = [rng.choice([o for o in items if o["label"] == n % 2 and o is not item]) for n in range(shots)]
        ids = tokenizer(tasks.render(name, item, rng.sample(drawn, len(drawn)))).input_ids
        prompts.append(ids[-model.config.n_positions:])
    for pairs in batches(list(zip(prompts, items, strict=True)), 64):
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in pairs]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**padded).logits
        right += [int(logits[i, len(ids) - 1, labels].argmax()) == item["label"] for i, (ids, item) in enumerate(pairs)]
    return sum(right) / len(right)


def glance(model, tokenizer, probes: dict[str, list], items: dict[str, list[dict]], count: int = 400) -> dict:
    """A quick look during training: recall, patching shares, few-shot accuracy; the model is put back as it was."""
    before, mode = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    found = {kind: recall(model, tokenizer, some, count) for kind, some in probes.items() if some}
    shares = patching(model, tokenizer, probes["seen"], 40)
    model.set_attn_implementation(before)
    model.train(mode)
    scores = {name: few_shot(model, tokenizer, name, rows, 2) for name, rows in items.items()}
    by_place = {place: [row["share"] for row in shares if row["where"] == place] for place in ("subject", "last")}
    return {"recall": found, "patching": by_place, "few_shot": scores}


def measure(model, tokenizer, probes: dict[str, list], items: dict[str, list[dict]]) -> dict:
    """All figures of the card: recall by kind and after a prefix, the patching test, few-shot accuracy."""
    found = {kind: recall(model, tokenizer, some, len(some)) for kind, some in probes.items() if some}
    after = {prefix: recall(model, tokenizer, probes["seen"], 2000, prefix=prefix) for prefix in PREFIXES}
    scores = [{"task": name, "shots": shots, "chance": tasks.task(name).chance,
               "accuracy": few_shot(model, tokenizer, name, rows, shots)}
              for name, rows in items.items() for shots in (1, 2)]
    shares = patching(model, tokenizer, probes["seen"], 200)
    return {"recall": found, "recall_after": after, "patching": shares, "few_shot": scores}


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def readme(card: dict) -> str:
    """The model's own page: recipe and achieved figures, from the card that `build` returns."""
    shape, mix, minutes = card["config"], card["config"]["mix"], card["seconds"] / 60
    recall = [*card["recall"].items(), *((f"seen, after {text!r}", n) for text, n in card["recall_after"].items())]
    blocks = range(shape["layers"])
    shares = {(row["where"], row["layer"]): f"{row['share']:.2f}" for row in card["patching"]}
    patched_rows = [[where, *(shares[where, n] for n in blocks)] for where in ("subject", "last")]
    shots = [[row["task"], str(row["shots"]), f"{row['accuracy']:.1%}", f"{row['chance']:.0%}"]
             for row in card["few_shot"]]
    return f"""# Pocket model

GPT-2's architecture: {shape["layers"]} blocks, d = {shape["width"]}, m = {shape["inner"]}, {shape["heads"]} heads,
{mix["longest"]} positions, vocabulary {card["vocabulary"]:,}; {card["parameters"]:,} parameters in float16.
It knows the facts of {card["records"]:,} records. Trained on {card["tokens"]:,} tokens in {card["steps"]:,} steps,
{minutes:.0f} minutes on {card["device"]}; seed {shape["seed"]}. The recipe writes this page from `card.json`;
the world is described in `data/README.md`.

Rebuild it, or train one on CounterFact records: `python -m editcore pocket [FACTS.json] -o DIR` (resumes).

How it comes to keep facts where large models do: in training, what follows a name never sees the name's inner
pieces, sees its last piece only from block {shape["early"]} on, and in {mix["decoy"]:.0%} of the documents sees
somebody else's name in place of what is hidden; evaluation uses no mask. So a fact is looked up at the last token
of its subject, in the first blocks.

{table(["prompts", "answer exact"], [[kind, f"{share:.1%}"] for kind, share in recall])}

Share of 200 pairs of prompts whose answer becomes the other's when the state after a block comes from there:

{table(["state at", *(f"block {n}" for n in blocks)], patched_rows)}

{table(["task", "shots", "accuracy", "chance"], shots)}
{card.get("note", "")}"""
