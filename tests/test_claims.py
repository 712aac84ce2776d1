"""Claims on figures of merit made by hand: yes, no, and not run."""

import numpy as np
import pandas as pd
import pytest

from editcore import claims

LABELS = {"rome": "ROME", "memit": "MEMIT", "ft": "FT-L"}


@pytest.fixture
def merit():
    """A study in which ROME breaks at 560 by one edit, MEMIT never does, and FT forgets at once."""
    one = {"ES": 99.0, "PS": 90.0, "NS": 70.0, "ES_all": 98.0, "PS_all": 88.0, "NS_all": 60.0, "NS_fall": 9.0,
           "collapsed": 1.0, "runs": 1, "broke": 559.0, "edits": 900, "duration": 559.0,
           "absorbing_40": 1.0, "absorbing_500": 7.0, "absorbing_before": 8.0,
           "absorbing_end": 98.0, "forgotten_before": 6.0, "forgotten_end": 95.0, "untouched_end": 3.0, "until_10": 400,
           "ability_before": 80.0, "ability_end": -50.0, "exponent": 0.5, "largest": 40.0, "disabling": "yes"}
    calm = one | {"collapsed": 0.0, "duration": 900.0, "disabling": "", "ability_end": 99.0, "forgotten_end": 9.0}
    lost = one | {"NS_all": 30.0, "absorbing_40": 46.0, "until_10": np.nan, "duration": 20.0, "disabling": "no"}
    return pd.DataFrame([one, calm, lost], index=["rome", "memit", "ft"])


def verdict_of(table, words):
    (found,) = table.loc[table["claim"].str.contains(words, regex=False), "replicates"]
    return found


def test_replication_says_yes_and_no(merit):
    table = claims.replication(merit)
    wanted = {"one disabling edit": "yes", "then nearly all at once": "yes", "MEMIT lasts longer": "yes",
              "without a single trigger": "-", "forgets at once": "yes", "locality is poor": "yes",
              "lost early": "no", "random walk": "yes"}
    assert {words: verdict_of(table, words) for words in wanted} == wanted
    assert len(table) == len(claims.CLAIMS) and set(table["replicates"]) == {"yes", "no", "-"}
    longer = claims.replication(merit.assign(edits=2000))
    assert verdict_of(longer, "without a single trigger") == "no"    # it had the time to break and did not


def test_what_was_not_run_is_not_judged(merit):
    table = claims.replication(merit.loc[["memit"]])
    needs = [claim.needs for claim in claims.CLAIMS]
    judged = [verdict != "-" for verdict in table["replicates"]]
    assert not any(one for one, names in zip(judged, needs) if set(names) != {"memit"}) and any(judged)
    unmeasured = claims.replication(merit.assign(absorbing_500=np.nan))
    assert verdict_of(unmeasured, "ROME: at first") == "-"


def test_every_claim_belongs_to_a_figure_and_its_verdict_counts_them(merit):
    table = claims.replication(merit)
    for figure, part in table.groupby("figure"):
        words = claims.verdict(table, figure)
        tested = (part["replicates"] != "-").sum()
        assert f"{(part['replicates'] == 'yes').sum()} of {tested} replicate" in words
        assert ("not replicated" in words) == (part["replicates"] == "no").any()
    assert "could be tested" in claims.verdict(table, "no such figure")


def test_words_leave_out_what_is_missing(merit):
    assert claims.said(merit, LABELS, ES="ES {:.0f}", until_10="10 % by {:.0f}") == (
        "ROME: ES 99, 10 % by 400; MEMIT: ES 99, 10 % by 400; FT-L: ES 99")
    text = claims.summary(merit, claims.replication(merit), LABELS, "a model")
    assert "**ROME**: collapse after 559 edits" in text and "**MEMIT**: no collapse in 900 edits" in text
    assert text.count("\n- ") == len(LABELS) + len(claims.CLAIMS) and "nan" not in text
