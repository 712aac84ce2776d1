"""A model and facts in; tidy rows out: success, generalisation, locality, their magnitudes, accuracies, fluency.

    rows = measure(model, tok, facts)                     # once
    probes = prepare(model, tok, facts)                   # or: tokenise and batch once ...
    with delta.applied(model):
        rows = evaluate(model, probes)                    # ... and measure after every edit
        rows = evaluate(model, probes.select([0, 1, 2]))  # or some of the facts
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from editcore import generate
from editcore import templates as contexts
from editcore.likelihood import ScoringPlan, plan, read
from editcore.model import max_length
from editcore.tokens import check_lengths, encode, target_ids

ASKED = ("ES", "PS", "NS")      # what `measure` answers unless told: rewriting, paraphrase, neighbourhood prompts
WRITTEN = (*ASKED, "XS")        # what `greedy` can answer
KNOWN = (*WRITTEN, "PO", "greedy")
SPARE = 2                       # tokens that `greedy` lets the model write beyond the answer


@dataclass(frozen=True)
class Question:
    """One prompt, the continuations that count as right and the rival one, as token ids."""

    kind: str           # "ES", "PS", "XS", "NS" or "PO"
    prompt: tuple
    right: tuple        # of id tuples: one, or the accepted answers of a portability question
    rival: tuple        # id tuple, () if the fact has no target_true

    @property
    def pairs(self):
        """(prompt, continuation) of every right answer, then of the rival."""
        return [(self.prompt, target) for target in (*self.right, *([self.rival] if self.rival else []))]


@dataclass(frozen=True)
class Probes:
    """The questions about some facts and the forward passes that answer them."""

    cases: tuple                # case_id of every fact
    questions: tuple            # a tuple of Questions for every fact
    plan: ScoringPlan
    replan: object = field(repr=False, compare=False)   # pairs -> ScoringPlan, for `select`

    def select(self, indices):
        """The Probes of some of the facts, by index; nothing is tokenised again."""
        questions = tuple(self.questions[i] for i in indices)
        return replace(self, cases=tuple(self.cases[i] for i in indices), questions=questions,
                       plan=self.replan(_pairs(questions)))


def measure(model, tok, facts, what=ASKED, max_tokens=2048, prefixes=()):
    """Rows {"fact": case_id, "metric": name, "value": float} of the model's answers about `facts`.

    what: some of "ES" (rewriting prompt), "PS" (paraphrases), "XS" (rewriting prompt behind each of `prefixes`, see
    `passages`), "NS" (neighbours), "PO" (portability), "greedy". With nll(o|p) = mean over the target's tokens of
    -log P, each averaged over the fact's prompts of that kind (arXiv 2202.05262, section 3.4; arXiv 2401.07453):
      ES, PS, XS nll(new) < nll(true), 0 or 1; a tie fails; NS: nll(true) < nll(new)
      *_prob     exp(-nll(new)) - exp(-nll(true)); reversed for NS
      *_token    share of the right target's tokens that are the argmax, teacher-forced; right is new, true for NS
      *_exact    all of them are; PO_token and PO_exact take the best of a question's accepted answers
      *_greedy   with "greedy": see `greedy`
    A fact without target_true gets no ES, PS, XS, *_prob and no NS rows, one without such prompts no rows of that
    kind. Non-finite logits fail every comparison. ValueError names a metric that is unknown or a record whose prompt
    is longer than the model, before any work.
    """
    rows = evaluate(model, prepare(model, tok, facts, what, max_tokens, prefixes))
    return rows + (greedy(model, tok, facts, what, prefixes) if "greedy" in what else [])


def prepare(model, tok, facts, what=ASKED, max_tokens=2048, prefixes=()):
    """The Probes of facts: tokenised, rows shared, batched by length. Valid as long as model and tokenizer are.

    With "greedy" in `what` there must be room for what `greedy` writes, too.
    """
    if unknown := [name for name in what if name not in KNOWN]:
        raise ValueError(f"metric {unknown[0]!r}: choose some of {', '.join(KNOWN)}")
    if "XS" in what and not prefixes:
        raise ValueError("metric 'XS' needs prefixes: texts to put before the rewriting prompt, such as `passages`")
    asked = [[(kind, *one) for kind in (*WRITTEN, "PO") if kind in what for one in _prompts(fact, kind, prefixes)]
             for fact in facts]
    prompts = {text: None for several in asked for _, text, _, _ in several}
    prompts = dict(zip(prompts, map(tuple, encode(tok, list(prompts)))))
    targets = {text: None for several in asked for _, _, right, rival in several for text in (*right, *rival)}
    targets = {text: tuple(target_ids(tok, text)) for text in targets}
    questions = tuple(tuple(Question(kind, prompts[text], tuple(targets[r] for r in right),
                                     targets[rival[0]] if rival else ()) for kind, text, right, rival in several)
                      for several in asked)
    for fact, several in zip(facts, questions):
        rows = [prompt + target[:-1] for one in several for prompt, target in one.pairs]
        rows += [one.prompt + one.right[0] + (0,) * SPARE for one in several if "greedy" in what and one.kind != "PO"]
        check_lengths(rows, [f"record {fact.case_id}"] * len(rows), max_length(model))

    def replan(pairs):
        return plan(model, pairs, max_tokens)

    return Probes(tuple(fact.case_id for fact in facts), questions, replan(_pairs(questions)), replan)


def passages(model, tok, facts, seed, number=3, n_tokens=24):
    """Prefixes for "XS": up to `number` short texts that the unedited model writes, from its own start of a text.

    Sampled (top-k 5, a quarter of the model's length at most), cut at the end of a document and after the last whole
    sentence, each once; those that name the fewest subjects of `facts` are taken. The same for every method, as they
    depend on model, facts and seed only. ValueError if the model writes nothing.
    """
    n_new, generator = min(n_tokens, max_length(model) // 4), torch.Generator().manual_seed(seed)
    made = generate.texts(model, tok, [contexts.text_start(tok)] * (8 * number), n_new, 5, generator)
    texts = [" ".join((text.split(tok.eos_token)[0] if tok.eos_token else text).split()) for text in made]
    whole = [re.match(r".*[.!?](?= |$)", text) for text in texts]
    texts = dict.fromkeys(match.group() if match else text + "." for match, text in zip(whole, texts) if text)
    if not texts:
        raise ValueError("passages: the model ends every text at once; give prefixes of your own")
    return tuple(sorted(texts, key=lambda text: sum(fact.subject in text for fact in facts))[:number])


def _prompts(fact, kind, prefixes=()):
    """(prompt, right answers, (rival,) or ()) of every prompt of one kind."""
    new, true = (fact.target_new,), (fact.target_true,) if fact.target_true else ()
    if kind == "PO":
        return [(text, answers, ()) for _, text, answers in fact.portability]
    if kind == "NS":
        return [(text, true, new) for text in fact.neighbours] if true else []
    texts = {"ES": (fact.text,), "PS": fact.paraphrases, "XS": tuple(f"{text} {fact.text}" for text in prefixes)}
    return [(text, new, true) for text in texts[kind]]


def _pairs(questions):
    return [pair for several in questions for one in several for pair in one.pairs]


def evaluate(model, probes):
    """The rows of `measure` (all but *_greedy) for prepared questions and the model's present weights."""
    flat = [one for several in probes.questions for one in several]
    if not flat:
        return []
    found = read(model, probes.plan)
    first = np.concatenate([[0], np.cumsum([len(one.pairs) for one in flat])[:-1]])  # first pair of each question
    rivals = np.array([bool(one.rival) for one in flat])
    right = found.nll[first]                                            # comparisons have one right answer
    rival = np.where(rivals, found.nll[np.minimum(first + 1, len(found.sizes) - 1)], np.nan)
    # a rival's accuracy must not count among the accepted answers'
    own = np.concatenate([[True] * len(one.right) + [False] * bool(one.rival) for one in flat])
    values = {"": (right < rival).astype(float), "_prob": np.exp(-right) - np.exp(-rival),
              "_token": np.maximum.reduceat(np.where(own, found.token, 0.0), first),
              "_exact": np.maximum.reduceat(np.where(own, found.exact, 0.0), first)}
    groups = [(i, one.kind, bool(one.rival)) for i, several in enumerate(probes.questions) for one in several]
    return _rows(probes.cases, groups, values)


def _rows(cases, groups, values):
    """Rows of the mean of every value over consecutive equal groups (fact, kind, compared)."""
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    counts = np.diff([*starts, len(groups)])
    means = {name: np.add.reduceat(value, starts) / counts for name, value in values.items()}
    return [{"fact": cases[groups[start][0]], "metric": groups[start][1] + name, "value": float(mean[g])}
            for g, start in enumerate(starts) for name, mean in means.items()
            if groups[start][2] or name in ("_token", "_exact")]


def means(rows):
    """{metric: mean of its rows' values}: prompts are averaged within a fact already, here the facts are."""
    values = {}
    for row in rows:
        values.setdefault(row["metric"], []).append(row["value"])
    return {name: float(np.mean(several)) for name, several in values.items()}


def probabilities(model, tok, fact):
    """Rows {"kind": "ES", "PS" or "NS", "prompt", "target": "new" or "true", "value": exp(-nll)} of one fact."""
    asked = [(kind, text, name, target) for kind in ASKED for text, _, _ in _prompts(fact, kind)
             for name, target in (("new", fact.target_new), ("true", fact.target_true)) if target]
    prompts = encode(tok, [text for _, text, _, _ in asked])
    pairs = [(tuple(prompt), tuple(target_ids(tok, one[3]))) for prompt, one in zip(prompts, asked)]
    return [{"kind": kind, "prompt": text, "target": name, "value": float(np.exp(-nll))}
            for (kind, text, name, _), nll in zip(asked, read(model, plan(model, pairs)).nll)]


def score(rows):
    """S = 3 / (1/ES + 1/PS + 1/NS), the harmonic mean of the three means over facts (arXiv 2202.05262, section 3.4).

    Between 0 and 1 like the rows; 0 if one of the three is. ValueError if one is missing.
    """
    mean = means(rows)
    if missing := [name for name in ASKED if name not in mean]:
        raise ValueError(f"score: no rows of {', '.join(missing)}")
    three = [mean[name] for name in ASKED]
    return 0.0 if min(three) == 0 else len(three) / sum(1 / value for value in three)


def greedy(model, tok, facts, what=ASKED, prefixes=()):
    """Rows "ES_greedy", "PS_greedy", …, for those of ES, PS, NS and XS in `what`: the share of prompts that the model,
    left alone, answers exactly.

    Greedy decoding without the answer's tokens to lean on, SPARE tokens longer than the answer; right if the text
    is the answer followed by a natural stop (see `answers`). Cf. arXiv 2502.11177 on how teacher forcing flatters.
    """
    asked = [(i, kind, text, right[0], len(target_ids(tok, right[0])) + SPARE) for i, fact in enumerate(facts)
             for kind in WRITTEN if kind in what for text, right, _ in _prompts(fact, kind, prefixes)]
    rows = encode(tok, [text for _, _, text, _, _ in asked])
    check_lengths([row + [0] * one[-1] for row, one in zip(rows, asked)],
                  [f"record {facts[one[0]].case_id}" for one in asked], max_length(model))
    made = {}
    for n_new in sorted({one[-1] for one in asked}):
        prompts = list(dict.fromkeys(text for _, _, text, _, n in asked if n == n_new))
        made |= {(text, n_new): out for text, out in zip(prompts, generate.texts(model, tok, prompts, n_new))}
    right = {}
    for i, kind, text, answer, n_new in asked:
        right.setdefault((i, kind), []).append(answers(made[text, n_new], answer, tok.eos_token))
    return [{"fact": facts[i].case_id, "metric": f"{kind}_greedy", "value": float(np.mean(several))}
            for (i, kind), several in right.items()]


def answers(text, answer, end=None):
    """True if a generated text is `answer` and then stops: end of text, a line break or punctuation comes next."""
    text = text.lstrip()
    rest = text[len(answer):]
    return text.startswith(answer) and bool(re.match(r"[.,;:!?\n]", rest) or (end and rest.startswith(end)))


def generation(model, tok, facts, seed, n_tokens=100, top_k=5):
    """Rows "GE": generation entropy of texts sampled after each fact's generation stubs, averaged over the stubs.

    Stub and continuation are n_tokens together (fewer if the model's length is), drawn from the top_k most likely;
    the entropy is that of the whole text, as published (arXiv 2202.05262). A fact without stubs gets no row. The
    draws depend on the seed and on the facts measured together.
    """
    asked = [(i, stub) for i, fact in enumerate(facts) for stub in fact.generation]
    rows, total = encode(tok, [stub for _, stub in asked]), min(n_tokens, max_length(model))
    check_lengths([[*row, 0] for row in rows], [f"record {facts[i].case_id}" for i, _ in asked], total)
    generator, found = torch.Generator().manual_seed(seed), {}
    for length in sorted({len(row) for row in rows}):
        group = [one for one, row in zip(asked, rows) if len(row) == length]
        made = generate.texts(model, tok, [stub for _, stub in group], total - length, top_k, generator)
        for (i, stub), text in zip(group, made):
            found.setdefault(i, []).append(entropy([stub + text]))
    return [{"fact": facts[i].case_id, "metric": "GE", "value": float(np.mean(found[i]))} for i in sorted(found)]


def entropy(texts):
    """100 (H2 / 3 + 2 H3 / 3), mean over texts; Hk the entropy in bits of a text's word k-grams (arXiv 1809.05972).

    Low where a model repeats itself. Words are runs of letters and digits, and single other signs. 0 without words.
    """
    return 100 * float(np.mean([_bits(text, 2) / 3 + 2 * _bits(text, 3) / 3 for text in texts]))


def _bits(text, k):
    words = re.findall(r"\w+|[^\w\s]", text)
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(k)))).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def perplexity(model, tok, texts, length=512, max_tokens=2048):
    """exp(-1/N sum log P(token | those before it in its block)) over texts, packed; a float >= 1.

    The texts are joined (end-of-text token between them, if the tokenizer has one) and cut into blocks of `length`
    tokens or the model's limit; a block's first token is not predicted. ValueError if there are under two tokens.
    """
    end = [] if tok.eos_token_id is None else [tok.eos_token_id]
    ids = [token for row in encode(tok, texts) for token in row + end]
    length = min(length, max_length(model))
    blocks = [ids[i:i + length] for i in range(0, len(ids), length)]
    pairs = [(block[:1], block[1:]) for block in blocks if len(block) > 1]
    if not pairs:
        raise ValueError(f"perplexity: {len(texts)} texts hold {len(ids)} tokens, at least two are needed")
    return float(np.exp(-read(model, plan(model, pairs, max_tokens)).logp.mean()))
