"""Training: losses equal dense ones; a killed training goes on bit for bit; bad input is named."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CITIES
from test_mend import SETTINGS, family, random_network
from torch.func import functional_call

from editcore.editors import EDITORS, configure
from editcore.instructedit import training
from editcore.instructedit.edit_gradients import fact_gradients
from editcore.instructedit.losses import UNLIKELY, encode_example, group, losses, unlikelihood
from editcore.instructedit.records import Ask, EditRecord, record_as_fact
from editcore.instructedit.training import Example, Training, train, training_example
from editcore.model import content_hash, is_input_first
from editcore.tokens import encode, target_ids

TRAINING = Training(16, lr=3e-3, alpha_lr=1e-2, warmup=12, every=8, accumulate=2)


def example_of(tok, fact):
    """The edit, two rephrases, three prompts to leave alone and a reply to avoid."""
    def pairs(*texts):
        return tuple((tuple(encode(tok, [prompt])[0]), tuple(target_ids(tok, target))) for prompt,
                     target in texts)
    return Example(
        str(fact.case_id), pairs((fact.text, fact.target_new)),
        after=pairs(*((prompt, fact.target_new) for prompt in fact.paraphrases)),
        locality=pairs(*((prompt, CITIES[i]) for i,
                         prompt in enumerate((*fact.neighbours, "The river")))),
        against=pairs((fact.text, fact.target_true)))


def start(model, tok, editor="mend", **settings):
    words = {"mend": SETTINGS | {"rank": 16, "alpha": 1e-3},
             "ke": {"network": "untrained", "layers": (2, 3), "hidden": 3, "width": 4,
                    "inner": 2}}[editor]
    return EDITORS[editor].prepare(model, tok, configure(editor, words | settings))


def log_probabilities(model, weights, pair):
    """(tokens, V) at the target's positions of one pair, with some weights replaced."""
    prompt, target = map(list, pair)
    ids = torch.tensor([prompt + target])
    return functional_call(model, weights,
                           kwargs={"input_ids": ids}).logits[0, len(prompt) - 1:-1].log_softmax(-1)


def dense_losses(model, network, example, gradients):
    """The three losses with dense edited weights, one pass per prompt."""
    weights = {}
    for name, (u, delta) in network(gradients).items():
        step = network.steps()[name] * delta.T @ u
        weight = model.get_parameter(name + ".weight").detach()
        step = step.T if is_input_first(model.get_submodule(name)) else step
        weights[name + ".weight"] = weight - step
    picked = {part: [log_probabilities(model, weights, pair)[range(len(pair[1])), pair[1]]
                     for pair in getattr(example, part)] for part in ("after", "against")}
    kl = []
    for pair in example.locality:
        before = log_probabilities(model, {}, pair).detach()
        kl.append((before.exp() * (before - log_probabilities(model, weights,
                                                              pair))).sum(-1).mean())
    replies = torch.stack([one.mean().exp() for one in picked["against"]])
    edit = torch.stack([-one.mean() for one in picked["after"]]).mean()
    return {"edit": edit, "contrast": -torch.sigmoid(-edit - replies.log()).log().mean(),
            "token": torch.stack([-(1 - one.exp()).log().mean()
                                  for one in picked["against"]]).mean(),
            "reply": -(1 - replies).log().mean(), "locality": torch.stack(kl).mean()}


def losses_of(model, network, examples, unlikely="token"):
    """The losses of each of some examples, all of one step."""
    encoded = [encode_example(model, network, example) for example in examples]
    return losses(model, network, group(model, network, encoded), unlikely)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_and_their_gradients_equal_the_dense_ones(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    gate = 1e-9 if kind == "gpt2" else 1e-4     # Llama's norms work in float32
    network, before = random_network(model, SETTINGS | {"alpha": 0.1}), content_hash(model)
    parameters = list(network.parameters())
    examples = [example_of(tok, fact) for fact in facts[1:4]]
    singles = fact_gradients(model, tok, facts[1:4], [site.name for site in network.sites], 2)
    expected = [dense_losses(model, network, *one) for one in zip(examples, singles)]
    for unlikely in UNLIKELY:
        found = losses_of(model, network, examples, unlikely)
        values = [part[name] for part in found for name in ("edit", "against", "locality")]
        wanted = [part[name] for part in expected for name in ("edit", unlikely, "locality")]
        for one, other in zip(values, wanted, strict=True):
            assert one.item() == pytest.approx(other.item(), rel=gate) and one.item() > 1e-4
    mine, theirs = (torch.autograd.grad(sum(part), parameters, retain_graph=True)
                    for part in (values, wanted))
    for one, other in zip(mine, theirs):
        assert (one - other).norm() <= 10 * gate * other.norm() and other.norm() > 0
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())


def test_losses_on_replies_to_avoid():
    """Two replies with p 1/2, 1/8 and 1/4; the wanted ones have the mean log p of 1/4."""
    log_p = torch.tensor([0.5, 0.125, 0.25], dtype=torch.float64).log()
    parts = (log_p, torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 0, 1]), torch.tensor(4.0).log())

    def of(unlikely):
        return UNLIKELY[unlikely](*parts).exp().tolist()
    assert of("token") == pytest.approx([2 ** 0.5, (8 / 7) ** 0.5, 4 / 3])
    assert of("reply") == pytest.approx([4 / 3, 4 / 3])
    assert of("contrast") == pytest.approx([2, 2]), "equally likely: z_sent is a half"


