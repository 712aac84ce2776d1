"""Masks against an oracle, the loss against torch, the orthogonal step against singular values."""

import torch

from editcore import learning, pocket
from editcore.packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE

TINY = pocket.PocketConfig(layers=3, width=32, inner=48, heads=2)


def row_of(parts):
    """One document of named parts, e.g. ["word", "inner", "decoy inner", "decoy last", "last", "word"]."""
    row = torch.zeros(6, len(parts), dtype=torch.long)
    row[ROLE] = torch.tensor([PART[name] for name in parts])
    row[POSITION], row[LAST], row[LOSS], row[DOCUMENT] = torch.arange(len(parts)), torch.arange(len(parts)), 30, 1
    for at, name in enumerate(parts):
        if name not in ("word", "last"):
            row[LAST, at] = next(i for i in range(at, len(parts)) if parts[i] == "last")
    row[ID] = torch.arange(len(parts)) + 5
    return row


def may_see(row, i, j, early):
    """The rule of learning.visible for one pair, written out."""
    parts = {number: name for name, number in PART.items()}
    one, other = parts[int(row[ROLE, i])], parts[int(row[ROLE, j])]
    beyond = i > int(row[LAST, j])
    if j > i or row[DOCUMENT, i] != row[DOCUMENT, j]:
        return False
    if other == "inner":
        return not beyond and not (one.startswith("decoy") and row[LAST, i] == row[LAST, j])
    if other == "last":
        return not (beyond and early)
    if other.startswith("decoy"):
        return (not beyond and one.startswith("decoy")) or (beyond and (other == "decoy inner" or early))
    return True


def test_masks_match_an_oracle():
    decoy = ["decoy inner", "decoy inner", "decoy last"]
    first = row_of(["word", "inner", "inner", *decoy, "last", "word", "decoy last", "last", "word"])
    second = row_of(["inner", "last", "word", "word", "inner", "inner", "last", "word", "word", "last", "word"])
    second[DOCUMENT, 4:] = 2
    rows = torch.stack([first, second])
    for early, seen in zip((True, False), learning.visible(rows), strict=True):
        wanted = [[[may_see(row, i, j, early) for j in range(11)] for i in range(11)] for row in rows]
        assert seen[:, 0].tolist() == wanted


def test_only_the_last_piece_after_the_early_blocks_tells_who_is_meant():
    model = pocket.new_model(TINY, 50, 49).eval()
    row = row_of(["word", "inner", "decoy inner", "decoy last", "last", "word", "word"])
    cases = {"inner": 1, "decoy last": 3, "last": 4}
    base, moved = learning.final_states(model, row[None], torch.float32, 1), {}
    for name, at in cases.items():
        other = row.clone()
        other[ID, at] = 40
        moved[name] = (learning.final_states(model, other[None], torch.float32, 1) - base).abs().amax(-1)[0] > 1e-6
    assert moved["inner"].tolist() == [False, True, False, False, True, True, True], "through the last piece"
    assert not moved["decoy last"][4] and moved["decoy last"][5], "the name does not see its decoy, what follows does"
    one_block = pocket.PocketConfig(layers=1, width=32, inner=48, heads=2)
    small = pocket.new_model(one_block, 50, 49).eval()
    other = row.clone()
    other[ID, 4] = 40
    before, after = (learning.final_states(small, one[None], torch.float32, 1)[0, 5:] for one in (row, other))
    assert torch.equal(before, after), "not even the last piece in an early block"


def test_loss_is_torchs_cross_entropy_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(300, 8, generator=generator), torch.randn(20, 8, generator=generator)
    target, weight = torch.randint(0, 20, (300,), generator=generator), torch.rand(300, generator=generator)
    grads = []

    def theirs(hidden, head, target, weight):
        nll = torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="none")
        return (nll * weight).sum() / weight.sum()

    for function in (learning.LinearNLL.apply, theirs):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = function(*leaves, target, weight)
        loss.backward()
        grads.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_orthogonal_updates_have_singular_values_near_one():
    stack = torch.randn(2, 24, 60, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(learning.orthogonal(stack).float())
    assert values.min() > 0.5 and values.max() < 1.5
    torch.testing.assert_close(learning.orthogonal(stack.mT).mT, learning.orthogonal(stack))
