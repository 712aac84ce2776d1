"""Give every setting of an editor a type with a range, and read values and words as such."""

from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError


def whole(least=0, most=10**9):
    """The type of an integer from `least` to `most`."""
    about = f"a whole number from {least} to {most}"
    return Annotated[int, BeforeValidator(_no_bool), Field(ge=least, le=most, description=about)]


def real(least=0, most=10**6):
    """The type of a number from `least` to `most`."""
    about = f"a number from {least} to {most}"
    return Annotated[float, BeforeValidator(_no_bool),
                     Field(ge=least, le=most, allow_inf_nan=False, description=about)]


def positive(most=10**6):
    """The type of a number above 0, and at most `most`."""
    about = f"a number above 0, at most {most}"
    return Annotated[float, BeforeValidator(_no_bool),
                     Field(gt=0, le=most, allow_inf_nan=False, description=about)]


def ascending(least=0):
    """The type of layers; below 0 they count from the last."""
    about = f"at least one whole number from {least} to 999, ascending"
    return Annotated[tuple[whole(least, 999), ...], AfterValidator(_ascending),
                     Field(min_length=1, description=about)]


def prompt():
    """The type of a prompt."""
    return Annotated[str, Field(pattern=r"\{\}", description='a text with "{}"')]


def read(value, kind, label):
    """`value` as the type of a setting; ValueError begins with `label` and says what may stand."""
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
    about = [part.description for part in getattr(kind, "__metadata__", ())
             if getattr(part, "description", None)]
    return about[0] if about else kind.__name__


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    return value


def _ascending(values):
    if list(values) != sorted(set(values)):
        raise ValueError("not ascending")
    return values
