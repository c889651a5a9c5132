"""The Markdown of ``compare.py``, made from what ``results.json`` holds. Pure."""

from collections.abc import Iterable, Iterator, Sequence

from _rows import ALL_ON, GROWTH, ON, ROWS, Bar, Results, Row

TITLES = {
    "direct": "direct",
    "nginx": "nginx",
    "vllm-router": "vllm-router",
    "vllm-router-default": "vllm-router, default policy",
    "litellm": "LiteLLM",
    "bare": "bare Twisted",
    "vllmproxy-off": "vllmproxy, all off",
    ON: ALL_ON,
}
_PEERS = ("nginx", "vllm-router", "vllm-router-default", "litellm")
#: Bars are for the router with its cheapest policy; whether they would be met beside the one that it starts with is
#: said, too.
_ALSO = {"vllm-router": "vllm-router-default"}
#: Share of a core from which on it counts as full.
_FULL = 0.95
_NOTHING = "\N{EN DASH}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_LOAD_IS_FULL = "†"
_NONE_IS_FULL = "‡"


def report(results: Results) -> str:
    """Return all tables, with what they need to be understood."""
    parts = [_environment(results), "## Bars", bars(results)]
    if any(row.measure in results["figures"] for row in ROWS):
        parts += ["## Figures", figures(results), *_notes(results)]
    parts += [*_growth(results), *_cores(results), *_left_out(results)]
    return "\n\n".join(parts) + "\n"


def _environment(results: Results) -> str:
    said = results["environment"]
    first = ", ".join(
        f"{name} {said[name]}" for name in said if name not in {"date", "commit", "machine", "took", "rounds"}
    )
    quick = " **A quick run: it shows that all of it works, and its figures mean little.**" if results["quick"] else ""
    return (
        f"{said['date']}, commit {said['commit']}, {said['machine']}; {first}. "
        f"Medians of {said['rounds']} round{'s' * (said['rounds'] != '1')}; it took {said['took']}.{quick}"
    )


def bars(results: Results) -> str:
    """Return the table of what is asked and whether it is met; the ratios are to the peers of the same run."""
    head = ["what", "vllmproxy, all on", *(f"÷ {TITLES[peer]}" for peer in _PEERS), "bar", "met", "beside its default"]
    lines = []
    for row in ROWS + GROWTH:
        if row.measure not in results["figures"].keys() | results["left out"].keys():
            continue
        value = row.value(results, row.whose)
        for bar in row.bars:
            if value is None:
                lines.append([row.what, _NOTHING, *("" for _ in _PEERS), _asked(bar), "not measured", ""])
                continue
            ratios = [_ratio(value, row, results, peer) for peer in _PEERS]
            times = row.ratio(results, row.whose, bar.of) if row in GROWTH and bar.of else None
            other = (row.value(results, bar.of) if times is None else value / times) if bar.of else None
            met, also = _met(bar, value, other), ""
            if bar.of in _ALSO:
                also = _met(bar, value, row.value(results, _ALSO[bar.of]))
            found = number(value) + mark(results, row, row.whose) + _between(row.spread(results, row.whose))
            if times is not None:
                found += f"; {times:.2f} {_TIMES}"
            lines.append([row.what, found, *ratios, _asked(bar), met, also])
    return _table(head, lines)


def _met(bar: Bar, value: float, other: float | None) -> str:
    return {True: "yes", False: "**no**", None: "not measured"}[bar.is_met(value, other)]


def _between(spread: tuple[float, float] | None) -> str:
    return "" if spread is None else f" ({number(spread[0])} to {number(spread[1])})"


def _asked(bar: Bar) -> str:
    sign = "≥" if bar.least else "≤"
    return f"{sign} {bar.limit:g} {_TIMES} {TITLES.get(bar.of, bar.of)}" if bar.of else f"{sign} {bar.limit:,g}"


