"""Figures of merit in; the paper's shapes (arXiv 2401.07453), each tested by a stated rule, and words for them, out."""

from dataclasses import dataclass

import pandas as pd

from editcore.merits import PART, TRIGGER, collapse, share


@dataclass(frozen=True)
class Claim:
    """One shape that the paper shows, and how it is tested here."""

    figure: str     # the figure that shows it
    says: str       # the paper's finding, in words and its own numbers
    test: str       # what must hold here
    holds: object   # merits by editor -> bool, or None where the runs cannot tell
    shows: object   # merits by editor -> the numbers behind it, a text
    needs: tuple    # editors that the claim is about


CLAIMS = (
    Claim("proficiency", "ROME: new edits succeed throughout the gradual phase (ES 100 to about 640 edits)",
          "mean ES ≥ 95 before the collapse",
          lambda m: m.ES["rome"] >= 95,
          lambda m: f"ES {m.ES['rome']:.1f}", ("rome",)),
    Claim("proficiency", "ROME: locality erodes before anything breaks (NS 76 at 20 edits, 66 at 500)",
          "NS ≥ 5 points lower in the last fifth of the gradual phase than in its first",
          lambda m: m.NS_fall["rome"] >= 5,
          lambda m: f"NS changes by {-m.NS_fall['rome']:+.1f} points", ("rome",)),
    Claim("forgetting", "ROME: at first earlier edits are forgotten slowly (6.8 % at 500 edits)",
          "1 to 15 % ever failed at the first test with 500 edits or more",
          lambda m: 1 <= m.absorbing_500["rome"] <= 15,
          lambda m: f"{m.absorbing_500['rome']:.1f} %", ("rome",)),
    Claim("forgetting", "ROME: then nearly all at once (8 % at 559 edits, 78.6 % at 560)",
          "a catastrophic phase begins, with ≤ 30 % of earlier edits ever failed just before",
          lambda m: m.collapsed["rome"] == 1 and m.absorbing_before["rome"] <= 30,
          lambda m: collapse(m, "rome"), ("rome",)),
    Claim("distance", "ROME: one disabling edit starts the collapse",
          f"one update ≥ {TRIGGER:g} × the median update and ≥ {PART:.0%} of that interval's growth in distance",
          lambda m: m.disabling["rome"] == "yes" if m.collapsed["rome"] else None,
          lambda m: f"{m.disabling['rome'] or 'no collapse'}; largest update {m.largest['rome']:.1f} × the median",
          ("rome",)),
    Claim("forgetting", "MEMIT: at first earlier edits are forgotten slowly (4.7 % at 500 edits)",
          "1 to 15 % ever failed at the first test with 500 edits or more",
          lambda m: 1 <= m.absorbing_500["memit"] <= 15,
          lambda m: f"{m.absorbing_500['memit']:.1f} %", ("memit",)),
    Claim("forgetting", "MEMIT: a catastrophic phase follows, without a single trigger",
          "a catastrophic phase begins and no edit is disabling",
          lambda m: (m.collapsed["memit"] == 1 and m.disabling["memit"] == "no"
                     if m.collapsed["memit"] or m.edits["memit"] >= 1300 else None),     # the paper's broke by then
          lambda m: collapse(m, "memit"), ("memit",)),
    Claim("forgetting", "MEMIT lasts longer than ROME (about 1,200 edits against 559)",
          "ROME collapses, and MEMIT later or not at all",
          lambda m: m.duration["memit"] > m.duration["rome"] if m.collapsed[["rome", "memit"]].sum() else None,
          lambda m: f"MEMIT: {collapse(m, 'memit')}; ROME: {collapse(m, 'rome')}", ("rome", "memit")),
    Claim("proficiency", "FT: the edit itself always works (ES 100)",
          "mean ES ≥ 95 over the whole run",
          lambda m: m.ES_all["ft"] >= 95,
          lambda m: f"ES {m.ES_all['ft']:.1f}", ("ft",)),
    Claim("proficiency", "FT: locality is poor (NS 25 to 42, ROME's 66 to 76)",
          "mean NS over the whole run ≥ 20 points under ROME's",
          lambda m: m.NS_all["ft"] <= m.NS_all["rome"] - 20,
          lambda m: f"NS {m.NS_all['ft']:.1f} against {m.NS_all['rome']:.1f}", ("ft", "rome")),
    Claim("forgetting", "FT: forgets at once (46 % of earlier edits at 40)",
          "≥ 40 % have failed at the first test with 40 edits or more",
          lambda m: m.absorbing_40["ft"] >= 40,
          lambda m: f"{m.absorbing_40['ft']:.1f} %", ("ft",)),
    Claim("forgetting", "FT: ends with most of them forgotten (84 % at 900)",
          "≥ 60 % have ever failed at the end",
          lambda m: m.absorbing_end["ft"] >= 60,
          lambda m: f"{m.absorbing_end['ft']:.1f} % at {m.edits['ft']:.0f}", ("ft",)),
    Claim("downstream", "FT: few-shot ability is lost early (SST-2 by 60 to 200 edits)",
          "10 % of the ability lost within 200 edits",
          lambda m: m.until_10["ft"] <= 200,
          lambda m: f"10 % lost by {m.until_10['ft']:.0f}, {m.ability_end['ft']:.0f} % left at the end".replace(
              "by nan", "never"), ("ft",)),
    Claim("distance", "Distance grows like a random walk, ∝ √n (n^0.48 to n^0.52 in the authors' MEMIT logs)",
          "exponent of MEMIT's relative distance between 0.4 and 0.6",
          lambda m: 0.4 <= m.exponent["memit"] <= 0.6,
          lambda m: f"n^{m.exponent['memit']:.2f}", ("memit",)),
    Claim("downstream", "Few-shot ability declines gently under ROME before its collapse (SST-2 92.9 to 86.7 in 400)",
          "50 to 95 % of the ability left at the last test before the collapse",
          lambda m: 50 <= m.ability_before["rome"] < 95,
          lambda m: f"{m.ability_before['rome']:.0f} % left", ("rome",)),
    Claim("downstream", "Few-shot ability is gone after ROME's collapse (SST-2 0 from 835 edits)",
          "≤ 10 % of the ability left at the end",
          lambda m: m.ability_end["rome"] <= 10 if m.collapsed["rome"] else None,
          lambda m: f"{m.ability_end['rome']:.0f} % left", ("rome",)),
)


