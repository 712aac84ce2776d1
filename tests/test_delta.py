"""editcore.delta: sums, norms, files, and a model that is bit for bit what it was afterwards."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import drawn
from safetensors.torch import save_file

from editcore import delta as module
from editcore.delta import Delta, LowRank, Patch, added, dense, load, oriented
from editcore.hooks import run
from editcore.model import content_hash, module_of

W1 = "transformer.h.1.mlp.c_proj.weight"    # (128, 32) in GPT-2's orientation
W2 = "transformer.h.2.mlp.c_proj.weight"
MLP = "transformer.h.2.mlp"
IDS = torch.arange(5, 13).view(2, 4)


@dataclass(frozen=True)
class Shift:
    """A part that adds a vector at every position."""

    keys: torch.Tensor
    values: torch.Tensor
    labels: tuple = ("a",)
    kind: ClassVar = "shift"

    def output(self, x, y):
        return y + self.values

    def __add__(self, other):
        return Shift(self.keys, self.values + other.values, self.labels + other.labels)

    def fits(self, module, width):
        return len(self.values) == width


@dataclass(frozen=True)
class Other(Shift):
    kind: ClassVar = "other"


@pytest.fixture
def low():
    return Delta({W1: LowRank(drawn(128, 2), drawn(2, 32, seed=1))}, {"editor": "a"})


@pytest.fixture
def full():
    return Delta({W1: drawn(128, 32, seed=2), W2: drawn(128, 32, seed=3)}, {"editor": "b"})


@pytest.fixture
def patch(monkeypatch):
    monkeypatch.setitem(module.PARTS, "shift", f"{__name__}:Shift")
    return Patch({MLP: Shift(drawn(3), drawn(32))}, {"editor": "c", "n": 3})


def test_sums_and_multiples_equal_those_of_matrices(low, full):
    for a, b in ((low, full), (full, low), (low, low)):
        total = a + b
        for name in a.changes | b.changes:
            parts = [dense(delta.changes[name]) for delta in (a, b) if name in delta.changes]
            torch.testing.assert_close(dense(total.changes[name]), sum(parts))
        torch.testing.assert_close(dense((a * -2.5).changes[W1]), -2.5 * dense(a.changes[W1]))
    assert isinstance((low + low).changes[W1], LowRank)
    assert (low + full).info == {"editor": "a"}


def test_a_sum_of_many_low_ranks_becomes_a_matrix(low):
    total = sum([low] * 20, low)
    assert isinstance(total.changes[W1], torch.Tensor)
    expected = 21 * dense(low.changes[W1])
    torch.testing.assert_close(total.changes[W1], expected, rtol=1e-4, atol=1e-4)


def test_keys_are_joined():
    a = Delta({}, keys={"x": torch.ones(2, 3)})
    b = Delta({}, keys={"x": torch.zeros(1, 3), "y": torch.ones(1, 2)})
    total = a + b
    assert total.keys["x"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert total.keys["y"].shape == (1, 2)


def test_norms(low, full, patch):
    joined = torch.cat([full.changes[W1].flatten(), full.changes[W2].flatten()]).double()
    assert full.norm() == pytest.approx(joined.norm().item(), rel=1e-12)
    matrix = dense(low.changes[W1]).double()
    assert low.norm(W1) == pytest.approx(matrix.norm().item(), rel=1e-6)
    assert patch.norm() == patch.norm(MLP) == pytest.approx(drawn(32).double().norm().item())
    assert Delta({}).norm() == Patch({}).norm() == 0


def test_they_are_printed_as_one_line(low, patch):
    assert repr(low) == f"Delta({W1} (128, 32) norm {low.norm():.4g})"
    assert repr(patch) == f"Patch({MLP} (32,) norm {patch.norm():.4g})"


@pytest.mark.parametrize("edit, finite", [
    (Delta({W1: LowRank(drawn(128, 1), drawn(1, 32))}), True),
    (Delta({W1: LowRank(drawn(128, 1) * float("nan"), drawn(1, 32))}), False),
    (Delta({W1: torch.tensor([1.0, float("inf")])}), False),
    (Patch({MLP: Shift(drawn(3), drawn(32))}), True),
    (Patch({MLP: Shift(drawn(3), drawn(32) / 0)}), False),
])
def test_is_finite(edit, finite):
    assert edit.is_finite() is finite


def test_applied_adds_and_takes_back(gpt2, low, full):
    model, _ = gpt2
    before = content_hash(model)
    weight = model.get_parameter(W1).clone()
    with (low + full).applied(model) as changed:
        assert changed is model
        expected = weight + dense(low.changes[W1]) + full.changes[W1]
        torch.testing.assert_close(model.get_parameter(W1), expected)
        with low.applied(model):
            pass
        assert content_hash(model) != before
    assert content_hash(model) == before
    with pytest.raises(RuntimeError), low.applied(model):
        raise RuntimeError
    assert content_hash(model) == before


def test_a_patch_changes_outputs_and_no_weight(gpt2, patch):
    model, _ = gpt2
    before = content_hash(model)
    plain = run(model, input_ids=IDS).logits
    with patch.applied(model) as changed:
        assert changed is model and not torch.equal(run(model, input_ids=IDS).logits, plain)
    with pytest.raises(RuntimeError), patch.applied(model):
        raise RuntimeError
    assert torch.equal(run(model, input_ids=IDS).logits, plain) and content_hash(model) == before
    assert not any(m._forward_hooks for m in model.modules())


def test_patches_are_summed_module_by_module(patch):
    both = patch + Patch({MLP: Shift(drawn(3), drawn(32, seed=1)), "x": Shift(drawn(3), drawn(2))})
    assert list(both.parts) == [MLP, "x"] and both.parts[MLP].labels == ("a", "a")
    assert both.info == (Patch({}) + patch).info == patch.info
    with pytest.raises(ValueError, match="mlp has a part of another kind already"):
        patch + Patch({MLP: Other(drawn(3), drawn(32))})


@pytest.mark.parametrize("edit, words", [
    (Delta({"other.weight": drawn(2)}), "no parameter other.weight"),
    (Delta({W1: drawn(128, 32), W2: drawn(32, 128)}), r"c_proj.weight is \(32, 128\)"),
    (Patch({"m": Shift(drawn(3), drawn(32))}), "the model has no module m"),
    (Patch({MLP: Shift(drawn(3), drawn(7))}), r"mlp has other widths than \(3,\) keys and \(7,\)"),
])
def test_what_does_not_fit_changes_nothing(gpt2, edit, words):
    model, _ = gpt2
    before = content_hash(model)
    with pytest.raises(ValueError, match=words), edit.applied(model):
        pass
    assert content_hash(model) == before
    assert not any(m._forward_hooks for m in model.modules())


def test_files(low, full, patch, tmp_path):
    path = tmp_path / "edit.safetensors"
    for delta in (low, full):
        delta.save(path)
        again = load(path)
        assert again.info == delta.info and again.changes.keys() == delta.changes.keys()
        assert all(torch.equal(again.changes[name], dense(change))
                   for name, change in delta.changes.items())
    patch.save(path)
    again = load(path)
    assert again.info == patch.info and again.parts[MLP].labels == ("a",)
    assert torch.equal(again.parts[MLP].keys, patch.parts[MLP].keys)
    assert torch.equal(again.parts[MLP].values, patch.parts[MLP].values)
    save_file({W1: torch.ones(2)}, path, {"format": "editcore-delta-1"})
    assert load(path).changes[W1].tolist() == [1, 1] and load(path).info == {}


def test_slots_of_older_files_are_read(tmp_path):
    path = tmp_path / "old.safetensors"
    metadata = {"format": "editcore-patch-1", "info": "{}", "parts": '{"m": {"kind": "beside"}}'}
    save_file({"m/keys": torch.ones(2, 3), "m/values": torch.zeros(2, 3)}, path, metadata)
    part = load(path).parts["m"]
    assert part.kind == "slots" and torch.equal(part.keys, torch.ones(2, 3))


def test_orientation(gpt2, llama):
    left = drawn(32, 3)
    right = drawn(3, 128)
    conv = oriented(left, right, module_of(gpt2[0], "mlp_out", 0))
    linear = oriented(left, right, module_of(llama[0], "mlp_out", 0))
    torch.testing.assert_close(conv.dense(), (left @ right).T)
    torch.testing.assert_close(linear.dense(), left @ right)


def test_bfloat16_weights_get_the_sum_rounded_once():
    weight = drawn(64, 8).bfloat16()
    change = 1e-2 * drawn(64, 8, seed=4)
    assert torch.equal(added(weight, change), (weight.float() + change).bfloat16())
