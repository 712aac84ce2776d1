"""editcore.parting: verdicts are on the claims' side, shares and correlations of tables whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from editcore import atlas, parting


def test_verdicts_are_of_the_claims_side():
    noise, groups = 0.01 * np.random.default_rng(0).random(24), np.repeat(atlas.TASKS, 8)
    rows = pd.concat([pd.DataFrame({
        "source": source, "reading": "G~", "map": "one", "group": groups, "silhouette": far + noise,
        "within": 1 - far, "between": 1.0, "probe": 1.0, "knn": 1.0}) for source, far in (
            ("InstructEdit", 0.5), ("MEND, multi-task", 0.1), ("random words", 0.7), ("on Recent", 0.5))])
    rows["reading"] = np.where(rows["source"] == "on Recent", "G", rows["reading"])     # raw and transformed alike
    found = parting.verdicts(rows, "G", "one").set_index("text")["verdict"]
    assert found["a: instructions part the tasks"] == "held" and len(found) == 3
    assert found["control: more than trained with random words"] == "failed"
    assert found["b: all training tasks more than one"] == "undecided"
    assert parting.verdicts(rows, "G", "one", "ratio").set_index("text")["verdict"].equals(found)


def test_the_plain_verdict_follows_from_the_controls():
    told = pd.DataFrame({"probe_as_told": [1.0, 1.0, 0.0, 1.0], "probe_as_is": [0.0, 0.0, 1.0, 0.0]})
    names = [text for text, *_ in parting.CLAIMS if text.startswith("a: instructions") or "more than" in text]
    gone = {"a: instructions part the tasks": "does not appear", "control: more than normalising alone": "text alone",
            "control: more than the same prompts' raw gradients": "text alone",
            "control: more than without the prefix at the test": "not shown to be by what the instruction says",
            "control: more than asked with random words": "not shown to be by what the instruction says"}
    whole = parting.plain(pd.DataFrame({"text": names, "verdict": "held"}), told)
    assert "learned control" in whole and "75 % of the edits look like the task that is named, 25 %" in whole
    for text, words in gone.items():
        assert text in names
        for state in ("failed", "undecided"):
            verdicts = pd.DataFrame({"text": names, "verdict": [state if one == text else "held" for one in names]})
            said = parting.plain(verdicts, told)
            assert words in said and (state in said or text.startswith("a:"))
        assert words in parting.plain(verdicts[verdicts["text"] != text], told), "a control that was not tried"


def test_success_and_its_correlation():
    rows = pd.DataFrame([(name, "G~", "one", task, far) for name, far in (("A", 0.1), ("B", 0.3), ("C", 0.6))
                         for task in atlas.TASKS for _ in range(2)],
                        columns=["source", "reading", "map", "group", "silhouette"])
    answers = pd.DataFrame([(name, task, metric, k, value if metric == "Rel" else 0.5)
                            for name, value in (("A", 0.2), ("B", 0.4), ("C", 0.9)) for task in atlas.TASKS
                            for metric in ("Rel", "Gen", "Loc") for k in range(2)],
                           columns=["system", "task", "metric", "case_id", "value_exact"])
    found = parting.success(rows, answers, "G", "one")
    assert len(found) == 9 and found.set_index(["system", "task"]).loc[("C", "zsre"), "Rel"] == pytest.approx(0.9)
    rho, low, high = parting.correlation(found, "Rel")
    assert rho == pytest.approx(1) and low == pytest.approx(1) == high
    assert np.isnan(parting.correlation(found, "Gen")[0])
    turned = found.assign(Rel=-found["Rel"])
    assert parting.correlation(turned, "Rel")[0] == pytest.approx(-1)


def test_what_is_followed_adds_up():
    told = pd.DataFrame({"group": ["recent"] * 10, "probe_as_told": [1.0] * 6 + [0.0] * 4,
                         "probe_as_is": [0.0] * 6 + [1.0] * 3 + [0.0]})
    one = parting.followed({"A": told}).loc["A"]
    assert one[["as_told", "as_is", "other"]].tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert one["low"] < 0.6 < one["high"]


def test_scaling_and_single_edits():
    answers = pd.DataFrame([(name, "zsre", metric, k, float(k < count)) for metric in ("Rel", "Gen", "Loc")
                            for name, count in (("A", 2), ("B", 8), ("C", 9)) for k in range(10)],
                           columns=["system", "task", "metric", "case_id", "value_exact"])
    found = parting.scaling(answers, {"A": 1, "B": 3}).set_index(["metric", "tasks"])
    assert len(found) == 4 and found.loc[("Rel", 1), "mean"] == pytest.approx(0.2)
    assert found.loc[("Gen", 3), "low"] < 0.8 < found.loc[("Gen", 3), "high"]
    rows = pd.DataFrame({"source": "A", "reading": "G~", "map": "one", "record": range(4),
                         "silhouette": [.4, .3, .2, .1]})
    lab = SimpleNamespace(records=[SimpleNamespace(case_id=k) for k in (0, 1, 5, 1)],
                          groups=("zsre", "zsre", "zsre", "recent"))
    single = parting.singly(rows, answers, lab, "G", "one")
    assert single["Rel"].tolist() == [True, True, False] and single["silhouette"].tolist() == [.4, .3, .2]
    assert set(single["run"]) == {"A"}


def test_every_picture_and_claim_names_sources_that_differ():
    names = list(parting.PICTURES.values()) + [claim[1:] for claim in parting.CLAIMS]
    assert all(first != second for first, second in names) and len({text for text, *_ in parting.CLAIMS}) == 12
    assert atlas.SINGLE in {first for first, _ in names}
