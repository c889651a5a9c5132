"""What tokens and audio cost: a prices file as a value, and sums of money that no rounding goes astray in. Pure.

::

    [models."qwen2.5-7b-instruct"]
    input = 0.15            # currency per million prompt tokens
    cached_input = 0.05     # of which these were in the cache; as input where it is left out
    output = 0.60           # per million completion tokens; else nothing
    audio_second = 0.0001   # per second of audio; else nothing

    [models."*"]            # all others; without it they have no price
    input = 0.10

All is counted in whole numbers, money in micro-units: millionths of whatever currency the file is written in.
"""

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, Self

from attrs import frozen

#: The name that all models have which are not named.
OTHERS: Final = "*"

MICRO: Final = 10**6
#: The largest price, in currency: a token for a unit of it.
_MAXIMUM: Final = 10**6
#: Decimals that a price of a million tokens may have, and one of a second.
_TOKEN_DECIMALS: Final = 6
_AUDIO_DECIMALS: Final = 12
_NAMES: Final = {
    "input": _TOKEN_DECIMALS,
    "cached_input": _TOKEN_DECIMALS,
    "output": _TOKEN_DECIMALS,
    "audio_second": _AUDIO_DECIMALS,
}


@frozen(kw_only=True)
class Price:
    """What one model costs: micro-units per million tokens, and for ``audio_second`` per million seconds."""

    input: int
    cached_input: int
    output: int = 0
    audio_second: int = 0

    def cost(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int, audio_ms: int) -> int:
        """See :meth:`Prices.cost`."""
        cached = min(cached_tokens, prompt_tokens)
        tokens = (prompt_tokens - cached) * self.input + cached * self.cached_input + completion_tokens * self.output
        # Both over a milliard: tokens per million, audio per thousand milliseconds and million seconds.
        return -(-(tokens * 1000 + audio_ms * self.audio_second) // 10**9)


@frozen
class Prices:
    """The prices of models, by their names."""

    models: Mapping[str, Price]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the prices that a file says.

        :raises ValueError: says in one sentence what is wrong with it.
        """
        try:
            content = tomllib.loads(text, parse_float=Decimal)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the prices are not TOML that can be read: {error}") from None
        unknown = sorted(content.keys() - {"models"})
        if unknown:
            raise ValueError(f'the prices have {unknown[0]!r} at the top, where only [models."NAME"] may be')
        models = content.get("models")
        if not isinstance(models, dict) or not models:
            raise ValueError('the prices name no model: write [models."NAME"], and "*" for all others')
        return cls({name: _price(name, fields) for name, fields in models.items()})

    def cost(
        self, model: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int, audio_ms: int
    ) -> int | None:
        """Return what that costs in micro-units, rounded up once; ``None`` where the model has no price.

        :param cached_tokens: those of ``prompt_tokens`` that were in the cache.
        """
        price = self.models.get(model) or self.models.get(OTHERS)
        if price is None:
            return None
        return price.cost(prompt_tokens, completion_tokens, cached_tokens, audio_ms)


def _price(model: str, fields: Any) -> Price:
    where = f"the price of {model!r}"
    if not isinstance(fields, dict):
        raise ValueError(f'{where} must be a table: [models."{model}"]')
    unknown = sorted(fields.keys() - _NAMES.keys())
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r}, which is none of {', '.join(_NAMES)}")
    if "input" not in fields:
        raise ValueError(f"{where} has no input")
    values = {name: _micros(f"{where}: {name}", value, _NAMES[name]) for name, value in fields.items()}
    values.setdefault("cached_input", values["input"])
    return Price(**values)


def _micros(what: str, value: Any, decimals: int) -> int:
    """Return an amount of currency times 10 to the ``decimals``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | Decimal)
        or (isinstance(value, Decimal) and value.is_nan())
    ):
        raise ValueError(f"{what} must be a number")
    if not 0 <= value <= _MAXIMUM:
        raise ValueError(f"{what} must be from 0 to {_MAXIMUM}")
    exponent = value.as_tuple().exponent if isinstance(value, Decimal) else 0
    # Bounded before it is written out: 1e-999999999 is a short text and a long number.
    scaled = Fraction(value) * 10**decimals if isinstance(exponent, int) and exponent >= -40 else Fraction(1, 2)
    if scaled.denominator != 1:
        raise ValueError(f"{what} may have {decimals} decimals")
    return int(scaled)


def currency(micros: int) -> float:
    """Return micro-units as the number that is nearest to them in currency: it is written with 6 decimals at most."""
    return micros / MICRO


def micros_of(amount: float) -> int:
    """Return an amount of currency in micro-units, as it is written and rounded to the nearest."""
    return round(Decimal(repr(amount)) * MICRO)