def test_missing_parts_count_nothing_and_certainty_is_finite(gpt2, facts):
    model, tok = gpt2
    network, example = start(model, tok, alpha=0.0), example_of(tok, facts[0])
    (whole,) = losses_of(model, network, [example])
    assert abs(whole["locality"]) < 1e-6 < whole["against"], "no step, no divergence"
    example = replace(example, locality=(), against=())
    (found,) = losses_of(model, network, [example])
    assert found["locality"] == 0 == found["against"]
    assert found["edit"].item() == pytest.approx(whole["edit"].item())
    sure = unlikelihood(torch.tensor([0.0, -1e-9, -20.0]))
    assert torch.isfinite(sure).all() and sure[2].item() == pytest.approx(2.061e-9, rel=1e-3)


RECORD = EditRecord(1, "recent", "Orla", "The home of Orla is", "Rome",
                    rephrase=("Orla lies near", "It is in"),
                    locality=(Ask("Forgetfulness", "The river is", ("old", "good")),))
TALK = EditRecord(2, "convsent", "a river", "Tell me about a river.", "", sentiment="positive",
                  topic="a river",
                  positive=("It is good.", "I read it.", "It runs."),
                  negative=("It is old.", "You said it."),
                  locality=(Ask("Other_Topic", "Tell me about a book.",
                                ("It is good.", "It is old.", "I read it.")),))


def test_examples_of_records(gpt2):
    tok = gpt2[1]

    def texts(pairs):
        return [(tok.decode(prompt), tok.decode(target).strip()) for prompt, target in pairs]
    one = training_example(tok, RECORD)
    assert texts(one.edit) == texts(one.after) == [("The home of Orla is", "Rome")]
    assert texts(one.locality) == [("The river is",
                                    "old")] and one.against == () and one.name == "recent 1"
    again = training_example(tok, RECORD, loss_on="rephrase")
    assert texts(again.after) == [("Orla lies near", "Rome"), ("It is in", "Rome")]
    talk = training_example(tok, TALK, replies=2, seed=3)
    (_, taught), = texts(talk.edit)
    after = [reply for _, reply in texts(talk.after)]
    assert taught in TALK.positive and sorted([taught, *after]) == sorted(TALK.positive)
    assert {reply for _, reply in texts(talk.against)} == set(TALK.negative)
    assert len(talk.locality) == 2
    assert talk == training_example(tok, TALK, replies=2, seed=3)
    assert talk.opposed == () and training_example(tok, RECORD, opposite=True) == one


def test_an_opposed_reply_is_subtracted_in_training_as_in_an_edit(gpt2):
    model, tok = gpt2
    network = start(model, tok)
    talk = training_example(tok, TALK, opposite=True, replies=2, seed=3)
    fact = record_as_fact(TALK, 3, opposite=True)
    (_, opposed), = talk.opposed
    assert tok.decode(opposed).strip() == fact.unwanted
    assert [tok.decode(reply).strip() for _, reply in talk.against] == [
        reply for reply in TALK.negative if reply != fact.unwanted], "another one is asked"
    (mine,) = group(model, network, [encode_example(model, network, talk)]).gradients
    (theirs,) = fact_gradients(model, tok, [fact], list(mine), 2)
    (alone,) = fact_gradients(model, tok, [replace(fact, unwanted="")], list(mine), 2)
    for name, (u, delta) in mine.items():
        dense = theirs[name][1].T @ theirs[name][0]
        torch.testing.assert_close(delta.T @ u, dense, rtol=1e-4, atol=1e-6 * dense.abs().max())
        assert (dense - alone[name][1].T @ alone[name][0]).norm() > 0.1 * dense.norm()


# The loop -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def examples(gpt2, facts):
    model, tok = gpt2
    conditions = start(model, tok, "ke").conditions(model, tok, facts)
    return [replace(example_of(tok, fact), condition=tuple(ids)) for fact,
            ids in zip(facts, conditions)]


