"""Take from the unedited model what edits need: context templates and second moments."""

from dataclasses import dataclass, field

from editcore import moments, templates
from editcore.editors.target_value import encode_facts, optimise
from editcore.model import in_out, module_of, name_of


@dataclass(frozen=True)
class EditorInputs:
    """Where an editor takes its context templates and second moments from."""

    texts: tuple = ()           # to count second moments on, if `moments` is None
    moments: object = None      # second moments (moments.Moments), or the path of their file
    contexts: tuple = ()        # context templates; empty: sampled from the model
    seed: int = 0               # of that sampling
    cache: str | None = None    # folder that keeps second moments by content; None: counted anew
    pilot: tuple = ()           # facts whose values set the norm of an editor with an anchor


@dataclass(frozen=True)
class Prepared:
    """What every edit of a run uses, taken from the unedited model once."""

    contexts: tuple             # context templates, "{}" first
    moments: moments.Moments    # second moments of every layer that is edited
    inverses: dict = field(default_factory=dict, repr=False)    # module -> closed_form.Inverse
    memory: dict = field(default_factory=dict)      # module -> closed_form.Memory of earlier keys
    anchor: float = 0.0         # norm that every v* is rescaled to; 0: none


def prepare_layers(model, tok, layers, inputs, config, site=None):
    """Return the Prepared of `layers`; config has context_groups, n_tokens and length.

    site: an EditSite if config.anchor asks for the mean norm of so many pilot facts' v* there, by
    the plain prompt alone and without the longest 5 %, as in NAS's public code. ValueError if
    moments, texts or pilot facts are missing, or a moment is not positive definite.
    """
    if inputs.contexts:
        contexts = templates.check(list(inputs.contexts))
    else:
        contexts = templates.sample(model, tok, config.context_groups, inputs.seed)
    second_moments = _second_moments(model, tok, layers, inputs, config)
    for layer in layers:
        second_moments.factor(name_of(model, "mlp_out", layer))
    if site is None or not config.anchor:
        return Prepared(contexts, second_moments)
    if not inputs.pilot:
        raise ValueError(f"anchor: up to {config.anchor} pilot facts are needed (in a run its "
                         "never-edited facts: untouched), but there are none")
    pilot = encode_facts(model, tok, [inputs.pilot[:config.anchor]], [("{}",)], config)
    values = optimise(model, pilot, site, config)
    norms = (values.mlp + values.delta).norm(dim=1).double().sort().values
    anchor = norms[:len(norms) - len(norms) // 20].mean().item()
    return Prepared(contexts, second_moments, anchor=anchor)


def _second_moments(model, tok, layers, inputs, config):
    if isinstance(inputs.moments, moments.Moments):
        return inputs.moments.check(model, tok, "moments")
    if inputs.moments is not None:
        return moments.load(inputs.moments).check(model, tok, inputs.moments)
    if not inputs.texts:
        wide, _ = in_out(module_of(model, "mlp_out", layers[0]))
        raise ValueError(f"second moments: give texts, or a file that `moments` writes; {wide} "
                         f"dimensions take some {max(20_000, 4 * wide):,} tokens of running text "
                         "like the model's own, as generate.own_texts writes")
    settings = moments.CountSettings(tokens=config.n_tokens, length=config.length)
    if inputs.cache is None:
        return moments.second_moments(model, tok, inputs.texts, layers, settings)
    return moments.cached(model, tok, inputs.texts, layers, inputs.cache, settings)
