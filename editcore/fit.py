"""Check that a model works as its line in LAYOUTS lets editors suppose: on a short text, once."""

import torch

from editcore.hooks import capture, first, replaced
from editcore.likelihood import enter
from editcore.model import module_of, n_layers, name_of
from editcore.suffix import head, resume, start

TEXT = "The old river runs to the sea, and"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def check(model, tok):
    """ValueError if the model's parts do not act as editors suppose; three passes of a few tokens.

    Logits from `suffix` are the model's own; what is added to the output of a layer's MLP is added
    to the output of its block; and no captured tensor is changed afterwards.
    """
    kind = model.config.model_type
    limit = TOLERANCE.get(model.dtype, 0.05)
    ids = torch.tensor([tok(TEXT)["input_ids"][:12]], device=model.device)
    if (error := logit_error(model, ids)) > limit:
        raise ValueError(f"architecture {kind!r} does not fit: the logits that editors compute "
                         f"differ from the model's by {error:.0%}")
    for layer, error in enumerate(nudge_errors(model, ids)):
        if error > limit:
            raise ValueError(f"architecture {kind!r} does not fit: what is added to the MLP's "
                             f"output in layer {layer} moves the block's by something else "
                             f"({error:.0%} off)")


def logit_error(model, ids):
    """Return the largest difference of logits by `suffix` from the model's, relative."""
    logits = model(input_ids=ids, use_cache=False).logits[0]    # (T, V)
    places = sorted({ids.shape[1] // 2, ids.shape[1] - 1})
    begin = torch.tensor([places[0]], device=ids.device)
    wanted = torch.tensor([places], device=ids.device) - begin
    state = start(model, ids, torch.ones_like(ids), begin=begin, layer=0, wanted=wanted)
    tail = head(model, resume(model, state, state.hidden))[0]
    return _off(tail - logits[places], logits)


def nudge_errors(model, ids):
    """Yield for each layer how far its block's output is from moving by what its MLP's moves.

    Relative to the nudge; 1 where the captured output of the MLP's last map is not what that gives.
    """
    inputs = enter(model, ids, 0)
    hidden = inputs.hidden
    for layer, words in zip(range(n_layers(model)), inputs.calls):
        block = module_of(model, "block", layer)
        name = name_of(model, "mlp_out", layer)
        with capture(model, [name], "input", stop=False) as keys, \
                capture(model, [name], stop=False) as values:
            before = first(block(hidden, **words))
        again = module_of(model, "mlp_out", layer)(keys[name])
        intact = torch.allclose(values[name], again, rtol=1e-2, atol=1e-2 * again.std().item())
        nudge = torch.zeros_like(before)
        nudge[:, -1] = before[:, -1].roll(1, -1)
        with replaced(model, name, lambda output, nudge=nudge: output + nudge):
            after = first(block(hidden, **words))
        yield _off((after - before - nudge)[:, -1], nudge[:, -1]) if intact else 1.0
        hidden = before


def _off(difference, size):
    """‖difference‖ / ‖size‖ as a number; infinite where either is NaN."""
    ratio = difference.double().norm() / size.double().norm()
    return ratio.nan_to_num(float("inf")).item()
