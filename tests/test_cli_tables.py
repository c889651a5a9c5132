"""Tables in memory; how they look in a terminal is in the commands' own tests."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from vllmproxy.cli import tables
from vllmproxy.cli.tables import Column, fit, pairs, table

NAMES = Column(title="NAME", cells=["alice", "bob"], folds=True)
NUMBERS = Column(title="N", cells=["1", "1,234,567"], number=True, total="1,234,568")


def test_numbers_stand_at_the_right_with_their_total_below() -> None:
    assert table([NAMES, NUMBERS]).splitlines() == [
        "NAME           N",
        "alice          1",
        "bob    1,234,567",
        "       1,234,568",
    ]


def test_markup_and_emoji_codes_are_text() -> None:
    assert "[bold]x[/] :smile:" in table([Column(title="NAME", cells=["[bold]x[/] :smile:"])])


def test_the_column_with_the_highest_rank_goes_first() -> None:
    columns = [
        NAMES,
        Column(title="A", cells=["a" * 20], rank=1),
        Column(title="B", cells=["b" * 20], rank=3),
        Column(title="C", cells=["c" * 20], rank=2),
        Column(title="EMPTY", cells=["", ""], rank=1),
    ]
    assert [[each.title for each in fit(columns, width)[0]] for width in (None, 71, 70, 48, 5)] == [
        ["NAME", "A", "B", "C"],
        ["NAME", "A", "B", "C"],
        ["NAME", "A", "C"],
        ["NAME", "A"],
        ["NAME"],
    ]
    assert fit(columns, 48)[1] == ["B", "C"]


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=60), min_size=1))
def test_a_table_has_the_width_of_its_terminal_and_all_that_is_in_it(cells: list[str]) -> None:
    columns = [
        Column(title="TEXT", cells=cells, folds=True),
        Column(title="N", cells=["1,234"] * len(cells), number=True),
    ]
    before, tables.terminal_width = tables.terminal_width, lambda: 30
    try:
        text = table(columns)
    finally:
        tables.terminal_width = before
    assert all(cell_len(line) <= 30 for line in text.splitlines())
    assert text.count("1,234") >= len(cells)
    folded = "".join(line[: -len("1,234")] if line.endswith("1,234") else line for line in text.splitlines()[1:])
    assert folded.replace(" ", "") == "".join(cells).replace(" ", "")


def test_pairs_leave_out_what_is_not_set_and_break_nothing() -> None:
    row = {"token": "a" * 200, "rpm_limit": 0, "tags": [], "ev\x1bil": "\x07"}
    assert pairs(row) == f"token      {'a' * 200}\nrpm_limit  0\nev\\x1bil   \\x07\n"
