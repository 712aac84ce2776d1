"""Facts, a tokenizer and an unedited model in; the edits whose updates will be far too large, named beforehand, out.

ROME's published code writes ΔW = δ uᵀ / (uᵀk₀), so ‖ΔW‖ = ‖δ‖ / |uᵀk₀|: u = C⁻¹k̄ / ‖C⁻¹k̄‖ from the mean key k̄ over the
context templates, k₀ the plain prompt's key. Neither depends on an edit of the same layer, so every future denominator
is known before the first edit. It is small where the plain prompt's key is unlike its own keys in context: where the
subject's last token opens the prompt and has nothing but itself to attend to. `denominators` needs the model, `openers`
only its tokenizer; notebook 21 scores both against what happened.
"""

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from editcore import facts as records
from editcore import templates
from editcore.editors import EDITORS, EditorInputs, configure, rome
from editcore.files import read_json, read_lines, write_json
from editcore.hooks import Stop, capture
from editcore.likelihood import states
from editcore.model import default_device, load, max_length, name_of, resolve
from editcore.progress import bar
from editcore.study import run as inputs
from editcore.tokens import batches, check_lengths, common, pad, with_subject

PORTION = 1024      # facts whose keys are held at a time
OWN = {"rome": "denominator", "r-rome": "denominator_r", "p-rome": "denominator_p"}     # what each editor divides by


