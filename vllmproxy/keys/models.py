"""Which models a key may use, and what it calls them. Pure."""

from collections.abc import Mapping
from typing import Final

from attrs import field, frozen

#: LiteLLM's word for all of them.
ALL_MODELS: Final = "all-proxy-models"


@frozen
class Models:
    """A key's models.

    :ivar allowed: names, one trailing ``*`` allowed; empty: all.
    :ivar aliases: what the key calls a model → what vLLM calls it.
    """

    allowed: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(factory=dict)

    def resolve(self, model: str) -> str:
        """Return what vLLM calls ``model``."""
        return self.aliases.get(model, model)

    def allows(self, model: str) -> bool:
        """Tell whether a request may name ``model``: by that name, or as what it is an alias of."""
        if not self.allowed or ALL_MODELS in self.allowed:
            return True
        return any(self._names(name) for name in {model, self.resolve(model)})

    def _names(self, model: str) -> bool:
        if model in self.allowed:
            return True
        return any(name.endswith("*") and model.startswith(name[:-1]) for name in self.allowed)
