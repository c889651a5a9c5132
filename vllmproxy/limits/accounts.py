"""What keys have spent of their budgets, and what requests under way hold of them: for one process, in its memory."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

from attrs import define

from vllmproxy.limits.values import BUDGETS, Ask, Rule
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account

#: Accounts that are kept although nobody uses them; they can be read again.
_MOST_IDLE: Final = 10_000


@define
class _Balance:
    """One key's account with what is held of it, in one period."""

    period: int
    spend: int = 0
    tokens: int = 0
    held: int = 0
    held_tokens: int = 0

    def begin(self, period: int) -> None:
        """Begin anew, unless it is that period already."""
        if period != self.period:
            self.period = period
            self.spend = self.tokens = self.held = self.held_tokens = 0

    def used(self, rule: Rule) -> int:
        if rule.kind == "budget":
            return self.spend + self.held
        return self.tokens + self.held_tokens

    def hold(self, rule: Rule, change: int) -> None:
        if rule.kind == "budget":
            self.held = max(0, self.held + change)
        else:
            self.held_tokens = max(0, self.held_tokens + change)


class Accounts:
    """Balances by token. A key's first comes from the store; see :meth:`open`."""

    def __init__(self) -> None:
        self._balances: OrderedDict[str, _Balance] = OrderedDict()
        #: How often something was added: who reads an account meanwhile has to read it again.
        self.changes = 0

    def __contains__(self, token: str) -> bool:
        return token in self._balances

    def open(self, token: str, account: Account) -> None:
        """Begin with what the store knows of a key, unless it is known here."""
        if token in self._balances:
            return
        if len(self._balances) >= _MOST_IDLE:
            self._drop_idle()  # before: this one is as idle as they are
        self._balances[token] = _Balance(account.period, account.spend, account.tokens)

    def left(self, token: str, rule: Rule) -> int:
        """Return what is left of the budget that ``rule`` is for; negative where more was spent."""
        balance = self._balances[token]
        self._balances.move_to_end(token)
        if rule.period > balance.period:
            balance.begin(rule.period)
        return rule.limit - balance.used(rule)

    def hold(self, token: str, rule: Rule, amount: int) -> None:
        """Hold that much. In a period that is over, nothing is held."""
        balance = self._balances[token]
        if balance.period == rule.period:
            balance.hold(rule, amount)

    def settle(self, token: str, rule: Rule, change: int) -> None:
        """Hold so much more, or less, in the same period."""
        balance = self._balances.get(token)
        if balance is not None and balance.period == rule.period:
            balance.hold(rule, change)

    def added(self, accounts: Mapping[str, Account], events: Sequence[UsageEvent] = ()) -> None:
        """The store has changed ``accounts``, to what they are now: what ``events`` held is spent. Without events they
        were set, which holds even for a period that is not the latest."""
        self.changes += 1
        for token, account in accounts.items():
            balance = self._balances.get(token)
            if balance is not None and (account.period >= balance.period or not events):
                balance.begin(account.period)
                balance.spend, balance.tokens = account.spend, account.tokens
                if not events and not account.spend and not account.tokens:  # it begins anew
                    balance.held = balance.held_tokens = 0
        for event in events:
            balance = self._balances.get(event.key)
            if balance is not None and balance.period == event.period:
                balance.held = max(0, balance.held - event.held)
                balance.held_tokens = max(0, balance.held_tokens - event.held_tokens)

    def forget(self, token: str) -> None:
        """The key is gone, or its account has come from elsewhere."""
        self.changes += 1
        self._balances.pop(token, None)

    def _drop_idle(self) -> None:
        for token, balance in self._balances.items():
            if not balance.held and not balance.held_tokens:
                del self._balances[token]
                return


def has_budget(ask: Ask) -> bool:
    """Tell whether an ask is for something of an account."""
    return any(rule.kind in BUDGETS for rule in ask.rules)