def tokenizer(place):
    """The tokenizer of a Hugging Face name or folder; a folder may hold just tokenizer.json, or vocab.json and
    merges.txt (GPT-2's published files). ValueError names the place if there is none."""
    folder = Path(resolve(place))
    try:
        if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file() or not folder.is_dir():
            return AutoTokenizer.from_pretrained(str(folder))
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        raw = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:      # what `tokenizers` raises has no class of its own
        raise ValueError(f"tokenizer {place}: cannot be loaded ({str(error).splitlines()[0]})") from error
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def opening(tok):
    """Position of a text's first own token: how many tokens the tokenizer writes before it (0, or 1 with a BOS).

    Without a BOS the token there attends to itself alone, in the plain prompt only: in the context templates others
    stand before it. With a BOS it attends to that too, which softens the difference; `denominators` shows by how much.
    """
    mask = tok("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return next((place for place, special in enumerate(mask) if not special), 0)


def positions(tok, facts):
    """Position of the last subject token in each fact's plain prompt, a list of int."""
    return [with_subject(tok, one.prompt, one.subject)[1] for one in facts]


def openers(tok, facts, first=None):
    """The facts whose last subject token is at position `first` (None: `opening`) of the plain prompt: the predicted
    disabling edits of a data set, without any model. first=0 asks for the position of a BOS where there is one."""
    first = opening(tok) if first is None else first
    return [one for one, place in zip(facts, positions(tok, facts), strict=True) if place == first]


def denominators(model, tok, facts, config, prepared, first=None):
    """What ROME will divide by, one row a fact, from the unedited model (any edit of config.layer leaves it as it is).

    case_id, subject, prompt, relation; position of the last subject token; opener (it is `first`, as in `openers`);
    denominator uᵀk₀, signed; relative (uᵀk₀) / (uᵀk̄), 1 where both keys agree; denominator_r uᵀk̄, r-ROME's;
    denominator_p, p-ROME's (u from k₀ as well); expected: update in median updates if all ‖δ‖ were equal,
    median |uᵀk₀| / |uᵀk₀|; plain_norm ‖k₀‖, mean_norm ‖k̄‖, cosine of the two. Solved in float64.
    """
    name, first = name_of(model, "mlp_out", config.layer), opening(tok) if first is None else first
    parts = []
    for begin in bar(range(0, len(facts), PORTION), "denominators"):
        plain, mean = keys(model, tok, facts[begin:begin + PORTION], config.layer, prepared.contexts)
        u, own = (torch.nn.functional.normalize(prepared.moments.solve(name, some.T).T) for some in (mean, plain))
        values = {"denominator": (u * plain).sum(1), "denominator_r": (u * mean).sum(1),
                  "denominator_p": (own * plain).sum(1), "plain_norm": plain.norm(dim=1),
                  "mean_norm": mean.norm(dim=1), "cosine": torch.nn.functional.cosine_similarity(plain, mean)}
        parts.append(pd.DataFrame({key: value.cpu().numpy() for key, value in values.items()}))
    places = positions(tok, facts)
    head = pd.DataFrame({"case_id": [str(one.case_id) for one in facts], "subject": [one.subject for one in facts],
                         "prompt": [one.prompt for one in facts], "relation": [one.relation for one in facts],
                         "position": places, "opener": [place == first for place in places]})
    table = pd.concat([head, pd.concat(parts, ignore_index=True)], axis=1)
    size = table["denominator"].abs()
    return table.assign(relative=table["denominator"] / table["denominator_r"], expected=size.median() / size)


def keys(model, tok, facts, layer, contexts):
    """(k₀ (n, m), k̄ (n, m)) in float64: the plain prompt's key and the mean over the templates ("{}" first), at the
    last subject token. Rows end there, the pass stops at the layer, and what a template puts before them runs once.

    ValueError names a record whose prompt in a template is longer than the model takes.
    """
    name, plain, total = name_of(model, "mlp_out", layer), None, 0
    for template in dict.fromkeys(contexts):
        coded = [with_subject(tok, template.replace("{}", one.prompt), one.subject) for one in facts]
        rows = [ids[:lookup + 1] for ids, lookup in coded]
        check_lengths(rows, [f"record {one.case_id}" for one in facts], max_length(model))
        found = _last(model, name, rows).double()
        plain, total = found if plain is None else plain, total + contexts.count(template) * found
    return plain, total / len(contexts)


def _last(model, name, rows):
    """(n, m) inputs of module `name` at the last token of each row."""
    device, out, prefix = next(model.parameters()).device, [None] * len(rows), None
    skip = common(rows, min(map(len, rows)) - 1, least=2)
    if skip:
        prefix = DynamicCache()
        _seen(model, name, torch.tensor([rows[0][:skip]], device=device), prefix)
    for group in batches([len(row) - skip for row in rows], max_tokens=4096):
        ids, mask = pad([rows[i][skip:] for i in group], device=device)
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(len(group))
        found = _seen(model, name, ids, cache)[torch.arange(len(group), device=device), mask.sum(1) - 1]
        for index, key in zip(group, found):
            out[index] = key
    return torch.stack(out)


def _seen(model, name, ids, cache):
    """(B, T, m) what enters module `name` for ids (B, T); the pass stops there. A cache is read and filled."""
    with capture(model, [name], "input") as kept, torch.no_grad(), contextlib.suppress(Stop):
        states(model, ids, cache)
    return kept[name]


def before(run, out_dir="results/runs", limit=0):
    """`denominators` of a study.Run's facts, one a subject, in the run's order (the first `limit` of them; 0: all)."""
    every = records.read_facts(inputs.files(run)["facts"])
    ordered = records.one_per_subject(every) if run.order < 0 else records.order(every, run.order)
    return tabulated(run, ordered[:limit or None], Path(out_dir) / "moments")


def tabulated(run, facts, cache=None):
    """`denominators` of facts by the very contexts and second moments that a study.Run will use; nothing is edited.

    cache: folder that keeps second moments. ValueError if the run's editor is none of ROME's family.
    """
    paths, config = inputs.files(run), configure(run.editor, dict(run.settings), run.model)
    if not isinstance(config, rome.Settings):
        raise ValueError(f"{run.editor} divides by no denominator; choose one of {', '.join(OWN)}")
    model, tok = load(run.model, run.device or default_device(), inputs.dtype_of(run.dtype))
    given = EditorInputs(tuple(read_lines(paths["texts"])) if "texts" in paths else (), paths.get("stats"),
                    templates.read(paths["contexts"]) if "contexts" in paths else (), run.seed,
                    str(cache) if cache else None, tuple(facts))
    return denominators(model, tok, facts, config, EDITORS[run.editor].prepare(model, tok, config, given))


def interleaved(path, chosen, out, every=4, key=0):
    """Write the records of a facts file to `out` so that every `every`-th is one of `chosen` (case ids), each group in
    published order `key`, as long as both last; the rest follows. To be run with order=-1. Returns `out`.

    The file is the same whenever it is written again. ValueError without a chosen record.
    """
    chosen = {str(case_id) for case_id in chosen}
    raw = {str(one.get("case_id", index)): one for index, one in enumerate(read_json(path))}
    ordered = [str(one.case_id) for one in records.order(records.read_facts(path), key)]
    picked, others = [i for i in ordered if i in chosen], [i for i in ordered if i not in chosen]
    if not picked:
        raise ValueError(f"{path}: none of the {len(chosen)} chosen records is in it")
    slots = [(place + 1) * every - 1 for place in range(len(picked))]      # indices of the chosen
    keep = min(len(picked), len(others) // (every - 1)) if every > 1 else len(picked)
    queue, line = iter(picked), iter(others)
    mixed = [next(queue) if place in set(slots[:keep]) else next(line) for place in range(keep * every)]
    write_json(out, [raw[i] | {"case_id": raw[i].get("case_id", int(i) if i.isdigit() else i)}
                     for i in (*mixed, *line, *queue)])
    return out


def besides(planned, names, mixed, n_enriched):
    """Planned runs to set beside a grid of conventions: "<name> without openers", the first case without the facts
    `names` in its first order; "<name>, enriched", every case once on the first n_enriched of the facts file `mixed`.
    """
    cases = {one.name: one for one in reversed(planned)}
    first = planned[0]
    without = replace(first, name=f"{first.name} without openers", run=replace(first.run, leave_out=tuple(names)))
    enriched = [replace(one, name=f"{case}, enriched", run=replace(one.run, facts=str(mixed), order=-1,
                                                                   n_edits=n_enriched))
                for case, one in reversed(cases.items())]
    return [without, *enriched]


def listing(tok, facts, table=None, left_out=0):
    """The text of `python -m editcore disabling`: predicted edits, one a line, and how many of how many they are.

    table: `denominators` of the facts, to give these too and, in the end, the smallest that no opener has.
    """
    chosen = openers(tok, facts)
    size = {} if table is None else table.set_index("case_id")["relative"].to_dict()
    lines = [f"{one.case_id}\t{one.subject}\t{one.text}" +
             (f"\tdenominator {size[str(one.case_id)]:+.4f} of the mean key's" if size else "") for one in chosen]
    lines.append(f"{len(chosen)} of {len(facts)} facts open their prompt with a one-token subject (position "
                 f"{opening(tok)})" + (f"; {left_out} records could not be read" if left_out else ""))
    if table is not None and (~table["opener"]).any():
        rest = table[~table["opener"]]
        least = rest.loc[rest["relative"].abs().idxmin()]
        middle = table.loc[table["opener"], "relative"].abs().median()
        lines.append(f"median denominator of these: {middle:.4f}; smallest of the others: {least['relative']:+.4f} "
                     f"({least['case_id']}, {least['subject']}), their median {rest['relative'].abs().median():.4f}")
    return "\n".join(lines) + "\n"
