"""editcore.hyper: training lowers the loss, is repeatable, and goes on after a kill as if nothing had happened."""

import json
from dataclasses import replace

import pytest
import torch
from test_hyperloss import example_of
from test_mend import SETTINGS

from editcore.editors import EDITORS, configure
from editcore.instructedit import hyperloss, hypernet, mend
from editcore.instructedit import training as hyper
from editcore.instructedit.training import Training
from editcore.model import content_hash

CONFIG = SETTINGS | {"rank": 16, "alpha": 1e-3}
TRAINING = Training(16, lr=3e-3, alpha_lr=1e-2, warmup=12, every=8, accumulate=2)


@pytest.fixture(scope="module")
def examples(gpt2, facts):
    return [example_of(gpt2[1], fact) for fact in facts]


def begin(model):
    return mend.start(model, configure("mend", CONFIG))


@pytest.fixture(scope="module")
def whole(gpt2, examples, tmp_path_factory):
    """(Network, log) of TRAINING without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return hyper.train(gpt2[0], begin(gpt2[0]), examples, TRAINING, folder), (folder / hyper.LOG).read_text()


def same(a, b):
    first, second = hypernet.tensors(a), hypernet.tensors(b)
    return first.keys() == second.keys() and all(torch.equal(one, second[name]) for name, one in first.items())


class Killed(Exception):
    """Stands for a kill."""


def killed(monkeypatch, function, after):
    """Make hyper's `function` raise Killed instead of its call number `after` (from 0)."""
    real, calls = getattr(hyper, function), []

    def call(*args, **words):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return real(*args, **words)
    monkeypatch.setattr(hyper, function, call)


def test_training_lowers_the_loss_and_leaves_the_model(gpt2, facts, examples, tmp_path):
    model, tok = gpt2
    before, training = content_hash(model), replace(TRAINING, examples=120, every=60, snapshots=(60,), keep=True)
    network = hyper.train(model, begin(model), examples, training, tmp_path, examples[:2])
    assert content_hash(model) == before and all(weight.grad is None for weight in model.parameters())
    assert not any(weight.requires_grad for weight in network.weights.values())
    rows = [json.loads(line) for line in (tmp_path / hyper.LOG).read_text().splitlines()]
    assert [row["example"] for row in rows] == list(range(1, 121))
    assert sorted(row["record"] for row in rows[:12]) == sorted(str(fact.case_id) for fact in facts)
    first, last = (sum(row["loss"] for row in part) / 12 for part in (rows[:12], rows[-12:]))
    assert last < 0.9 * first
    assert [number for number, row in enumerate(rows, 1) if "validation_edit" in row] == [60, 120]
    assert [number for number, row in enumerate(rows, 1) if "gradient" in row] == list(range(2, 121, 2))
    found = hyperloss.evaluate(model, network, examples[:2])
    assert rows[-1]["validation_edit"] == pytest.approx(found["edit"], rel=1e-4)
    half = hyperloss.evaluate(model, hypernet.load(tmp_path / "network-60.safetensors"), examples[:2])
    assert rows[59]["validation_locality"] == pytest.approx(half["locality"], rel=1e-4)
    config = configure("mend", CONFIG | {"network": str(tmp_path / hyper.RESULT)})
    delta = EDITORS["mend"].edit(model, tok, facts[:1], config, EDITORS["mend"].prepare(model, tok, config, None))
    assert delta.norm() > 0
    assert same(hyper.train(model, begin(model), examples, training, tmp_path, examples[:2]), network)


@pytest.mark.parametrize("function, after", [("_learn", 13), ("_learn", 3), ("_step", 7), ("save_file", 1),
                                             ("_checkpoint", 1)])
def test_a_killed_training_goes_on_bit_for_bit(function, after, gpt2, examples, tmp_path, monkeypatch, whole):
    model, _ = gpt2
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed(patch, function, after)
        hyper.train(model, begin(model), examples, TRAINING, tmp_path)
    assert not (tmp_path / hyper.RESULT).exists()
    assert same(hyper.train(model, begin(model), examples, TRAINING, tmp_path), whole[0])
    assert (tmp_path / hyper.LOG).read_text() == whole[1]


def test_what_is_kept_in_memory_changes_nothing(gpt2, examples, tmp_path, whole):
    training = replace(TRAINING, keep=True, every=16)
    assert same(hyper.train(gpt2[0], begin(gpt2[0]), examples, training, tmp_path), whole[0])


