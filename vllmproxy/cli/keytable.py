"""The table of keys."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from vllmproxy.cli.tables import Column, table
from vllmproxy.cli.text import field_text, moment, money, status_of, whole_number


def key_table(rows: Sequence[dict[str, Any]], now: datetime, *, wide: bool) -> str:
    """Return the table of ``rows``; ``now`` decides which of them have expired."""

    def cells(show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [show(row) for row in rows]

    def texts(name: str) -> list[str]:
        return cells(lambda row: field_text(name, row.get(name)))

    def numbers(name: str) -> list[str]:
        return cells(lambda row: whole_number(row.get(name)))

    def times(name: str) -> list[str]:
        return cells(lambda row: moment(row.get(name)))

    columns = [
        Column(title="ALIAS", cells=[alias or "-" for alias in texts("key_alias")], folds=True),
        Column(title="KEY", cells=texts("key_name")),
        Column(title="STATUS", cells=cells(lambda row: status_of(row, now))),
        Column(title="TYPE", cells=cells(_type), rank=6),
        Column(title="EXPIRES (UTC)", cells=times("expires"), rank=1),
        Column(title="RPM", cells=numbers("rpm_limit"), number=True, rank=2),
        Column(title="TPM", cells=numbers("tpm_limit"), number=True, rank=2),
        Column(title="PARALLEL", cells=numbers("max_parallel_requests"), number=True, rank=4),
        Column(title="SPEND", cells=cells(_spend), number=True, rank=3),
        Column(title="BUDGET", cells=cells(lambda row: money(row.get("max_budget"))), number=True, rank=3),
        Column(title="TOKENS LEFT", cells=cells(_tokens_left), number=True, rank=3),
        Column(title="USER", cells=texts("user_id"), folds=True, rank=7),
        Column(title="TEAM", cells=texts("team_id"), folds=True, rank=7),
        Column(title="MODELS", cells=texts("models"), folds=True, rank=8),
    ]
    if wide:
        columns += [
            Column(title="CREATED (UTC)", cells=times("created_at")),
            Column(title="HASH", cells=texts("token")),
        ]
    return table(columns, wide=wide)


def _type(row: dict[str, Any]) -> str:
    """Return the key's type where it is worth a column."""
    return "" if row.get("key_type") == "default" else field_text("key_type", row.get("key_type"))


def _tokens_left(row: dict[str, Any]) -> str:
    """Return what is left of a budget of tokens."""
    budget, spent = row.get("max_budget_tokens"), row.get("spend_tokens")
    if not isinstance(budget, int) or not isinstance(spent, int):
        return ""
    return whole_number(max(0, budget - spent))


def _spend(row: dict[str, Any]) -> str:
    return money(row["spend"]) if row.get("spend") or row.get("max_budget") is not None else ""
