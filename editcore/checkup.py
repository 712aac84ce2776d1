"""A model and its facts in; whether it behaves like a large one where the study looks, out: numbers against demands."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from editcore import metrics
from editcore.editors import EDITORS
from editcore.likelihood import plan, read
from editcore.tokens import encode, target_ids


@dataclass(frozen=True)
class Demand:
    """One thing that the study asks of its model."""

    key: str            # of the measured number
    words: str          # what it is
    bound: float        # at least this; at most this if `most`
    form: str = "{:.1f} %"
    most: bool = False


DEMANDS = (
    Demand("facts", "facts known", 5000, "{:,.0f}"),
    Demand("wordings", "wordings of a fact in the text", 5, "{:.0f}"),
    Demand("seen", "recall, wordings seen with the fact", 98),
    Demand("held-out combination", "recall, wordings seen with other facts only", 90),
    Demand("held-out wording", "recall, wordings never seen", 90),
    Demand("state", "of what noise took, returned by the best early state at the last subject token", 50, "{:.0f} %"),
    Demand("mlp", "of what noise took, returned by the best early MLP output there", 50, "{:.0f} %"),
    Demand("patching", "answers moved by the subject's early state alone", 50, "{:.0f} %"),
    Demand("rome ES", "ROME, single edits: efficacy", 99),
    Demand("rome PS", "ROME, single edits: paraphrases", 90),
    Demand("rome NS", "ROME, single edits: neighbours", 75),
    Demand("memit ES", "MEMIT, single edits: efficacy", 99),
    Demand("memit PS", "MEMIT, single edits: paraphrases", 90),
    Demand("memit NS", "MEMIT, single edits: neighbours", 75),
    Demand("pieces", "subjects of several tokens", 50, "{:.0f} %"),
    Demand("openers", "edits with a one-token subject that opens the prompt", 40, "{:.0f}"),
    Demand("one token", "answers of one token", 50, "{:.0f} %"),
    Demand("more tokens", "answers of several tokens", 1, "{:.0f} %"),
    Demand("tasks", "few-shot tasks, the worst: weighted F1 (33.3 is a constant answer)", 200 / 3, "{:.1f}"),
    Demand("entropy", "generation entropy (GPT2-XL: about 627, arXiv 2202.05262)", 500, "{:.0f}"),
    Demand("sequence", "facts that can be edited in one sequence", 2500, "{:,.0f}"),
    Demand("megabytes", "size of the weights, MB", 20, "{:.1f}", most=True),
)


def verdicts(measured):
    """Table asked, measured, met ('yes', 'no', '-' if not measured) of DEMANDS for {key: number}.

    ValueError names a number that nothing asks for.
    """
    if strange := sorted(set(measured) - {one.key for one in DEMANDS}):
        raise ValueError(f"checkup: nothing asks for {strange[0]!r}")
    rows = []
    for one in DEMANDS:
        value = measured.get(one.key, np.nan)
        met = value <= one.bound if one.most else value >= one.bound
        bound = one.form.format(one.bound).replace(".0", "")
        rows.append({"asked": f"{one.words} {'≤' if one.most else '≥'} {bound}",
                     "measured": "-" if np.isnan(value) else one.form.format(value),
                     "met": "-" if np.isnan(value) else "yes" if met else "no"})
    return pd.DataFrame(rows)


def recall(model, tok, asked):
    """Table kind, prompts, recall (% with the whole answer likeliest) of {kind: [(prompt, answer)]}."""
    rows = []
    for kind, pairs in asked.items():
        prompts = encode(tok, [prompt for prompt, _ in pairs])
        targets = {answer: target_ids(tok, answer) for answer in {answer for _, answer in pairs}}
        found = read(model, plan(model, [(ids, targets[answer]) for ids, (_, answer) in zip(prompts, pairs)], 8192))
        rows.append({"kind": kind, "prompts": len(pairs), "recall": 100 * found.exact.mean()})
    return pd.DataFrame(rows)


def single_edits(model, tok, facts, tries, sources):
    """Rows number, editor, layer, fact, metric (ES, PS, NS …), value of facts edited one by one, each alone.

    tries: (name of an editor, its settings) pairs, numbered from 0; sources: EditorInputs for all of them. The
    layer is the edited one, or the last of several.
    """
    rows = []
    for number, (name, config) in enumerate(tries):
        layer = getattr(config, "layer", None)
        head = {"number": number, "editor": name, "layer": config.layers[-1] if layer is None else layer}
        prepared = EDITORS[name].prepare(model, tok, config, sources)
        for fact, delta in zip(facts, EDITORS[name].edit_each(model, tok, facts, config, prepared)):
            with delta.applied(model):
                rows += [head | row for row in metrics.measure(model, tok, [fact])]
    return pd.DataFrame(rows)


def pieces(tok, facts):
    """{key of DEMANDS: number} about tokens: subjects of several, one-token openers, answers of one and of several."""
    subjects = np.array([len(target_ids(tok, one.subject)) for one in facts])
    opening = np.array([len(encode(tok, [one.subject])[0]) == 1 and one.prompt.startswith("{}") for one in facts])
    answers = np.array([len(target_ids(tok, one.target_true)) for one in facts if one.target_true])
    return {"pieces": 100 * (subjects > 1).mean(), "openers": float(opening.sum()),
            "one token": 100 * (answers == 1).mean(), "more tokens": 100 * (answers > 1).mean()}


def megabytes(folder):
    """Size of a model folder's weight files; NaN where there is none (a model of another place)."""
    files = list(Path(folder).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 1e6 if files else np.nan


def location(trace):
    """{"state", "mlp", "attention"}: % of what the noise took that comes back with the last subject token's best early
    state, MLP or attention output alone, and the layer of that state. trace: the table of `causal.trace`."""
    site = trace[trace["role"] == "last subject token"].set_index(["kind", "layer"])["value"]
    clean, noised, middle = trace["clean"].mean(), trace["noised"].mean(), (trace["layer"].max() + 1) / 2
    early = {kind: site[kind][site[kind].index < middle] for kind in ("state", "mlp", "attention")}
    return {kind: 100 * (part.max() - noised) / (clean - noised) for kind, part in early.items()}, \
        int(early["state"].idxmax())
