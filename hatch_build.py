"""Builds the wheel with the modules that every request goes through compiled by mypyc, where
``HATCH_BUILD_HOOK_ENABLE_CUSTOM`` is set. The source is the same as without, and works without.

A class is fast whose attributes and constructor mypyc sees, and ``attrs.define`` adds the latter at run time. So what
that would add is written out in a copy first (:func:`written_out`): the source keeps the values as attrs has them, and
the lines that tracebacks name are its own, or a few further down. What attrs is asked for and is not known here is
refused.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(name="vllmproxy", packages=[], ext_modules=mypycify({modules!r}, opt_level="2", debug_level="0", multi_file=True))
"""
_FACTORIES = {"dict": "{}", "list": "[]", "set": "set()"}


class CompiledBuildHook(BuildHookInterface[Any]):
    """Compiles the ``modules`` of the hook's table in ``pyproject.toml``: folder → names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the wheel take what came of it.

        :raises RuntimeError: that cannot be done, and why.
        """
        if missing := _missing():
            raise RuntimeError(
                f"there is no {missing}, which compiling takes: install it (Debian: gcc python3-dev), "
                "or leave HATCH_BUILD_HOOK_ENABLE_CUSTOM unset"
            )
        self._work = TemporaryDirectory()
        work = Path(self._work.name)
        _set_up(Path(self.root), work, self.config, "build_ext", "--inplace")
        for built in (*work.glob("*.so"), *(work / "vllmproxy").rglob("*.so")):
            build_data["force_include"][str(built)] = str(built.relative_to(work))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has taken."""
        self._work.cleanup()


def check() -> None:
    """Raise ``RuntimeError`` where mypyc refuses the modules: as much as can be said without a C compiler."""
    root = Path(__file__).parent
    targets = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    with TemporaryDirectory() as work:
        _set_up(root, Path(work), targets["wheel"]["hooks"]["custom"], "--name")


def _missing() -> str | None:
    """Return what is not here that compiling takes, before minutes are spent on translating."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"C compiler ({compiler})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else str(header)


