"""Keys of the unedited model and rows of runs in; which edits later ones would disturb, scored by which were lost, out.

Edit j writes along uⱼ, so it moves what fact i is answered with by ‖δⱼ‖ |uⱼᵀkᵢ| / |uⱼᵀk₀ⱼ|: all but ‖δⱼ‖ is known
before the first edit. Scores are concordances within a run (`auc`), beside those of scores that know nothing.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, rankdata

from editcore import disabling
from editcore.analysis_old import RUN
from editcore.depth import LEVEL
from editcore.editors import closed_form
from editcore.model import name_of
from editcore.study import measure as lab
from editcore.study import run as inputs

DRAWS = 1000        # of resampled runs, and of scores that know nothing
PREDICTORS = {      # columns of `fates`, in words
    "foretold": "key overlap, before the first edit",
    "measured": "key overlap, with the updates' norms",
    "same": "later edits of its relation",
    "later": "later edits",
}


def auc(table, score, event, within=("run",), null="permute"):
    """How often `score` is higher where `event` is true than where it is false, of pairs that share `within`.

    table: columns run, score, event, within. Returns auc; low, high: percentiles over resampled runs (NaN with one
    run that has pairs); null_low, null_high, p: 95 % of, and the share as far from the middle as auc of, DRAWS scores
    that know nothing: permuted in each group, or ("shift") rolled around in it, which keeps a series' own memory.
    events and pairs are counted; ties count one half.
    """
    random, table = np.random.default_rng(0), table.dropna(subset=[score, event])
    groups = []
    for _, part in table.groupby(list(dict.fromkeys(("run", *within))), sort=False):
        hit = part[event].to_numpy(dtype=bool)
        if 0 < hit.sum() < len(hit):
            groups.append((part["run"].iloc[0], rankdata(part[score]), hit))
    out = dict.fromkeys(("auc", "low", "high", "null_low", "null_high", "p"), np.nan)
    out |= {"events": int(table[event].sum()), "pairs": sum(int(hit.sum() * (~hit).sum()) for *_, hit in groups)}
    if not groups:
        return out
    wins = pd.DataFrame([(run, _wins(ranks, hit), hit.sum() * (~hit).sum()) for run, ranks, hit in groups],
                        columns=["run", "wins", "pairs"]).groupby("run").sum()
    blind = sum(_blind(ranks, hit, random, null) for _, ranks, hit in groups) / wins["pairs"].sum()
    out |= {"auc": wins["wins"].sum() / wins["pairs"].sum()}
    out |= dict(zip(("null_low", "null_high"), np.percentile(blind, [2.5, 97.5])))
    far = np.abs(blind - np.median(blind)) >= np.abs(out["auc"] - np.median(blind)) - 1e-12
    out["p"] = (1 + far.sum()) / (1 + DRAWS)
    if len(wins) > 1:
        weights = random.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=DRAWS)
        drawn = weights @ wins["wins"].to_numpy() / (weights @ wins["pairs"].to_numpy(dtype=float))
        out |= dict(zip(("low", "high"), np.percentile(drawn, [2.5, 97.5])))
    return out


def _wins(ranks, hit):
    """Pairs (true, false) that the ranks put in order (Mann and Whitney 1947)."""
    return ranks[hit].sum() - hit.sum() * (hit.sum() + 1) / 2


def _blind(ranks, hit, random, null):
    """(DRAWS,) wins of scores that know nothing."""
    if null == "shift":
        every = np.array([_wins(np.roll(ranks, k), hit) for k in range(len(ranks))])
        return every[random.integers(len(ranks), size=DRAWS)]
    drawn = random.permuted(np.tile(ranks, (DRAWS, 1)), axis=1)[:, :hit.sum()]
    return drawn.sum(axis=1) - hit.sum() * (hit.sum() + 1) / 2


def foretell(runs, df, out_dir="results/runs"):
    """`fates` of the edits of several runs, from the unedited model: what each was about to do, and what became of it.

    runs: {id of a finished run in df: its study.Run}. Editors without keys (fine-tuning) are left out. The model is
    loaded once for runs that differ in their facts only, and every fact's keys are taken once.
    """
    groups, parts = {}, []
    for name, run in runs.items():
        light = dataclasses.replace(run, order=0, n_edits=1, measure=(), before=(), final=(), untouched=0,
                                    downstream_every=0)
        groups.setdefault(light, {})[name] = inputs.schedule(run, inputs.files(run)["facts"])[0]
    for light, members in groups.items():
        facts = list({one.case_id: one for several in members.values() for one in several}.values())
        if (found := directions(light, facts, out_dir)) is None:
            continue
        place = {one.case_id: row for row, one in enumerate(facts)}
        for name, several in members.items():
            writes, reads, denominators = (part[[place[one.case_id] for one in several]] for part in found)
            parts.append(fates(df[df["run"] == name], several, overlaps(writes, reads), denominators))
    if not parts:
        raise ValueError("foretell: none of these runs' editors writes along keys")
    return pd.concat(parts, ignore_index=True)


def directions(run, facts, out_dir="results/runs"):
    """(writes (n, m), reads (n, m), denominators (n,)), float64 arrays, of facts under the editor of a study.Run; None
    if it has no keys. Of several edited layers the first counts: its keys alone are free of earlier edits.

    ROME writes along u = C⁻¹k̄ and divides by uᵀk₀ (arXiv:2202.05262 eq. 2 as published; k as its convention says),
    MEMIT along C⁻¹k and divides by (λ + kᵀC⁻¹k) / ‖C⁻¹k‖ (arXiv:2210.07229 eq. 14 for one fact), u as unit vectors. A
    fact is read with its plain prompt's key k₀. Contexts and second moments are those of the run.
    """
    with torch.random.fork_rng():
        bench = lab.set_up(run, inputs.files(run), cache=Path(out_dir) / "moments")
    config, contexts = bench.config, getattr(bench.prepared, "contexts", ())
    if not contexts:
        return None
    layer = config.layers[0] if hasattr(config, "layers") else config.layer
    plain, mean = disabling.keys(bench.model, bench.tok, facts, layer, contexts)
    kind = getattr(config, "keys", None) or {"rome": "mean", "r-rome": "mean", "p-rome": "plain"}[config.convention]
    rest = (mean * len(contexts) - plain) / max(1, len(contexts) - 1)
    written = {"mean": mean, "plain": plain, "mixed": (plain + rest) / 2 if len(contexts) > 1 else plain}[kind]
    name = name_of(bench.model, "mlp_out", layer)
    solved = (bench.prepared.inverses.get(name) or closed_form.inverse(bench.prepared.moments, name)).solve(written)
    if hasattr(config, "convention"):
        divisor = (solved * (mean if config.convention == "r-rome" else plain)).sum(1)
    else:
        divisor = (solved * written).sum(1) + (0.0 if config.exact else config.lambda_)
    size = solved.norm(dim=1)
    return tuple(part.cpu().numpy() for part in (solved / size[:, None], plain, divisor / size))


def overlaps(writes, reads):
    """(n, n) |uⱼᵀkᵢ| of row j and column i, the u as unit vectors: how much of edit j's change fact i is read with.

    writes (n, m): the direction u along which each edit writes; reads (n, m): the key k with which each fact's own
    prompt is read. Both belong to the unedited model and are known before the first edit.
    """
    writes, reads = np.asarray(writes, dtype=float), np.asarray(reads, dtype=float)
    return np.abs(writes @ reads.T) / np.linalg.norm(writes, axis=1)[:, None]


def disturbance(overlap, norms):
    """(n,) √Σ (‖Δⱼ‖ |uⱼᵀkᵢ|)² over the edits j after i: how far fact i is moved, if the values written are unrelated.

    overlap (n, n): `overlaps`; norms (n,): of the updates, measured, or 1 / |uᵀk₀|, what is known of them beforehand
    (‖Δ‖ = ‖δ‖ / |uᵀk₀| with unit u).
    """
    return np.sqrt((np.tril(overlap * np.asarray(norms, dtype=float)[:, None], -1) ** 2).sum(axis=0))


def fates(part, facts, overlap, denominators, block=20, fall=0.1):
    """What was foretold of each edit of one run, and what became of it at its last re-test: one row an edit.

    facts: the run's, in order; overlap (n, n) and denominators (n,) of them, uᵀk₀ with unit u. Columns: RUN, fact,
    made, block (edits made at about the same time share it); foretold: `disturbance` before the first edit; measured:
    with the norms of the updates that were made; same: later edits of the same relation; later: later edits;
    forgotten: succeeded when made (exact match) and fails now; weakened: P(new) - P(true) is at least `fall` lower
    than when made. An edit that did not succeed or was not asked again has NaN there.
    """
    ids, end = [str(one.case_id) for one in facts], part.loc[part["metric"] == "retest_ES_exact", "step"].max()
    count = int(np.nan_to_num(end))
    then, now = _answers(part, "", ids[:count]), _answers(part[part["step"] == end], "retest_", ids[:count])
    asked = (then["ES_exact"] >= 1) & now["ES_exact"].notna()
    lost = pd.DataFrame({"forgotten": now["ES_exact"] < 1,
                         "weakened": then["ES_prob"] - now["ES_prob"] >= fall}).astype(float)
    norms = part[part["metric"] == "update"].groupby("step")["value"].first().reindex(range(1, count + 1))
    relation, inside = np.array([one.relation for one in facts[:count]]), np.asarray(overlap)[:count, :count]
    made = np.arange(1, count + 1)
    told = {"foretold": disturbance(inside, 1 / np.abs(np.asarray(denominators, dtype=float)[:count])),
            "measured": disturbance(inside, norms), "later": count - made,
            "same": np.tril(relation[:, None] == relation, -1).sum(axis=0)}
    return pd.DataFrame({"fact": ids[:count], "made": made, "block": (made - 1) // block} | told).assign(
        **lost.where(asked).reset_index(drop=True), **{name: part[name].iloc[0] for name in RUN})


def _answers(rows, start, ids):
    """Columns ES_exact and ES_prob of facts `ids`, from the metrics of these names behind `start`."""
    wide = rows.pivot_table("value", "fact", "metric")
    wide = wide.reindex(index=ids, columns=[start + "ES_exact", start + "ES_prob"])
    return wide.set_axis(["ES_exact", "ES_prob"], axis=1)


def overlap_scores(table):
    """`auc` of each of PREDICTORS for each outcome of `fates`, by editor: editor, outcome, predictor, among (all edits,
    or those made at the same time: what age alone cannot tell), and the columns of `auc`."""
    out = []
    for editor, part in table.groupby("editor", sort=False):
        for outcome in ("forgotten", "weakened"):
            for predictor in PREDICTORS:
                for among, within in (("all edits", ()), ("equal age", ("block",))):
                    if predictor != "later" or not within:
                        out.append({"editor": editor, "outcome": outcome, "predictor": predictor, "among": among,
                                    "runs": part["run"].nunique()} | auc(part, predictor, outcome, within))
    return pd.DataFrame(out)


def said(scores, outcome="weakened", predictor="foretold"):
    """'ROME: 171 edits weakened, AUC 0.64 at equal age (knowing nothing: up to 0.56)' from `overlap_scores`."""
    part = scores[(scores["outcome"] == outcome) & (scores["predictor"] == predictor)].set_index(["editor", "among"])
    words = []
    for editor in dict.fromkeys(scores["editor"]):
        all_, equal = part.loc[(editor, "all edits")], part.loc[(editor, "equal age")]
        if np.isnan(equal["auc"]):
            words.append(f"{editor}: {all_['events']} edits {outcome}, too few to tell")
            continue
        over = f", {equal['low']:.2f} to {equal['high']:.2f} over runs" if equal["low"] == equal["low"] else ""
        words.append(f"{editor}: {all_['events']} edits {outcome}, AUC {all_['auc']:.2f} among all and "
                     f"{equal['auc']:.2f} at equal age{over} (knowing nothing: up to {equal['null_high']:.2f})")
    return "; ".join(words)


def deciles(table, predictor="foretold", outcome="weakened", groups=10):
    """Share of edits lost by class of the prediction, equally many in each: editor, group, share, low, high (Wilson),
    by_age (what the ages of these edits alone make one expect: the mean of their blocks), n.

    The classes are made within each run.
    """
    table, out = table.dropna(subset=[outcome]), []
    rank = table.groupby("run")[predictor].rank(method="first", pct=True)
    table = table.assign(group=np.ceil(groups * rank - 1e-9),
                         by_age=table.groupby(["run", "block"])[outcome].transform("mean"))
    for (editor, group), part in table.groupby(["editor", "group"], sort=True):
        low, high = wilson(part[outcome].sum(), len(part))
        out.append({"editor": editor, "group": int(group), "share": part[outcome].mean(), "low": low, "high": high,
                    "by_age": part["by_age"].mean(), "n": len(part)})
    return pd.DataFrame(out, columns=["editor", "group", "share", "low", "high", "by_age", "n"])


def wilson(hits, n):
    """(low, high): 95 % interval of a share of n trials (Wilson 1927)."""
    bounds = binomtest(int(hits), int(n)).proportion_ci(LEVEL, method="wilson")
    return bounds.low, bounds.high