def replication(merits):
    """The paper's shapes with what was found, a row each: figure, claim, test, here, replicates.

    replicates is 'yes', 'no', or '-' where the method was not run, the number not measured, or the runs cannot tell
    (nothing broke, or they end before the paper's did).
    """
    out = []
    for claim in CLAIMS:
        known = all(editor in merits.index for editor in claim.needs)
        found = claim.shows(merits) if known else "not run"
        holds = claim.holds(merits) if known and "nan" not in found else None
        out.append({"figure": claim.figure, "claim": claim.says, "test": claim.test, "here": found,
                    "replicates": "-" if holds is None else "yes" if holds else "no"})
    return pd.DataFrame(out)


def verdict(table, figure):
    """One sentence on a figure: how many of the paper's shapes it replicates, and which it does not. table: that of
    `replication`."""
    part = table[(table["figure"] == figure) & (table["replicates"] != "-")]
    if part.empty:
        return "None of the paper's shapes could be tested on it."
    missed = [f"“{claim.split(' (')[0]}” (here: {here})" for claim, here, said in
              part[["claim", "here", "replicates"]].itertuples(index=False) if said == "no"]
    counted = f"Of the paper's shapes tested on it, {len(part) - len(missed)} of {len(part)} replicate"
    return f"{counted}; not replicated: {'; '.join(missed)}." if missed else f"{counted}."


def said(merits, labels, **formats):
    """'ROME: ES 99, NS 80; MEMIT: …' from merits: formats are key=format in the order wanted, NaNs are left out."""
    words = {editor: ", ".join(form.format(one[key]) for key, form in formats.items() if one[key] == one[key])
             for editor, one in merits.iterrows()}
    return "; ".join(f"{labels[editor]}: {text or 'not measured'}" for editor, text in words.items())


def summary(merits, shapes, labels, model):
    """Markdown: a sentence a method, then the paper's shapes that replicate and those that do not."""
    lines = [f"On {model}, one fact at a time:", ""]
    lines += [f"- **{labels[editor]}**: {collapse(merits, editor)}; at the end {share(one['forgotten_end'])} of the "
              f"earlier edits fail, {share(one['untouched_end'])} of the never-edited facts are right and "
              f"{share(one['ability_end'])} of the few-shot ability above chance is left. New edits in the whole run: "
              f"ES {one['ES_all']:.0f}, PS {one['PS_all']:.0f}, NS {one['NS_all']:.0f}."
              for editor, one in merits.iterrows()]
    for word, title in (("yes", "Replicates"), ("no", "Does not replicate"), ("-", "Cannot be told from these runs")):
        found = shapes[shapes["replicates"] == word]
        lines += ["", f"{title}:", ""] * bool(len(found))
        lines += [f"- {row.claim} — here: {row.here}." for row in found.itertuples()]
    return "\n".join(lines)
