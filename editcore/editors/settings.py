"""Give every setting of an editor a type with a range, and read values and words as such."""

from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError


def whole(least=0, most=10**9):
    """Return the type of an integer from `least` to `most`."""
    return _number(int, f"a whole number from {least} to {most}", ge=least, le=most)


def real(least=0, most=10**6):
    """Return the type of a number from `least` to `most`."""
    return _number(float, f"a number from {least} to {most}", ge=least, le=most,
                   allow_inf_nan=False)


def positive(most=10**6):
    """Return the type of a number above 0, and at most `most`."""
    return _number(float, f"a number above 0, at most {most}", gt=0, le=most, allow_inf_nan=False)


def ascending(least=0):
    """Return the type of layers; below 0 they count from the last."""
    about = f"at least one whole number from {least} to 999, ascending"
    return Annotated[tuple[whole(least, 999), ...], AfterValidator(_ascending),
                     Field(min_length=1, description=about)]


def prompt():
    """Return the type of a prompt."""
    return Annotated[str, Field(pattern=r"\{\}", description='a text with "{}"')]


def read(value, kind, label):
    """Read `value` as a setting's type; ValueError begins with `label` and says what may stand."""
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if tuple in (base, get_origin(base)):
        value = value.split(",") if isinstance(value, str) else value
        value = (value,) if isinstance(value, int) else value
    try:
        return TypeAdapter(kind).validate_python(value)
    except (ValidationError, OverflowError) as error:
        raise ValueError(f"{label} is {value!r}, but must be {_range(kind)}") from error


def _range(kind):
    """What a type allows, in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    about = (getattr(part, "description", None) for part in getattr(kind, "__metadata__", ()))
    return next(filter(None, about), None) or kind.__name__


def _number(kind, about, **limits):
    return Annotated[kind, BeforeValidator(_no_bool), Field(description=about, **limits)]


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    return value


def _ascending(values):
    if list(values) != sorted(set(values)):
        raise ValueError("not ascending")
    return values
