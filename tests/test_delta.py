"""editcore.delta: sums, norms, files, and a model that is bit for bit what it was afterwards."""

import pytest
import torch

from editcore import delta as deltas
from editcore.delta import Delta, LowRank, dense, oriented
from editcore.model import content_hash, module_of

W1, W2 = "transformer.h.1.mlp.c_proj.weight", "transformer.h.2.mlp.c_proj.weight"     # (128, 32) in GPT-2's orientation


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def low():
    return Delta({W1: LowRank(drawn(128, 2), drawn(2, 32, seed=1))}, {"editor": "a"})


@pytest.fixture
def full():
    return Delta({W1: drawn(128, 32, seed=2), W2: drawn(128, 32, seed=3)}, {"editor": "b"})


def test_sums_and_multiples_equal_those_of_matrices(low, full):
    for a, b in ((low, full), (full, low), (low, low)):
        total = a + b
        for name in a.changes | b.changes:
            parts = [dense(one.changes[name]) for one in (a, b) if name in one.changes]
            torch.testing.assert_close(dense(total.changes[name]), sum(parts))
        torch.testing.assert_close(dense((a * -2.5).changes[W1]), -2.5 * dense(a.changes[W1]))
    assert isinstance((low + low).changes[W1], LowRank) and (low + full).info == {"editor": "a"}


def test_a_sum_of_many_low_ranks_becomes_a_matrix(low):
    total = low
    for _ in range(20):
        total = total + low
    assert isinstance(total.changes[W1], torch.Tensor)
    torch.testing.assert_close(total.changes[W1], 21 * dense(low.changes[W1]), rtol=1e-4, atol=1e-4)


def test_norms(low, full):
    joined = torch.cat([full.changes[W1].flatten(), full.changes[W2].flatten()]).double()
    assert full.norm() == pytest.approx(joined.norm().item(), rel=1e-12)
    assert low.norm(W1) == pytest.approx(dense(low.changes[W1]).double().norm().item(), rel=1e-6)
    assert Delta({}).norm() == 0


def test_applied_adds_and_takes_back(gpt2, low, full):
    model, _ = gpt2
    before, weight = content_hash(model), model.get_parameter(W1).clone()
    with (low + full).applied(model) as changed:
        assert changed is model
        torch.testing.assert_close(model.get_parameter(W1), weight + dense(low.changes[W1]) + full.changes[W1])
        with low.applied(model):
            pass
        assert content_hash(model) != before
    assert content_hash(model) == before
    with pytest.raises(RuntimeError), low.applied(model):
        raise RuntimeError
    assert content_hash(model) == before


def test_a_delta_that_does_not_fit_changes_nothing(gpt2, low):
    model, _ = gpt2
    before = content_hash(model)
    with pytest.raises(ValueError, match="no parameter other.weight"), Delta({"other.weight": drawn(2)}).applied(model):
        pass
    turned = Delta({**low.changes, W2: drawn(32, 128)})
    with pytest.raises(ValueError, match=r"c_proj.weight is \(32, 128\)"), turned.applied(model):
        pass
    assert content_hash(model) == before


def test_files_keep_values_and_info(low, full, tmp_path):
    path = tmp_path / "edit.safetensors"
    for one in (low, full):
        one.save(path)
        again = deltas.load(path)
        assert again.info == one.info and set(again.changes) == set(one.changes)
        assert all(torch.equal(again.changes[name], dense(change)) for name, change in one.changes.items())
    with pytest.raises(FileNotFoundError, match="none"):
        deltas.load(tmp_path / "none")
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="edit.safetensors: not a safetensors file"):
        deltas.load(path)


def test_orientation(gpt2, llama):
    left, right = drawn(32, 3), drawn(3, 128)
    conv = oriented(left, right, module_of(gpt2[0], "mlp_out", 0))
    linear = oriented(left, right, module_of(llama[0], "mlp_out", 0))
    torch.testing.assert_close(conv.dense(), (left @ right).T)
    torch.testing.assert_close(linear.dense(), left @ right)


def test_bfloat16_weights_get_the_sum_rounded_once():
    weight, change = drawn(64, 8).bfloat16(), 1e-2 * drawn(64, 8, seed=4)
    assert torch.equal(deltas.added(weight, change), (weight.float() + change).bfloat16())


def test_is_finite(low):
    assert low.is_finite()
    assert not Delta({W1: LowRank(drawn(128, 1) * float("nan"), drawn(1, 32))}).is_finite()
    assert not Delta({W1: torch.tensor([1.0, float("inf")])}).is_finite()