def test_a_longer_training_goes_on_from_a_shorter(gpt2, examples, tmp_path, whole):
    model, _ = gpt2
    hyper.train(model, begin(model), examples, replace(TRAINING, examples=10), tmp_path)
    assert same(hyper.train(model, begin(model), examples, TRAINING, tmp_path), whole[0])
    with pytest.raises(ValueError, match="16 examples are done already, 10 are wanted"):
        hyper.train(model, begin(model), examples, replace(TRAINING, examples=10), tmp_path)


def test_two_examples_a_step_are_one_step_on_their_mean(gpt2, examples, tmp_path):
    model, _ = gpt2
    training = replace(TRAINING, examples=2, every=2, clip=0.05, warmup=0)
    trained = hyper.train(model, begin(model), examples, training, tmp_path)
    network = begin(model)
    weights = {name: weight.requires_grad_() for name, weight in network.weights.items()}
    order, loss = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist(), 0
    for index in order[:2]:
        laid = hyperloss.lay(model, network, examples[index])
        network = hypernet.watch(network, laid.found)
        loss = loss + hyper.total(hyperloss.losses(model, network, laid), training) / 2
    gradient = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    norm = sum(part.square().sum() for part in gradient.values()).sqrt()
    assert norm > 0.05
    for name, weight in weights.items():
        rate = training.alpha_lr if name.endswith("/alpha") else training.lr
        clipped = gradient[name] * 0.05 / (norm + 1e-6)
        moved = weight.detach() - rate * clipped / (clipped.abs() + 1e-8)     # Adam's first step
        sure = clipped.abs() > 1e-7      # below, the sign is rounding's
        assert torch.allclose(trained.weights[name][sure], moved[sure], atol=rate * 0.02), name
    rows = [json.loads(line) for line in (tmp_path / hyper.LOG).read_text().splitlines()]
    assert rows[1]["gradient"] == pytest.approx(norm.item(), rel=1e-3)


def test_a_frozen_normaliser_stays_as_the_warm_up_left_it(gpt2, examples, tmp_path):
    model, _ = gpt2
    frozen = hyper.train(model, begin(model), examples, replace(TRAINING, frozen=True, examples=4, every=4), tmp_path)
    expected = begin(model)
    for index in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist():
        expected = hypernet.watch(expected, hyperloss.lay(model, expected, examples[index]).found)
    for name, norm in expected.norms.items():
        assert torch.allclose(frozen.norms[name].mean, norm.mean) and norm.count == frozen.norms[name].count


def test_what_has_changed_is_named(gpt2, examples, tmp_path):
    model, _ = gpt2
    short = replace(TRAINING, examples=8)
    hyper.train(model, begin(model), examples, short, tmp_path)
    for place in ("finished", "checkpoint"):
        for other, words in (((begin(model), examples, replace(short, lr=1.0)), "training has changed"),
                             ((begin(model), examples[1:], short), "examples has changed"),
                             ((mend.start(model, configure("mend", CONFIG | {"seed": 3})), examples, short),
                              "settings has changed")):
            with pytest.raises(ValueError, match=words):
                hyper.train(model, *other, tmp_path)
        if place == "finished":
            (tmp_path / hyper.RESULT).unlink()
    (tmp_path / hyper.STATE).write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="state.safetensors: damaged, or not a checkpoint"):
        hyper.train(model, begin(model), examples, short, tmp_path)


def test_bad_trainings_are_named(gpt2, examples, tmp_path):
    model, _ = gpt2
    for change, words in (({"examples": 7}, "examples is 7, but must be a multiple of accumulate, 2"),
                          ({"every": 0}, "every is 0"), ({"snapshots": (3,)}, "snapshots is 3")):
        with pytest.raises(ValueError, match=words):
            hyper.train(model, begin(model), examples, replace(TRAINING, **change), tmp_path)
    with pytest.raises(ValueError, match="there are no examples"):
        hyper.train(model, begin(model), [], TRAINING, tmp_path)
    network = begin(model)
    broken = replace(network, weights={name: weight * float("nan") for name, weight in network.weights.items()})
    with pytest.raises(ValueError, match=r"record \d+: the loss is nan"):
        hyper.train(model, broken, examples, TRAINING, tmp_path / "nan")
