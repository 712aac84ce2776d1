"""Every figure is drawn from made-up rows with warnings as errors, and what it shows is compared with the rows."""

import numpy as np
import pandas as pd
import pytest

from editcore import look, portraits

COLLAPSE = {"rome": 160, "memit": np.nan, "ft": 30}


pytestmark = pytest.mark.usefixtures("themed")


def rows(seeds=(0,), editors=("rome", "memit", "ft"), end=200, every=20):
    """Rows shaped like a study's: per edit ES, PS, NS and their kin, per measurement the rest; it falls at COLLAPSE."""
    random, out = np.random.default_rng(7), []
    for editor in editors:
        for seed in seeds:
            known = {"run": f"{editor}{seed}", "model": "pocket", "editor": editor, "data": "facts", "seed": seed}
            late = np.inf if np.isnan(COLLAPSE.get(editor, np.nan)) else COLLAPSE[editor]
            for step in range(1, end + 1):
                for metric, level in {"ES": 0.98, "PS": 0.9, "NS": 0.8, "ES_token": 0.9, "ES_exact": 0.85,
                                      "ES_greedy": 0.7}.items():
                    right = random.random() < (level - 0.1 * step / end if step < late else 0.35)
                    out.append(known | {"step": step, "fact": 1000 + step, "metric": metric, "value": float(right)})
            for step in range(0, end + 1, every):
                gone = step >= late
                lost = min(0.98, 0.15 * step / end + 0.75 * gone)
                level = {"forgotten_absorbing": lost, "forgotten_now": 0.7 * lost, "recovered": 0.3 * (step > 0),
                         "untouched": 0.97 - lost * 0.9, "f1": 0.9 - 0.5 * lost, "invalid": 0.5 * gone,
                         "perplexity": 8 + 400 * gone, "distance": 1e-5 * step**0.5 * (1 + 6 * gone),
                         "relative": 0.05 * step**0.5 * (1 + 6 * gone)}
                for task, drop in zip(look.TASKS, (0.1, 0.2, 0.3, 0.4)):
                    level[f"{task}_f1"] = max(0, 0.92 - drop - lost)
                    level[f"{task}_prob_f1"] = max(1 / 3, 0.9 - drop - lost)
                out += [known | {"step": step, "fact": -1, "metric": metric, "value": value * random.uniform(0.97, 1)}
                        for metric, value in level.items()]
    return pd.DataFrame(out)


def phases(df):
    """The table of phases that goes with `rows`."""
    table = df[["editor", "seed"]].drop_duplicates()
    return table.assign(collapse=[COLLAPSE.get(editor, np.nan) for editor in table["editor"]])


def shown(ax, label):
    """The points of the curve with this label: (x, y)."""
    line = next(line for line in ax.get_lines() if line.get_label() == label)
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def test_curves_are_the_rolling_mean_over_edits():
    df = rows(editors=("rome",))
    table = look.curves(df, "NS", 25)["rome"]
    values = df[df["metric"] == "NS"].set_index("step")["value"]
    assert table.loc[100, "mean"] == pytest.approx(100 * values.loc[76:100].mean())
    half = 1.96 * 100 * values.loc[76:100].std() / 5
    assert table.loc[100, "high"] - table.loc[100, "mean"] == pytest.approx(half)


def test_several_runs_give_the_interval_over_runs():
    df = rows(seeds=(0, 1, 2), editors=("rome",))
    table = look.curves(df, "untouched")["rome"].loc[100]
    values = 100 * df[(df["metric"] == "untouched") & (df["step"] == 100)]["value"]
    assert table["mean"] == pytest.approx(values.mean())
    assert table["high"] - table["mean"] == pytest.approx(4.302653 * values.std() / np.sqrt(3))     # t, 2 degrees
    two = look.curves(df[df["run"] != df["run"].iloc[0]], "untouched")["rome"]
    assert (two["high"] == two["mean"]).all() and (two["low"] == two["mean"]).all()
    assert look.runs_in(df) == "3 runs a method"