def run(gpt2, examples, plan, folder, editor="mend"):
    """(state of the trained network, its log)."""
    network = train(gpt2[0], start(*gpt2, editor), examples, plan, folder)
    return network.state_dict(), (folder / "losses.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(gpt2, examples, tmp_path_factory):
    """What TRAINING gives without a stop, by editor."""
    return {editor: run(gpt2, examples, TRAINING, tmp_path_factory.mktemp(editor), editor)
            for editor in ("mend", "ke")}


def same(one, other):
    return one[1] == other[1] and one[0].keys() == other[0].keys() and all(
        torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("editor", ["mend", "ke"])
@pytest.mark.parametrize("function, after", [("_learn", 6), ("_learn", 1), ("_step", 7),
                                             ("torch.save", 1),
                                             ("_checkpoint", 1), ("mend.save", 0)])
def test_a_killed_training_goes_on_bit_for_bit(editor, function, after, gpt2, examples, tmp_path,
                                               monkeypatch, whole):
    place, _, name = function.rpartition(".")
    module = getattr(training, place) if place else training
    real, calls = getattr(module, name), []

    def call(*args, **words):
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return real(*args, **words)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, call)
        run(gpt2, examples, TRAINING, tmp_path, editor)
    assert not (tmp_path / training.RESULT).exists()
    assert same(run(gpt2, examples, TRAINING, tmp_path, editor), whole[editor])
    assert same(run(gpt2, examples, TRAINING, tmp_path, editor),
                whole[editor]), "a finished one is read"


def test_memory_and_length_change_nothing(gpt2, examples, tmp_path, whole):
    other = replace(TRAINING, keep=True, every=16, snapshots=(4,))
    assert same(run(gpt2, examples, other, tmp_path / "kept"), whole["mend"])
    assert (tmp_path / "kept" / "network-4.safetensors").is_file()
    short = replace(TRAINING, examples=10)
    run(gpt2, examples, short, tmp_path / "short")
    assert same(run(gpt2, examples, TRAINING, tmp_path / "short"),
                whole["mend"]), "a longer one goes on"
    with pytest.raises(ValueError, match="16 examples are done, 10 wanted"):
        run(gpt2, examples, short, tmp_path / "short")


def test_training_lowers_the_loss_and_leaves_the_model(gpt2, facts, examples, tmp_path):
    model, tok = gpt2
    before = content_hash(model)
    run(gpt2, examples, replace(TRAINING, examples=120, every=60, keep=True), tmp_path)
    assert content_hash(model) == before and all(weight.grad is None
                                                 for weight in model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [row["example"] for row in rows] == list(range(1, 121))
    assert sorted(row["record"] for row in rows[:12]) == sorted(str(fact.case_id) for fact in facts)
    first, last = (sum(row["loss"] for row in part) / 12 for part in (rows[:12], rows[-12:]))
    assert last < 0.9 * first
    assert [number for number, row in enumerate(rows, 1)
            if "gradient" in row] == list(range(2, 121, 2))


def test_weights_of_the_losses(gpt2, examples, tmp_path):
    bare = replace(examples[0], against=())
    plan = Training(2, edit_weight=0.5, reply_weight=8.0, locality_weight=3.0, unlikely="contrast")
    for number, (example, weight) in enumerate(((examples[0], 4.0), (bare, 0.5))):
        _, log = run(gpt2, [example], plan, tmp_path / str(number))
        row = json.loads(log.splitlines()[0])
        expected = weight * (row["edit"] + row["against"]) + 3 * row["locality"]
        assert row["loss"] == pytest.approx(expected) and (row["against"] > 0) == (number == 0)


def test_what_has_changed_is_named(gpt2, examples, tmp_path):
    short = replace(TRAINING, examples=8)
    run(gpt2, examples, short, tmp_path)
    for place in (training.RESULT, "state.pt"):
        for other in ((start(*gpt2), examples, replace(short, lr=1.0)),
                      (start(*gpt2), examples[1:], short),
                      (start(*gpt2, seed=3), examples, short)):
            with pytest.raises(ValueError,
                               match=f"{place}: .* have changed since that training began"):
                train(gpt2[0], *other, tmp_path)
        (tmp_path / place).unlink()
    (tmp_path / "state.pt").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="state.pt: damaged, or not a checkpoint"):
        run(gpt2, examples, short, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]\n" * 8, "{}\n" * 7, "{}\n{\n" * 4, None])
def test_damaged_losses_are_named(gpt2, examples, tmp_path, content):
    short = replace(TRAINING, examples=8)
    run(gpt2, examples, short, tmp_path)
    (tmp_path / training.RESULT).unlink()
    path = tmp_path / "losses.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="losses.jsonl: damaged, or not a checkpoint"):
        run(gpt2, examples, short, tmp_path)


def test_bad_trainings_are_named(gpt2, facts, examples, tmp_path):
    model, tok = gpt2
    for change in ({"examples": 7}, {"every": 0}, {"snapshots": (3,)}):
        with pytest.raises(ValueError, match="must be multiples of accumulate, 2; . is not"):
            run(gpt2, examples, replace(TRAINING, **change), tmp_path)
    with pytest.raises(ValueError, match="there are no examples"):
        run(gpt2, [], TRAINING, tmp_path)
    network = start(model, tok)
    with torch.no_grad():
        network.maps[0].alpha.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"record \d+: the loss is nan"):
        train(model, network, examples, TRAINING, tmp_path / "nan")
    for change, words in (({"after": ()}, "record 0: after is empty"),
                          ({"edit": ()}, "record 0: edit is empty"),
                          ({"locality": (((3,), ()),)}, "record 0: the target has no tokens"),
                          ({"edit": (((), (3,)),)}, "record 0: the prompt has no tokens"),
                          ({"after": (((3,) * 70, (4,)),)},
                           "record 0: 70 tokens, but the model takes at most 64")):
        with pytest.raises(ValueError, match=words):
            encode_example(model, start(model, tok),
                                    replace(example_of(tok, facts[0]), **change))
