"""What an edit needs besides model and facts: where it comes from in, context templates and second moments out."""

from dataclasses import dataclass, field

from editcore import moments, templates


@dataclass(frozen=True)
class EditorInputs:
    """Where an editor takes its context templates and second moments from."""

    texts: tuple = ()           # texts for the second moments, used if `moments` is None
    moments: object = None      # second moments, or the path of their file
    contexts: tuple = ()        # context templates; empty: sampled from the model
    seed: int = 0               # of that sampling
    cache: str | None = None    # folder that keeps second moments by content; None: computed anew
    pilot: tuple = ()           # facts whose values set the norm of an editor with an anchor


@dataclass(frozen=True)
class Prepared:
    """Taken from the unedited model once, used for every edit of a run."""

    contexts: tuple             # "{}" first
    moments: object             # second moments of every layer that is edited
    memory: dict = field(default_factory=dict)          # module name -> solve.Memory of earlier updates' keys
    anchor: float = 0.0         # norm that every v* is rescaled to; 0: none
    brackets: dict = field(default_factory=dict, repr=False, compare=False)     # module name -> solve.Bracket


def prepare(model, tok, layers, sources, config):
    """Prepared for the second moments of `layers`; config has context_groups, n_tokens and length.

    ValueError if there are neither second moments nor texts, or a moment is missing or not positive definite.
    """
    names = [moments.name_of(model, "mlp_out", layer) for layer in layers]
    if sources.contexts:
        contexts = templates.check(list(sources.contexts))
    else:
        contexts = templates.sample(model, tok, config.context_groups, sources.seed)
    stats = _stats(model, tok, layers, sources, config)
    for name in names:
        stats.factor(name)
    return Prepared(contexts, stats)


def pilot(given, config):
    """The first config.anchor facts of the pilot, or all of a shorter one; ValueError if it is empty."""
    if not given.pilot:
        raise ValueError(f"anchor: up to {config.anchor} pilot facts are wanted, but there are none")
    return given.pilot[:config.anchor]


def mean_norm(values):
    """Mean ‖v*‖ of TargetValues, v* = h0 + δ."""
    return (values.h0 + values.delta).norm(dim=1).mean().item()


def _stats(model, tok, layers, sources, config):
    if isinstance(sources.moments, moments.Moments):
        return sources.moments
    if sources.moments is not None:
        return moments.load(sources.moments)
    if not sources.texts:
        raise ValueError("second moments: give texts to compute them from, or a statistics file")
    how = moments.CountSettings(tokens=config.n_tokens, length=config.length)
    if sources.cache is None:
        return moments.second_moments(model, tok, sources.texts, layers, how)
    return moments.cached(model, tok, sources.texts, layers, sources.cache, how)
