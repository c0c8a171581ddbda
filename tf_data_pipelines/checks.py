"""What every stage's settings share: checks of single values, and their dictionaries."""

import dataclasses
import math
from typing import Any, Self


def check_choice(name, value, choices):
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}."
        )


def check_positive(name, value, kind=(int, float), most=None):
    """Raise unless `value` is a finite number above zero, and at most `most`."""
    if not is_number(value, kind) or value <= 0 or (most is not None and value > most):
        limit = "" if most is None else f" up to {most:,}"
        raise ValueError(f"{name}={value!r} must be a positive number{limit}.")


def check_between(name, value, least, most, kind=(int, float)):
    """Raise unless `value` is a number from `least` to `most`, both included."""
    if not is_number(value, kind) or not least <= value <= most:
        what = "whole number" if kind is int else "number"
        limits = f"from {least:,} to {most:,}" if most < math.inf else f"of at least {least:,}"
        raise ValueError(f"{name}={value!r} must be a {what} {limits}.")


def is_number(value, kind):
    """Whether a value is a finite number of this type; bool is refused, though an int."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def check_flag(name, value):
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def checked_range(name, given, hint, *, least=-math.inf, most=math.inf):
    """(lowest, highest) as a tuple of two floats, or an empty tuple.

    Args:
        name: name of the setting, for the message.
        given: what came for it.
        hint: unit and example, for the message.
        least: smallest number that may come.
        most: largest number that may come.

    Raises:
        ValueError: `given` is neither empty nor two finite numbers in order within the limits.
    """
    try:
        pair = tuple(float(one) for one in given)
    except (TypeError, ValueError):
        pair = (math.nan,)
    in_order = len(pair) == 2 and least <= pair[0] <= pair[1] <= most
    if pair and not (in_order and all(map(math.isfinite, pair))):
        raise ValueError(f"{name}={given!r} must be two numbers, (lowest, highest) {hint}.")
    return pair


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of the frozen dataclasses of settings: to and from plain dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dump` takes and `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings with these values; an unknown name raises and lists the known ones."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is a {type(values).__name__}; expected a dictionary.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return cls(**values)
