"""Name the edits whose updates will be far too large, before the first edit.

ROME's published code writes ΔW = δ uᵀ / (uᵀk₀), so ‖ΔW‖ = ‖δ‖ / |uᵀk₀|, with u = C⁻¹k̄ / ‖C⁻¹k̄‖
from the mean key k̄ over the context templates and k₀ the plain prompt's key. Neither depends on an
edit of the same layer, so every future denominator is known beforehand. It is small where the
subject's last token opens the plain prompt: there it attends to itself alone, in context not.
"""

import contextlib
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import DynamicCache, GPT2Tokenizer

from editcore import facts as records
from editcore.files import read_json, write_json
from editcore.hooks import Stop, capture
from editcore.likelihood import repeated, states
from editcore.model import load_tokenizer, max_length, name_of, resolve
from editcore.progress import bar
from editcore.tokens import batches, check_lengths, common, pad, with_subject

PORTION = 1024      # facts whose keys are held at a time
# What each editor divides by: a column of `denominators`.
DENOMINATOR_OF = {"rome": "denominator", "r-rome": "denominator_r", "p-rome": "denominator_p"}


def tokenizer(name):
    """Load the tokenizer of a hub name or folder, which may hold just vocab.json and merges.txt."""
    folder = Path(resolve(name))
    if not (folder / "merges.txt").is_file() or (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    try:
        return GPT2Tokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokenizer {name}: cannot be loaded ({reason})") from error


def opening(tok):
    """Return the position of a text's first token: 0, or 1 behind a BOS."""
    mask = tok("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return mask.index(0) if 0 in mask else 0


def positions(tok, facts):
    """Return the position of the last subject token in each fact's plain prompt."""
    return [with_subject(tok, fact.prompt, fact.subject)[1] for fact in facts]


def openers(tok, facts, first=None):
    """Return the facts whose last subject token stands at `first`; default: opens the prompt."""
    first = opening(tok) if first is None else first
    return [fact for fact, place in zip(facts, positions(tok, facts)) if place == first]


def denominators(model, tok, facts, config, prepared):
    """Tabulate what ROME will divide by, one row per fact, from the unedited model.

    case_id, subject, prompt, relation; position of the last subject token; opener (see `openers`);
    denominator uᵀk₀, signed; relative (uᵀk₀) / (uᵀk̄); denominator_r uᵀk̄, r-ROME's; denominator_p,
    p-ROME's (u from k₀ as well); expected, the update in median updates if all ‖δ‖ were equal;
    plain_norm ‖k₀‖, mean_norm ‖k̄‖, cosine of the two. Solved in float64.
    """
    name = name_of(model, "mlp_out", config.layer)
    parts = []
    for begin in bar(range(0, len(facts), PORTION), "denominators"):
        portion = facts[begin:begin + PORTION]
        plain, mean = keys(model, tok, portion, config.layer, prepared.contexts)
        u = normalize(prepared.moments.solve(name, mean.T).T)
        u_plain = normalize(prepared.moments.solve(name, plain.T).T)
        values = {"denominator": (u * plain).sum(1), "denominator_r": (u * mean).sum(1),
                  "denominator_p": (u_plain * plain).sum(1), "plain_norm": plain.norm(dim=1),
                  "mean_norm": mean.norm(dim=1), "cosine": cosine_similarity(plain, mean)}
        parts.append(pd.DataFrame({key: value.cpu().numpy() for key, value in values.items()}))
    head = pd.DataFrame({"case_id": [str(fact.case_id) for fact in facts]})
    for column in ("subject", "prompt", "relation"):
        head[column] = [getattr(fact, column) for fact in facts]
    head["position"] = positions(tok, facts)
    head["opener"] = head["position"] == opening(tok)
    table = pd.concat([head, pd.concat(parts, ignore_index=True)], axis=1)
    size = table["denominator"].abs()
    return table.assign(relative=table["denominator"] / table["denominator_r"],
                        expected=size.median() / size)


def keys(model, tok, facts, layer, contexts):
    """Return (k₀ (n, m), k̄ (n, m)) in float64 at the last subject token.

    k₀ is the plain prompt's key, k̄ the mean over the templates ("{}" first). Rows end there, the
    pass stops at the layer, and what a template puts before them runs once.
    """
    name = name_of(model, "mlp_out", layer)
    plain = None
    total = 0
    for template in dict.fromkeys(contexts):
        prompts = [template.replace("{}", fact.prompt) for fact in facts]
        coded = [with_subject(tok, prompt, fact.subject) for prompt, fact in zip(prompts, facts)]
        rows = [ids[:lookup + 1] for ids, lookup in coded]
        check_lengths(rows, [f"record {fact.case_id}" for fact in facts], max_length(model))
        last = _last_inputs(model, name, rows).double()
        plain = last if plain is None else plain
        total = total + contexts.count(template) * last
    return plain, total / len(contexts)


@torch.no_grad()
def _last_inputs(model, name, rows):
    """(n, m) inputs of module `name` at the last token of each row."""
    device = next(model.parameters()).device
    inputs = [None] * len(rows)
    skip = common(rows, min(map(len, rows)) - 1, least=2)
    prefix = DynamicCache() if skip else None

    def run(ids, cache):    # the pass stops at the module; the cache is read and filled
        with capture(model, [name], "input") as captured, contextlib.suppress(Stop):
            states(model, ids, cache)
        return captured[name]

    if skip:
        run(torch.tensor([rows[0][:skip]], device=device), prefix)
    for group in batches([len(row) - skip for row in rows], max_tokens=4096):
        ids, mask = pad([rows[i][skip:] for i in group], device=device)
        keys = run(ids, repeated(prefix, len(group)))
        ends = (torch.arange(len(group), device=device), mask.sum(1) - 1)
        for index, key in zip(group, keys[ends]):
            inputs[index] = key
    return torch.stack(inputs)


def interleaved(path, chosen, out, *, every=4, key=0):
    """Write a facts file in which every `every`-th record is one of `chosen` (case ids).

    Each group is in published order `key`, as long as both last; what is left over follows. To be
    run with order=-1. Returns `out`; ValueError without a chosen record.
    """
    raw = read_json(path)
    facts = records.read_facts(path)
    record_of = {str(fact.case_id): record | {"case_id": fact.case_id}
                 for fact, record in zip(facts, raw)}
    ordered = [str(fact.case_id) for fact in records.order(facts, key)]
    chosen = {str(case_id) for case_id in chosen}
    picked = [case for case in ordered if case in chosen]
    others = [case for case in ordered if case not in chosen]
    if not picked:
        raise ValueError(f"{path}: none of the {len(chosen)} chosen records is in it")
    mixed = []
    while picked and len(others) >= every - 1:
        mixed += [*others[:every - 1], picked.pop(0)]
        others = others[every - 1:]
    write_json(out, [record_of[case] for case in (*mixed, *others, *picked)])
    return out


def listing(tok, facts, table=None, unreadable=0):
    """Return text for a terminal: the predicted edits, one per line, and how many they are.

    table: `denominators` of the facts, to give these too and the smallest that no opener has.
    """
    lines = [f"{fact.case_id}\t{fact.subject}\t{fact.text}" for fact in openers(tok, facts)]
    lost = f"; {unreadable} records could not be read" if unreadable else ""
    count = (f"{len(lines)} of {len(facts)} facts open their prompt with a one-token subject "
             f"(position {opening(tok)}){lost}")
    if table is None:
        return "\n".join([*lines, count])
    sizes = table.loc[table["opener"], "relative"]
    lines = [f"{line}\tdenominator {size:+.4f} of the mean key's"
             for line, size in zip(lines, sizes)]
    lines.append(count)
    others = table[~table["opener"]]
    if len(others):
        least = others.loc[others["relative"].abs().idxmin()]
        lines.append(f"median denominator of these: {sizes.abs().median():.4f}; smallest of the "
                     f"others: {least['relative']:+.4f} ({least['case_id']}, {least['subject']}), "
                     f"their median {others['relative'].abs().median():.4f}")
    return "\n".join(lines)
