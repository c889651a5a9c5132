"""What the compiled build makes of a module: values that attrs makes, written out, are the same values."""

import inspect
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from hatch_build import _missing, written_out  # noqa: E402  # the build's, and in no package

BUILD = tomllib.loads(CHECKOUT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
FOLDERS = BUILD["targets"]["wheel"]["hooks"]["custom"]["modules"]
MODULES = [f"{folder}/{name}.py" for folder, names in FOLDERS.items() for name in names]


class Blank:
    """Something that equals itself only."""


def imported(path: str) -> ModuleType:
    return import_module(path.removesuffix(".py").replace("/", "."))


def written_module(path: str) -> ModuleType:
    """Return the module as the build writes it out, interpreted."""
    module = ModuleType(imported(path).__name__)
    exec(compile(written_out(CHECKOUT.joinpath(path).read_text(encoding="utf-8")), path, "exec"), module.__dict__)
    return module


def values() -> Iterator[Any]:
    for path in MODULES:
        made = imported(path)
        for name, value in vars(made).items():
            if isinstance(value, type) and attrs.has(value) and value.__module__ == made.__name__:
                yield pytest.param(path, name, id=f"{made.__name__}.{name}")


def both(path: str, name: str) -> tuple[type, type]:
    return getattr(imported(path), name), getattr(written_module(path), name)


def filled(of: type, names: list[str], values: dict[str, object]) -> Any:
    """Return an instance whose constructor was not asked: some look at what they are given."""
    value = object.__new__(of)
    for each in names:
        object.__setattr__(value, each, values[each])
    return value


@pytest.mark.parametrize(("path", "name"), [*values()])
def test_a_value_is_made_from_the_same_arguments(path: str, name: str) -> None:
    made, written = both(path, name)
    assert not attrs.has(written)
    ours, theirs = (list(inspect.signature(each).parameters.values()) for each in (written, made))
    assert [(each.name, each.kind) for each in ours] == [(each.name, each.kind) for each in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        if its.default is attrs.NOTHING:  # attrs' own mark of a factory
            assert mine.default is None
        else:
            assert repr(mine.default) == repr(its.default)


@pytest.mark.parametrize(("path", "name"), [*values()])
def test_a_value_is_equal_to_what_attrs_would_have_equal(path: str, name: str) -> None:
    made, written = both(path, name)
    fields = attrs.fields(made)
    names = [each.name for each in fields]
    values: dict[str, object] = {each: Blank() for each in names}
    assert (filled(written, names, values) == filled(written, names, values)) == (
        filled(made, names, values) == filled(made, names, values)
    )
    for each in names:
        others = {**values, each: Blank()}
        assert (filled(written, names, values) == filled(written, names, others)) == (
            filled(made, names, values) == filled(made, names, others)
        )
    assert (written.__hash__ is None) == (made.__hash__ is None)
    if made.__hash__ not in (None, object.__hash__):
        assert hash(filled(written, names, values)) == hash(filled(written, names, dict(values)))


@pytest.mark.parametrize("path", MODULES)
def test_lines_stay_about_where_they_are(path: str) -> None:
    source = CHECKOUT.joinpath(path).read_text(encoding="utf-8")
    assert 0 <= written_out(source).count("\n") - source.count("\n") <= 3


@pytest.mark.parametrize("path", MODULES)
def test_a_logger_says_its_name(path: str) -> None:
    assert "Logger()" not in CHECKOUT.joinpath(path).read_text(encoding="utf-8")  # it asks the frame, and there is none


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("@define(order=True)\nclass A:\n    a: int\n", "order"),
        ("@define\nclass A:\n    a: int = field(converter=int)\n", "converter"),
        ("@frozen\nclass A:\n    a: int = field(default=1, validator=print)\n", "validator"),
    ],
)
def test_what_is_not_known_is_refused(source: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        written_out(source)


def test_what_is_no_argument_is_there_all_the_same() -> None:
    source = "@define\nclass A:\n    a: int\n    b: int = field(default=3, init=False)\n"
    made: dict[str, Any] = {}
    exec(written_out(source), made)
    assert vars(made["A"](1)) == {"a": 1, "b": 3}


def test_what_compiling_takes_is_looked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert _missing() == str(tmp_path / "Python.h")
    (tmp_path / "Python.h").touch()
    assert _missing() is None
    monkeypatch.setenv("CC", "/nonexistent/gcc -O2")
    assert _missing() == "C compiler (/nonexistent/gcc)"
