"""Measure a model's answers about facts: success, generalisation, locality, fluency, as rows.

    rows = measure(model, tok, facts)                     # once
    probes = prepare(model, tok, facts)                   # or: tokenise once ...
    with delta.applied(model):
        rows = evaluate(model, probes)                    # ... and measure after every edit
        rows = evaluate(model, probes.select([0, 1, 2]))  # or some of the facts
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from editcore import generate
from editcore.likelihood import plan, read
from editcore.model import max_length
from editcore.tokens import check_lengths, encode, encode_pairs, separator, text_start

DEFAULT = ("ES", "PS", "NS")        # rewriting, paraphrase and neighbourhood prompts
WRITABLE = (*DEFAULT, "XS")         # kinds of prompts that `greedy` can answer
KNOWN = (*WRITABLE, "PO", "greedy")
SPARE = 2                           # tokens that `greedy` lets the model write beyond the answer


@dataclass(frozen=True)
class Question:
    """One prompt with the continuations that count as right and the rival one.

    Pairs (prompt ids, continuation ids), as `tokens.encode_pairs` cuts them.
    """

    kind: str           # "ES", "PS", "XS", "NS" or "PO"
    right: tuple        # of pairs: one, or all accepted answers of a portability question
    rival: tuple        # of pairs: one, or none

    @property
    def pairs(self):
        """The pair of every right answer, then of the rival."""
        return (*self.right, *self.rival)


@dataclass(frozen=True)
class Probes:
    """The questions about some facts."""

    model: torch.nn.Module      # for whose length and vocabulary the passes are planned
    cases: tuple                # case_id of every fact
    questions: tuple            # a tuple of Questions for every fact
    max_tokens: int             # per forward pass

    @cached_property
    def plan(self):
        """The forward passes that answer the questions."""
        pairs = [pair for questions in self.questions for question in questions
                 for pair in question.pairs]
        return plan(self.model, pairs, self.max_tokens)

    def select(self, indices):
        """The Probes of some of the facts, by index; nothing is tokenised again."""
        cases = tuple(self.cases[i] for i in indices)
        return replace(self, cases=cases, questions=tuple(self.questions[i] for i in indices))


def measure(model, tok, facts, names=DEFAULT, *, prefixes=()):
    """Measure a model's answers about facts; rows {"fact": case_id, "metric", "value"}.

    names: some of "ES" (rewriting prompt), "PS" (paraphrases), "XS" (rewriting prompt behind each
    of `prefixes`, see `passages`), "NS" (neighbours), "PO" (portability), "greedy". With nll(o|p) =
    mean over the target's tokens of -log P, averaged over the fact's prompts of a kind (arXiv
    2202.05262):

      ES, PS, XS nll(new) < nll(true), 0 or 1; a tie fails; NS: nll(true) < nll(new)
      *_prob     exp(-nll(new)) - exp(-nll(true)); reversed for NS
      *_token    share of the right target's tokens that are the argmax, teacher-forced
      *_exact    all of them are; PO takes the best of a question's accepted answers
      *_greedy   with "greedy": see `greedy`

    The right target is the new one, for NS the true one. Without target_true there are no
    comparisons and no NS, without prompts no rows. Logits that are not finite fail.
    """
    rows = evaluate(model, prepare(model, tok, facts, names, prefixes=prefixes))
    if "greedy" in names:
        rows += greedy(model, tok, facts, names, prefixes=prefixes)
    return rows


def check_names(names):
    """ValueError for a metric that is unknown, or that answers prompts of which there are none."""
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"metric {unknown[0]!r}: choose some of {', '.join(KNOWN)}")
    if "greedy" in names and not set(names) & set(WRITABLE):
        raise ValueError("metric 'greedy' writes answers to the prompts of others: give it with "
                         f"some of {', '.join(WRITABLE)}")


def lacking(rows, names):
    """Return those of `names` of which rows of `measure` have nothing."""
    kinds = {part for row in rows for part in row["metric"].split("_")}
    return [name for name in names if name not in kinds]


def prepare(model, tok, facts, names=DEFAULT, *, prefixes=(), max_tokens=2048):
    """Tokenise the questions about facts into Probes, valid as long as model and tokenizer are."""
    check_names(names)
    if "XS" in names and not prefixes:
        raise ValueError("metric 'XS' needs prefixes: texts to put before the rewriting prompt, "
                         "such as `passages`")
    kinds = [kind for kind in (*WRITABLE, "PO") if kind in names]
    texts = [[(kind, *prompt) for kind in kinds for prompt in _prompts(fact, kind, prefixes)]
             for fact in facts]
    pairs = {}      # and the record of each
    for fact, rows in zip(facts, texts):
        for _, prompt, right, rival in rows:
            pairs |= {(prompt, target): f"record {fact.case_id}" for target in right + rival}
    coded = dict(zip(pairs, encode_pairs(tok, list(pairs), list(pairs.values()))))
    coded = {pair: tuple(map(tuple, ids)) for pair, ids in coded.items()}
    questions = []
    for fact, rows in zip(facts, texts):
        asked = tuple(Question(kind, tuple(coded[prompt, text] for text in right),
                               tuple(coded[prompt, text] for text in rival))
                      for kind, prompt, right, rival in rows)
        ids = [prompt + target[:-1] for question in asked for prompt, target in question.pairs]
        if "greedy" in names:
            ids += [sum(question.right[0], (0,) * SPARE) for question in asked
                    if question.kind != "PO"]
        check_lengths(ids, [f"record {fact.case_id}"] * len(ids), max_length(model))
        questions.append(asked)
    cases = tuple(fact.case_id for fact in facts)
    return Probes(model, cases, tuple(questions), max_tokens)


def passages(model, tok, facts, seed, *, number=3, n_tokens=24):
    """Sample up to `number` short texts as prefixes for "XS", from the unedited model.

    They are cut at the end of a document and after the last whole sentence; those that name the
    fewest subjects of `facts` are taken. ValueError if the model writes nothing.
    """
    n_new = min(n_tokens, max_length(model) // 4)
    generator = torch.Generator().manual_seed(seed)
    starts = [text_start(tok)] * (8 * number)
    texts = generate.texts(model, tok, starts, n_new, top_k=5, generator=generator)
    if tok.eos_token:
        texts = [text.split(tok.eos_token)[0] for text in texts]
    texts = [" ".join(text.split()) for text in texts]
    whole = [re.match(r".*[.!?](?= |$)", text) for text in texts]
    texts = dict.fromkeys(match.group() if match else text + "."
                          for match, text in zip(whole, texts) if text)
    if not texts:
        raise ValueError("passages: the model ends every text at once; give your own prefixes")
    named = {text: sum(fact.subject in text for fact in facts) for text in texts}
    return tuple(sorted(texts, key=named.get)[:number])


def _prompts(fact, kind, prefixes=()):
    """(prompt, right answers, (rival,) or ()) of every prompt of one kind."""
    new = (fact.target_new,)
    true = (fact.target_true,) if fact.target_true else ()
    if kind == "PO":
        return [(text, tuple(answers), ()) for _, text, answers in fact.portability]
    if kind == "NS":
        return [(text, true, new) for text in fact.neighbours] if true else []
    texts = {"ES": (fact.text,), "PS": fact.paraphrases,
             "XS": tuple(f"{text} {fact.text}" for text in prefixes)}
    return [(text, new, true) for text in texts[kind]]


def evaluate(model, probes):
    """Ask prepared questions of the model as it is now: the rows of `measure` but *_greedy."""
    flat = [question for questions in probes.questions for question in questions]
    if not flat:
        return []
    scores = read(model, probes.plan)
    n_pairs = [len(question.pairs) for question in flat]
    first = np.cumsum([0, *n_pairs[:-1]])       # first pair of each question
    rivals = np.array([bool(question.rival) for question in flat])
    right = scores.nll[first]                   # comparisons have one right answer
    rival = np.where(rivals, scores.nll[np.minimum(first + 1, len(scores.sizes) - 1)], np.nan)
    # A rival's accuracy must not count among the accepted answers'.
    accepted = np.concatenate([[True] * len(question.right) + [False] * bool(question.rival)
                               for question in flat])
    values = {"": (right < rival).astype(float), "_prob": np.exp(-right) - np.exp(-rival),
              "_token": np.maximum.reduceat(np.where(accepted, scores.token, 0.0), first),
              "_exact": np.maximum.reduceat(np.where(accepted, scores.exact, 0.0), first)}
    groups = [(case, question.kind, bool(question.rival))
              for case, questions in enumerate(probes.questions) for question in questions]
    return _mean_rows(probes.cases, groups, values)


def _mean_rows(cases, groups, values):
    """Rows of each value's mean over consecutive equal groups (fact's index, kind, compared)."""
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    counts = np.diff([*starts, len(groups)])
    means = {name: np.add.reduceat(value, starts) / counts for name, value in values.items()}
    rows = []
    for index, start in enumerate(starts):
        fact, kind, compared = groups[start]
        rows += [{"fact": cases[fact], "metric": kind + name, "value": float(mean[index])}
                 for name, mean in means.items() if compared or name in ("_token", "_exact")]
    return rows


def means(rows):
    """Average rows over facts: {metric: mean value}."""
    values = {}
    for row in rows:
        values.setdefault(row["metric"], []).append(row["value"])
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def score(rows):
    """Return S, the harmonic mean of the means of ES, PS and NS, 0 to 1 (arXiv 2202.05262, 3.4)."""
    mean = means(rows)
    if missing := [name for name in DEFAULT if name not in mean]:
        raise ValueError(f"score: no rows of {', '.join(missing)}")
    three = [mean[name] for name in DEFAULT]
    return 0.0 if min(three) == 0 else len(three) / sum(1 / value for value in three)


def probabilities(model, tok, fact):
    """Rows {"kind", "prompt", "target": "new" or "true", "value": exp(-nll)} of one fact."""
    targets = {"new": fact.target_new, "true": fact.target_true}
    rows = [{"kind": kind, "prompt": prompt, "target": name} for kind in DEFAULT
            for prompt, _, _ in _prompts(fact, kind) for name in targets if targets[name]]
    pairs = encode_pairs(tok, [(row["prompt"], targets[row["target"]]) for row in rows])
    values = np.exp(-read(model, plan(model, pairs)).nll)
    return [row | {"value": float(value)} for row, value in zip(rows, values)]


def greedy(model, tok, facts, names=DEFAULT, *, prefixes=()):
    """Let the model write answers: rows "ES_greedy", "PS_greedy", ... of the kinds in `names`.

    The value is the share of prompts answered exactly by greedy decoding, without the answer's
    tokens to lean on (cf. arXiv 2502.11177): the text is the answer and then stops, see `answers`.
    """
    kinds = [kind for kind in WRITABLE if kind in names]
    asked = [(index, kind, prompt, right[0]) for index, fact in enumerate(facts) for kind in kinds
             for prompt, right, _ in _prompts(fact, kind, prefixes)]
    pairs = encode_pairs(tok, [(prompt, answer) for _, _, prompt, answer in asked])
    labels = [f"record {facts[index].case_id}" for index, _, _, _ in asked]
    check_lengths([ids + target + [0] * SPARE for ids, target in pairs], labels, max_length(model))
    room = {}
    for (_, _, _, answer), (_, target) in zip(asked, pairs):
        room[answer] = max(room.get(answer, 0), len(target) + SPARE)
    written = {}
    for n_new in sorted(set(room.values())):
        prompts = list(dict.fromkeys(prompt for _, _, prompt, answer in asked
                                     if room[answer] == n_new))
        texts = generate.texts(model, tok, prompts, n_new)
        written |= {(prompt, n_new): text for prompt, text in zip(prompts, texts)}
    right = {}
    for index, kind, prompt, answer in asked:
        text = written[prompt, room[answer]]
        right.setdefault((index, kind), []).append(answers(text, answer, tok.eos_token))
    return [{"fact": facts[index].case_id, "metric": f"{kind}_greedy",
             "value": float(np.mean(hits))} for (index, kind), hits in right.items()]


def answers(text, answer, end=None):
    """Say if a text is `answer` (in any composition) and a stop: line break, punctuation, `end`."""
    text = unicodedata.normalize("NFKC", text.lstrip())
    answer = unicodedata.normalize("NFKC", answer)
    after = text[len(answer):]
    stops = re.match(r"[.,;:!?。、\n]", after) or (end and after.startswith(end))
    return text.startswith(answer) and bool(stops)


def generation(model, tok, facts, seed, *, n_tokens=100, top_k=5):
    """Return rows "GE": mean entropy of texts sampled after each fact's generation stubs.

    Stub and continuation are n_tokens together (fewer if the model's length is), drawn from the
    top_k most likely; the whole text counts, as published (arXiv 2202.05262). The draws depend on
    the seed and on the facts measured together.
    """
    asked = [(index, stub) for index, fact in enumerate(facts) for stub in fact.generation]
    rows = encode(tok, [stub for _, stub in asked])
    total = min(n_tokens, max_length(model))
    labels = [f"record {facts[index].case_id}" for index, _ in asked]
    check_lengths([[*row, 0] for row in rows], labels, total)
    generator = torch.Generator().manual_seed(seed)
    entropies = {}
    for length in sorted({len(row) for row in rows}):
        group = [pair for pair, row in zip(asked, rows) if len(row) == length]
        stubs = [stub for _, stub in group]
        texts = generate.texts(model, tok, stubs, total - length, top_k=top_k, generator=generator,
                               whole=True)
        for (index, _), text in zip(group, texts):
            entropies.setdefault(index, []).append(entropy([text]))
    return [{"fact": facts[index].case_id, "metric": "GE", "value": float(np.mean(values))}
            for index, values in sorted(entropies.items())]


def entropy(texts):
    """Return mean 100 (H2 / 3 + 2 H3 / 3) of texts; Hk: bits of word k-grams (arXiv 1809.05972)."""
    return 100 * float(np.mean([_bits(text, 2) / 3 + 2 * _bits(text, 3) / 3 for text in texts]))


def _bits(text, k):
    words = re.findall(r"\w+|[^\w\s]", text)
    counts = Counter(zip(*(words[i:] for i in range(k))))
    shares = np.array(list(counts.values()), dtype=float) / max(counts.total(), 1)
    return float(-(shares * np.log2(shares)).sum())


def perplexity(model, tok, texts, *, length=512, max_tokens=2048):
    """Return exp(-1/N sum log P(token | those before it in its block)) over texts.

    The texts are joined (each ended by the `separator` of documents; where a BOS begins each, by
    the EOS) and cut into blocks of `length` tokens or the model's limit.
    """
    end = separator(tok) if text_start(tok) else tok.eos_token     # "" where a BOS comes by itself
    ends = [tok.convert_tokens_to_ids(end)] if end else []
    ids = [token for row in encode(tok, texts) for token in row + ends]
    length = min(length, max_length(model))
    blocks = [ids[i:i + length] for i in range(0, len(ids), length)]
    pairs = [(block[:1], block[1:]) for block in blocks if len(block) > 1]
    if not pairs:
        raise ValueError(f"perplexity: {len(texts)} texts hold {len(ids)} tokens, at least two are "
                         "needed")
    return float(np.exp(-read(model, plan(model, pairs, max_tokens)).logp.mean()))
