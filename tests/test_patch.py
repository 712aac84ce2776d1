"""editcore.patch: the codebook's rules against a plain restatement, sums, files, and a model that stays as it was."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make
from safetensors.torch import save_file

from editcore import delta as patches
from editcore.delta import Patch
from editcore.hooks import capture, run
from editcore.likelihood import plan, prompt_ends, read
from editcore.model import content_hash
from editcore.patch import Beside, Codebook

C_FC, MLP = "transformer.h.2.mlp.c_fc", "transformer.h.2.mlp"     # 32 -> 128, 32 -> 32


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entry(key, value, label="a", radius=1.0):
    return Codebook(torch.as_tensor(key)[None], torch.as_tensor(value)[None], torch.tensor([radius]).to(key),
                    (label,))


def book(*radii, dtype=torch.float32):
    """Entries at random keys with these radii."""
    count = len(radii)
    return Codebook(drawn(count, 32, dtype=dtype), drawn(count, 128, seed=1, dtype=dtype),
                    torch.tensor(radii, dtype=dtype), tuple("abcdefgh"[:count]))


def plain(entries, radius):
    """The codebook by its rules: [[key, value, radius, label], ...] of (key, value, label) in order, all floats."""
    made = []
    for key, value, label in entries:
        if not made:
            made.append([key, value, radius, label])
            continue
        distances = [math.dist(key, one[0]) for one in made]
        d = min(distances)
        near = made[distances.index(d)]
        if d > radius + near[2]:
            made.append([key, value, radius, label])
        elif near[3] == label:
            near[2] = max(near[2], d)
        else:
            near[2] = d / 2 - 1e-5
            made.append([key, value, d / 2, label])
    return made


def test_two_hundred_insertions_equal_the_plain_rules():
    draw = random.Random(3)
    centres = [[draw.gauss(0, 2) for _ in range(3)] for _ in range(12)]
    entries = [([draw.gauss(x, 0.5) for x in draw.choice(centres)], [draw.random() for _ in range(2)],
                draw.choice("xyz")) for _ in range(200)]
    expected, wide = plain(entries, 1.0), torch.float64
    total = Patch({})
    for key, value, label in entries:
        one = entry(torch.tensor(key, dtype=wide), torch.tensor(value, dtype=wide), label)
        total = total + Patch({"m": one})
    found = total.parts["m"]
    assert 20 < len(expected) < 150 and found.labels == tuple(one[3] for one in expected)
    assert any(one[2] < 0.5 for one in expected) and any(one[2] > 1 for one in expected)
    for column, name in enumerate(("keys", "values", "radii")):
        wanted = torch.tensor([one[column] for one in expected], dtype=wide)
        torch.testing.assert_close(getattr(found, name), wanted, rtol=2e-4 if name == "radii" else 0, atol=0)
    probes = torch.tensor([[entries[i][0]] for i in range(50)], dtype=wide) + drawn(50, 1, 3, seed=5, dtype=wide) / 3
    answers = found.output(probes, torch.zeros(50, 1, 2, dtype=wide))
    for probe, answer in zip(probes[:, 0].tolist(), answers[:, 0].tolist()):
        near = min(expected, key=lambda one: math.dist(one[0], probe))
        assert answer == (near[1] if math.dist(near[0], probe) <= near[2] else [0, 0])
    assert 5 < (answers != 0).any(-1).sum() < 45


def test_labels_close_together_split_and_equal_ones_widen():
    far = torch.tensor([1.2, 0.0])
    one, value = entry(torch.zeros(2), torch.ones(3)), torch.full((3,), 2.0)
    split = one.insert(far, value, "b", 1.0)
    torch.testing.assert_close(split.radii, torch.tensor([0.6 - 1e-5, 0.6]), rtol=1e-6, atol=0)
    assert split.labels == ("a", "b") and split.keys.tolist() == [[0, 0], [1.2000000476837158, 0]]
    wide = one.insert(far, value, "a", 1.0)
    assert wide.labels == ("a",) and 1.2 <= wide.radii.item() < 1.2002 and wide.values.tolist() == [[1, 1, 1]]
    assert one.insert(far * 0.5, value, "a", 1.0).radii.item() == 1     # inside already
    apart = one.insert(far * 2, value, "a", 1.0)                        # beyond both radii: an entry, whatever it says
    assert apart.radii.tolist() == [1, 1] and apart.labels == ("a", "a")
    again = one.insert(torch.zeros(2), value, "b", 1.0)                 # the same input says something else now
    assert (again.labels, again.radii.tolist(), again.values.tolist()) == (("b",), [1], [[2, 2, 2]])
    assert one.radii.tolist() == [1]


def test_small_distances_survive_rounding():
    keys = drawn(40, 64) * 100
    many = Codebook(keys, drawn(40, 3, seed=1), torch.full((40,), 1e-3), ("a",) * 40)
    distance, index = many.nearest(keys.flip(0) + 1e-5)
    assert index.tolist() == list(range(39, -1, -1)) and distance.max() < 5e-4


def test_the_value_takes_the_place_of_the_output_where_an_entry_is_hit(gpt2):
    model, _ = gpt2
    ids, before = torch.arange(5, 13).view(2, 4), content_hash(model)
    with torch.no_grad():
        with capture(model, [C_FC], "input", stop=False) as x, capture(model, [C_FC], stop=False) as y:
            plain_logits = model(input_ids=ids).logits
        key, value = x[C_FC][1, 2], drawn(128)
        with Patch({C_FC: entry(key, value, radius=1e-3)}).applied(model), \
                capture(model, ["transformer.h.2.mlp.act"], "input", stop=False) as seen:
            logits = model(input_ids=ids).logits
    expected = y[C_FC].clone()
    expected[1, 2] = value
    assert torch.equal(seen["transformer.h.2.mlp.act"], expected)
    assert torch.equal(logits[0], plain_logits[0]) and torch.equal(logits[1, :2], plain_logits[1, :2])
    assert (logits[1, 2:] - plain_logits[1, 2:]).abs().max() > 0.01
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())


def test_slots_add_their_answer(gpt2):
    model, _ = gpt2
    ids = torch.arange(5, 13).view(2, 4)
    keys, values = drawn(6, 32), drawn(6, 32, seed=1)
    with torch.no_grad():
        with capture(model, [MLP], "input", stop=False) as x, capture(model, [MLP], stop=False) as y:
            model(input_ids=ids)
        with Patch({MLP: Beside(keys, values)}).applied(model), capture(model, [MLP], stop=False) as seen:
            model(input_ids=ids)
    hidden = x[MLP].double() @ keys.double().T
    expected = y[MLP] + hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5)) @ values.double()
    torch.testing.assert_close(seen[MLP].double(), expected, rtol=1e-5, atol=1e-5)
    both = Beside(keys, values) + Beside(keys[:2], values[:2] * 2)
    x, y = drawn(2, 3, 32, seed=4), drawn(2, 3, 32, seed=5)
    apart = Beside(keys[:2], values[:2] * 2).output(x, Beside(keys, values).output(x, y))
    torch.testing.assert_close(both.output(x, y), apart)


def test_positions_that_are_looked_up(gpt2):
    model, _ = gpt2
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        with capture(model, [C_FC], "input", stop=False) as x:
            plain_logits = model(input_ids=ids).logits
        both = Patch({C_FC: entry(x[C_FC][0, 1], drawn(128), radius=1e-3)
                     + entry(x[C_FC][0, 3], drawn(128, seed=1), radius=1e-3)})
        masks = [torch.zeros(2, 6, dtype=torch.bool), torch.tensor([[True, False, False]] * 2)]
        with both.applied(model, masks):
            assert torch.equal(model(input_ids=ids).logits, plain_logits)      # none
            logits = model(input_ids=ids).logits                               # position 3, counted from the right
            with pytest.raises(ValueError, match="run more often than `positions` has masks"):
                model(input_ids=ids)
        assert torch.equal(logits[0, :3], plain_logits[0, :3]) and not torch.equal(logits[0, 3], plain_logits[0, 3])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("case", ["apart", "prefix"])
def test_ends_of_prompts_in_a_plan(case, gpt2):
    model, _ = gpt2
    lead = list(range(30, 50)) if case == "prefix" else []
    pairs = [(lead + [5, 6, 7], [8, 9]), (lead + [5, 6, 7], [10]), (lead + [11, 12], [13]), (lead + [14] * 6, [5, 6])]
    made = plan(model, pairs, max_tokens=8)
    assert len(made.batches) > 1 and bool(made.prefix.numel()) == (case == "prefix")
    found = {}
    for index, (prompt, _) in enumerate(pairs):
        with capture(model, [C_FC], "input") as x:
            run(model, input_ids=torch.tensor([prompt]))
        found[index] = x[C_FC][0]
    inside = Patch({C_FC: entry(found[3][-3], drawn(128), radius=1e-3)})       # not at a prompt's end
    at_end = Patch({C_FC: entry(found[0][-1], drawn(128), radius=1e-3)})
    base = read(model, made).logp
    with inside.applied(model, prompt_ends(made)):
        assert (read(model, made).logp == base).all()
    with inside.applied(model):
        assert abs(read(model, made).logp - base)[4:].max() > 1e-3
    with at_end.applied(model):
        everywhere = read(model, made).logp
    with at_end.applied(model, prompt_ends(made)):
        assert (read(model, made).logp == everywhere).all()
    assert (everywhere[3:] == base[3:]).all() and (everywhere[:3] != base[:3]).all()


def test_sums_sizes_and_kinds():
    a, b = Patch({C_FC: book(1, 1)}, {"editor": "x"}), Patch({MLP: Beside(drawn(2, 32), drawn(2, 32))})
    both = a + b
    assert set(both.parts) == {C_FC, MLP} and both.info == {"editor": "x"} and (Patch({}) + a).info == {"editor": "x"}
    values = torch.cat([book(1, 1).values.flatten(), drawn(2, 32).flatten()])
    assert both.norm() == pytest.approx(values.double().norm().item()) and both.norm(MLP) == pytest.approx(
        drawn(2, 32).norm().item()) and Patch({}).norm() == 0
    assert both.is_finite() and not Patch({MLP: Beside(drawn(2, 32) / 0, drawn(2, 32))}).is_finite()
    with pytest.raises(ValueError, match="c_fc has a part of another kind already"):
        a + Patch({C_FC: Beside(drawn(2, 32), drawn(2, 32))})


def test_files(tmp_path):
    both = Patch({C_FC: book(1, 0.5, -1e-5), MLP: Beside(drawn(2, 32), drawn(2, 32, seed=3))}, {"editor": "x", "n": 3})
    both.save(tmp_path / "p.safetensors")
    again = patches.load(tmp_path / "p.safetensors")
    assert again.info == both.info and list(again.parts) == list(both.parts)
    for name, part in both.parts.items():
        for key, value in vars(part).items():
            other = getattr(again.parts[name], key)
            assert torch.equal(other, value) if torch.is_tensor(value) else other == value
    with pytest.raises(FileNotFoundError, match="q.safetensors: no such file"):
        patches.load(tmp_path / "q.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"a": drawn(2)}, tmp_path / "other.safetensors", {"format": "another"})
    save_file({"a": drawn(2)}, tmp_path / "few.safetensors", {"format": "editcore-patch-1", "info": "{}",
                                                              "parts": json.dumps({"m": {"kind": "beside"}})})
    for name in ("text", "other", "few"):
        with pytest.raises(ValueError, match=f"{name}.safetensors: not a "):
            patches.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("family, name", [("gpt2", C_FC), ("gpt2", "transformer.h.1.mlp.c_proj"),
                                          ("llama", "model.layers.1.mlp.down_proj"),
                                          ("llama", "model.layers.1.mlp.up_proj")])
def test_hooks_go_even_after_an_error_and_what_does_not_fit_is_named(family, name):
    model = make(family, 50)
    weight = model.get_parameter(name + ".weight")
    inputs, outputs = weight.shape if family == "gpt2" else weight.shape[::-1]
    fits = Patch({name: entry(drawn(inputs), drawn(outputs))})
    with pytest.raises(RuntimeError), fits.applied(model):
        assert len(model.get_submodule(name)._forward_hooks) == 1
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.modules())
    for bad, words in ((Patch({name: entry(drawn(outputs + 1), drawn(inputs))}), "has other widths than"),
                       (Patch({"m": entry(drawn(2), drawn(2))}), "the model has no module m"),
                       (Patch({name: Beside(drawn(2, 7), drawn(2, 7))}), "has other widths than")):
        with pytest.raises(ValueError, match=words), (fits + bad if "m" in bad.parts else bad).applied(model):
            raise AssertionError
    assert not any(m._forward_hooks for m in model.modules())


def test_half_precision_models_and_tuple_outputs():
    model = make("gpt2", 50, dtype=torch.bfloat16)
    ids = torch.arange(5, 13).view(2, 4)
    with torch.no_grad():
        with capture(model, [C_FC], "input", stop=False) as x:
            before = model(input_ids=ids).logits
        with Patch({C_FC: entry(x[C_FC][0, 3].float(), drawn(128)), MLP: Beside(drawn(2, 32), torch.zeros(2, 32))}
                   ).applied(model):
            after = model(input_ids=ids).logits
    assert after.dtype == torch.bfloat16 and torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    hook = patches.part_hook(SimpleNamespace(output=lambda x, y, asked: y + 1), None)
    assert hook(None, (drawn(1, 2, 3),), (torch.zeros(1), "rest")) == (torch.ones(1), "rest")