def test_no_two_methods_look_alike():
    looks = [look.style(name, look.STYLES) for name in look.STYLES] + [look.style(name, "abcd") for name in "abcd"]
    for key in ("color", "marker", "linestyle", "label"):
        assert len({str(one[key]) for one in looks}) == len(looks) == len(look.STYLES) + 4
    assert all(look.style(one.label) == look.style(name) for name, one in look.STYLES.items())


def test_variants_of_a_method_are_shades_of_it():
    names = ["MEMIT, batch 10", "MEMIT, batch 2", "memit", "ROME without openers", "r-ROME, layer 1", "other"]
    assert [look.base_of(name) for name in names] == ["memit", "memit", "memit", "rome", "r-rome", None]
    assert look.base_of("memit-past") == look.base_of("MEMIT, past keys") == "memit-past"
    assert look.base_of("rome-like") is None and look.base_of("ROMEO") is None
    looks = {name: look.style(name, names) for name in names}
    assert looks["memit"] == look.style("memit") and looks["MEMIT, batch 2"]["label"] == "MEMIT, batch 2"
    for key in ("color", "marker"):
        assert len({str(looks[name][key]) for name in names[:3]}) == 3
    assert {looks[name]["linestyle"] for name in names[:3]} == {looks["memit"]["linestyle"]}
    alone = look.style("MEMIT, batch 10", ["MEMIT, batch 10", "rome"])
    assert (alone["color"], alone["marker"]) == (looks["memit"]["color"], looks["memit"]["marker"])
    ordered = look.methods_in(pd.DataFrame({"editor": [*names, "MEMIT, batch 100"]}))
    assert ordered == ["ROME without openers", "r-ROME, layer 1", "MEMIT, batch 2", "MEMIT, batch 10",
                       "MEMIT, batch 100", "memit", "other"]


def test_wilson_interval_against_its_defining_equation():
    low, high = look.share_interval(np.array([0.0, 0.3, 1.0]), 50)
    for share, below, above in zip((0.0, 0.3, 1.0), low, high):
        for bound in (share - below, share + above):
            inside = bound in (pytest.approx(0, abs=1e-12), pytest.approx(1))
            assert inside or abs(bound - share) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / 50))
    assert high[0] > 0.05 and low[2] > 0.05


def test_portraits():
    random = np.random.default_rng(0)
    roles = ["first subject token", "last subject token", "last prompt token"]
    trace = pd.DataFrame([{"kind": kind, "role": role, "layer": layer, "value": 100 * random.random()}
                          for kind in portraits.KINDS for role in roles for layer in range(3)])
    fig = portraits.causal_trace(trace, 20)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == roles
    patch = pd.DataFrame([{"position": place, "layer": layer, "value": float(layer < 1)}
                          for place in portraits.PLACES for layer in range(3)])
    assert len(portraits.patching(patch, 60).axes[0].containers) == 2
    single = pd.DataFrame([{"editor": editor, "layer": layer, "fact": fact, "metric": metric, "value": fact % 2}
                           for editor in ("rome", "memit") for layer in range(3) for fact in range(6)
                           for metric in ("ES", "PS", "NS")])
    bars = portraits.layers(single, (1,)).axes[2].containers[1]
    assert bars.lines[0].get_ydata() == pytest.approx([50, 50, 50])
    tasks = pd.DataFrame([{"metric": f"{task}_{kind}", "value": value} for task in look.TASKS
                          for kind, value in (("f1", 0.8), ("prob_f1", 0.7), ("invalid", 0.1))])
    greedy, likelier = portraits.tasks(tasks, 200).axes[0].containers
    assert [bar.get_height() for bar in greedy] == pytest.approx([80] * 4)
    assert [bar.get_height() for bar in likelier] == pytest.approx([70] * 4)


def test_one_edit_and_health():
    edit = pd.DataFrame([{"kind": kind, "prompt": prompt, "target": target, "when": when, "value": value}
                         for kind in portraits.PROMPTS for prompt in range(2) for target in ("new", "true")
                         for when, value in (("before", 0.1), ("after", 0.7))])
    steps, values = shown(portraits.one_edit(edit).axes[1], "P(new answer)")
    assert list(values) == pytest.approx([10, 70])
    fig = portraits.health(rows(editors=("memit",)))
    assert [ax.get_title(loc="left") for ax in fig.axes][2] == "‖ΔW‖ / ‖W‖"