def figures(results: Results) -> str:
    """Return every figure of every contestant."""
    names = [name for name in TITLES if name in results["contestants"]]
    lines = []
    for row in ROWS:
        if row.measure in results["figures"]:
            cells = [_cell(results, row, name) for name in names]
            lines.append([row.what, *cells])
    return _table(["", *(TITLES[name] for name in names)], lines)


def _cell(results: Results, row: Row, name: str) -> str:
    value = row.value(results, name)
    if value is None or (row.figure == "redis cpu" and name != ON) or (row.figure == "cpu" and name == "direct"):
        return _NOTHING
    return number(value) + mark(results, row, name)


def mark(results: Results, row: Row, name: str) -> str:
    """Return the sign of the note on whether the proxy was the limit."""
    if not row.limited:
        return ""
    proxy, load = (Row("", row.measure, figure).value(results, name) for figure in ("proxy core", "load core"))
    if proxy is None or load is None or proxy >= _FULL:
        return ""
    return f" {_LOAD_IS_FULL}" if load >= _FULL else f" {_NONE_IS_FULL}"


def _notes(results: Results) -> Iterator[str]:
    marks = {mark(results, row, name).strip() for row in ROWS for name in results["contestants"]}
    if _LOAD_IS_FULL in marks:
        yield (
            f"{_LOAD_IS_FULL} The load generator, the upstream and Redis had their core full and the proxy had not: it "
            "could do more. For direct it is their own ceiling."
        )
    if _NONE_IS_FULL in marks:
        yield (
            f"{_NONE_IS_FULL} Neither core was full: something else ran on this machine, or the contestant waited. The "
            "rate is too low."
        )


def _growth(results: Results) -> Iterator[str]:
    """Yield a table for each measure of everything on that has variants of its own."""
    shown: dict[tuple[str, str], Row] = {}
    for row in GROWTH:
        if row.measure in results["figures"]:
            shown.setdefault((row.measure, row.figure), row)  # several rows may be bars for one figure
    measured = list(shown.values())
    if measured:
        yield "## As work grows"
    for names in dict.fromkeys(tuple(results["figures"][row.measure]) for row in measured):
        rows = [row for row in measured if tuple(results["figures"][row.measure]) == names]
        yield _table(["", *names], ([row.what, *(_cell_of(results, row, name) for name in names)] for row in rows))


def _cell_of(results: Results, row: Row, name: str) -> str:
    value = row.value(results, name)
    return _NOTHING if value is None else number(value)


def _cores(results: Results) -> Iterator[str]:
    """Yield how full the proxy's core was, and the other, in percent."""
    names = [name for name in TITLES if name in results["contestants"]]
    lines = []
    for measure, found in results["figures"].items():
        if any("proxy core" in figures for figures in found.values()) and names[0] in found:
            lines.append([measure, *(_shares(results, measure, name) for name in names)])
    if lines:
        yield "## How busy the cores were"
        yield _table(["proxy's core / the other, %", *(TITLES[name] for name in names)], lines)


def _shares(results: Results, measure: str, name: str) -> str:
    shares = [Row("", measure, figure).value(results, name) for figure in ("proxy core", "load core")]
    return _NOTHING if None in shares else " / ".join(f"{100 * share:.0f}" for share in shares if share is not None)


def _left_out(results: Results) -> Iterator[str]:
    lines = [f"- {TITLES[name]}: {reason}." for name, reason in results["missing"].items()]
    for measure, names in results["left out"].items():
        lines += [f"- {measure}, {TITLES.get(name, name)}: {reason}." for name, reason in names.items()]
    if lines:
        yield "## Left out, or tried again"
        yield "\n".join(lines)


def number(value: float) -> str:
    """Return a figure with three digits that count."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _ratio(value: float, row: Row, results: Results, peer: str) -> str:
    """Return how many times the peer's figure it is; nothing for growth, which should be about none."""
    other = row.value(results, peer)
    if not other or other <= 0 or row.figure == "growth":
        return ""
    times = value / other
    return (f"{times:.2f}" if times >= 0.1 else f"1/{1 / times:.0f}") + mark(results, row, peer)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