def _set_up(root: Path, work: Path, config: dict[str, Any], *command: str) -> None:
    """Translate the modules to C in a copy, and do what else ``command`` says."""
    modules = [f"{folder}/{name}.py" for folder, names in config["modules"].items() for name in names]
    shutil.copytree(root / "vllmproxy", work / "vllmproxy", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copyfile(root / "mypy.ini", work / "mypy.ini")
    for module in modules:
        (work / module).write_text(written_out((root / module).read_text(encoding="utf-8")), encoding="utf-8")
    (work / "setup.py").write_text(_SETUP.format(modules=modules), encoding="utf-8")
    python = [sys.executable, "setup.py", "--quiet", *command]
    done = subprocess.run(python, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"the modules were not compiled:\n{done.stdout.decode(errors='replace')[-10_000:]}")


def written_out(source: str) -> str:
    """Return a module's source with all that ``attrs.define`` and ``attrs.frozen`` would add to its classes. What is
    frozen is not kept from being changed.

    :raises ValueError: attrs is asked for something that is not known here.
    """
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                asked = _Asked.of(decorator)
                if asked is not None:
                    _write_out(lines, node, decorator, asked)
    return "\n".join(lines)


class _Asked:
    """What attrs is asked for by a decorator."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.eq = given.pop("eq", True)
        self.repr = given.pop("repr", True)
        self.hash = self.eq and name == "frozen"
        self.kw_only = given.pop("kw_only", False)
        given.pop("slots", True)
        if given:
            raise ValueError(f"what attrs makes of {', '.join(given)} is not known")

    @classmethod
    def of(cls, decorator: ast.expr) -> "_Asked | None":
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if not isinstance(called, ast.Name) or called.id not in ("define", "frozen"):
            return None
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        return cls(called.id, {str(each.arg): ast.literal_eval(each.value) for each in keywords})


class _Field:
    """One attribute of a class that attrs makes.

    :ivar default: the expression, as the constructor has it in its signature; ``None`` where there is none.
    :ivar made: an expression that makes one for each instance.
    """

    def __init__(self, node: ast.AnnAssign) -> None:
        assert isinstance(node.target, ast.Name)
        self.name = node.target.id
        self.argument = self.name.lstrip("_")
        self.annotation = ast.unparse(node.annotation)
        self.default: str | None = None
        self.made: str | None = None
        self.init = self.eq = self.repr = True
        self.kw_only = False
        if node.value is not None:
            self._read(node.value)

    def _read(self, value: ast.expr) -> None:
        if not (isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "attrs.field", "Factory")):
            self.default = ast.unparse(value)
            return
        given = {str(each.arg): each.value for each in value.keywords}
        if ast.unparse(value.func) == "Factory":
            given["factory"] = value.args[0]
        for name in ("init", "eq", "repr", "kw_only"):
            if name in given:
                setattr(self, name, ast.literal_eval(given.pop(name)))
        factory, default = given.pop("factory", None), given.pop("default", None)
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "Factory":  # it takes the instance
            factory = default.args[0]
        elif default is not None:
            self.default = ast.unparse(default)
        if isinstance(factory, ast.Lambda):
            self.made = ast.unparse(factory.body)
        elif factory is not None:
            self.made = _FACTORIES.get(ast.unparse(factory), f"{ast.unparse(factory)}()")
        if given:
            raise ValueError(f"what attrs makes of a field's {', '.join(given)} is not known")

    @property
    def parameter(self) -> str:
        if self.made is not None:
            return f"{self.argument}: {self.annotation} | None = None"
        return f"{self.argument}: {self.annotation}" + (f" = {self.default}" if self.default is not None else "")

    @property
    def assignment(self) -> str:
        if self.made is None:
            return f"self.{self.name}: {self.annotation} = {self.argument if self.init else self.default}"
        value = f"{self.made} if {self.argument} is None else {self.argument}" if self.init else self.made
        return f"self.{self.name}: {self.annotation} = {value}"


def _write_out(lines: list[str], made: ast.ClassDef, decorator: ast.expr, asked: _Asked) -> None:
    """Write a class's methods where its fields are declared, one on each line, and leave the others alone."""
    declared = [node for node in made.body if isinstance(node, ast.AnnAssign)]
    fields = [_Field(node) for node in declared]
    methods = list(_methods(made, fields, asked))
    room = [number for node in declared for number in _lines_of(node)]
    for number in (*_lines_of(decorator), *room):
        lines[number] = ""
    written = [f"    {method}" for method in methods]
    over = written[len(room) - 1 :]  # more than one where there are fewer fields than methods
    for number, method in zip(room, [*written[: len(room) - 1], "\n".join(over)], strict=False):
        lines[number] = method


def _lines_of(node: ast.expr | ast.stmt) -> range:
    """Return the places of a node's lines, from 0 on."""
    assert node.end_lineno is not None
    return range(node.lineno - 1, node.end_lineno)


def _methods(made: ast.ClassDef, fields: list[_Field], asked: _Asked) -> Iterator[str]:
    own = {node.name for node in made.body if isinstance(node, ast.FunctionDef)}
    by_place = [each.parameter for each in fields if each.init and not (asked.kw_only or each.kw_only)]
    by_name = [each.parameter for each in fields if each.init and (asked.kw_only or each.kw_only)]
    parameters = ", ".join(["self", *by_place, *(["*", *by_name] if by_name else [])])
    steps = [each.assignment for each in fields if each.init or each.made is not None or each.default is not None]
    if "__attrs_post_init__" in own:
        steps.append("self.__attrs_post_init__()")
    yield f"def __init__({parameters}) -> None: {'; '.join(steps)}"
    if asked.eq and "__eq__" not in own:
        mine, its = (_tuple(f"{of}.{each.name}" for each in fields if each.eq) for of in ("self", "other"))
        yield (
            f"def __eq__(self, other: object) -> bool: "
            f"return {mine} == {its} if isinstance(other, {made.name}) else NotImplemented"
        )
        if asked.hash:
            yield f"def __hash__(self) -> int: return hash({mine})"
    if asked.repr and "__repr__" not in own and len(fields) > 2:
        shown = ", ".join(f"{each.name}={{self.{each.name}!r}}" for each in fields if each.repr)
        yield f"def __repr__(self) -> str: return f'{made.name}({shown})'"


def _tuple(items: Iterator[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"
