"""Tables that fit their terminal: numbers never fold, and columns that have no room are left out by name."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import frozen
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllmproxy.cli.text import field_text, plain

#: What text that folds is given before other columns are: enough to read names by.
_COMFORTABLE: Final = 20
#: What it keeps when there is little room even so.
_NARROWEST: Final = 8
_GAP: Final = 2
#: For a file or a pipe: nothing is folded there.
_BOUNDLESS: Final = 100_000


@frozen(kw_only=True)
class Column:
    """One column, its cells as they are shown.

    :ivar folds: text that may take several lines.
    :ivar rank: 0 is always shown; of the others the highest is left out first, and all are when they are empty.
    :ivar total: what stands below it.
    """

    title: str
    cells: Sequence[str]
    number: bool = False
    folds: bool = False
    rank: int = 0
    total: str = ""

    @property
    def width(self) -> int:
        """The cells of a terminal that it needs unfolded."""
        return max(map(cell_len, (self.title, self.total, *self.cells)))

    def at_least(self, narrow: int) -> int:
        """Return the cells that it needs where text may be folded to ``narrow`` of them."""
        return min(self.width, max(narrow, cell_len(self.title))) if self.folds else self.width

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not any(self.cells)


def terminal_width() -> int | None:
    """Return the columns of the terminal on standard output, ``None`` where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fit(columns: Sequence[Column], width: int | None) -> tuple[list[Column], list[str]]:
    """Return the columns that are shown in ``width`` (``None``: there is no end of it), and the titles of those that
    have no room."""
    filled = [column for column in columns if column.rank == 0 or not column.is_empty]
    shown = list(filled)
    while width is not None and _needed(shown, _COMFORTABLE) > width and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    return shown, [column.title for column in filled if column not in shown]


def _needed(columns: Sequence[Column], narrow: int) -> int:
    return sum(column.at_least(narrow) for column in columns) + _GAP * (len(columns) - 1)


def table(columns: Sequence[Column], *, wide: bool = False) -> str:
    """Return the text of a table for standard output.

    :param wide: show every column, whatever the terminal's width.
    """
    width = None if wide else terminal_width()
    shown, dropped = fit(columns, width)
    made = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_footer=any(each.total for each in shown))
    for each in shown:
        made.add_column(
            Text(each.title),
            footer=Text(each.total, style="bold"),
            justify="right" if each.number else "left",
            no_wrap=not each.folds,
            overflow="fold",
            min_width=each.at_least(_NARROWEST),
        )
    for cells in zip(*(each.cells for each in shown), strict=True):
        made.add_row(*map(Text, cells))
    # Where even that is too much the terminal breaks the lines: rich would cut numbers.
    text = _rendered(made, _BOUNDLESS if width is None else max(width, _needed(shown, _NARROWEST)))
    if dropped:
        text += f"\nNo room for: {', '.join(dropped)} (--wide shows them).\n"
    return text


def _rendered(made: Table, width: int) -> str:
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(made)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def pairs(row: Mapping[str, Any]) -> str:
    """Return the fields of a row that are set, one a line. A long value is the terminal's to wrap, so that a hash is
    copied whole."""
    texts = {plain(name): field_text(name, value) for name, value in row.items()}
    width = max(map(cell_len, texts), default=0)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in texts.items() if text)
