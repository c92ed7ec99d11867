"""What is public: `__all__`, `help()`, type stubs, version and deprecations agree (test_docs.py compares the site)."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import attnrb
import pytest
from attnrb.deprecation import deprecated
from attnrb.ops import _native, library
from conftest import REPOSITORY

MODULES = (
    "attnrb",
    "attnrb.analysis",
    "attnrb.evaluation",
    "attnrb.functional",
    "attnrb.models",
    "attnrb.policies",
    "attnrb.protocols",
    "attnrb.reference",
    "attnrb.text",
)
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
assert VERSION is not None


def module_of(name: str) -> object:
    if name == "attnrb.evaluation":
        pytest.importorskip("lm_eval")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    module = module_of(name)
    public = module.__all__  # type: ignore[attr-defined]
    assert len(public) == len(set(public))
    assert not [each for each in public if not hasattr(module, each)]
    silent = [
        each
        for each in public
        if (inspect.isclass(getattr(module, each)) or inspect.isroutine(getattr(module, each)))
        and not (getattr(module, each).__doc__ or "").strip()
    ]
    assert silent == []


@pytest.mark.parametrize("name", MODULES)
def test_help_shows_every_public_name(name: str) -> None:
    module = module_of(name)
    text = pydoc.plain(pydoc.render_doc(module))
    public = [each for each in module.__all__ if not each.startswith("_")]  # type: ignore[attr-defined]
    # Modules are pages of their own; the rest has an entry: a class, a function or a constant.
    entries = re.findall(r"^    (?:class )?(\w+)(?:\(|(?:: [^=\n]+)? = )", text, re.MULTILINE)
    documented = [each for each in public if not inspect.ismodule(getattr(module, each))]
    assert [each for each in documented if each not in entries] == []


@pytest.mark.parametrize("name", MODULES)
def test_type_checkers_see_every_public_name(name: str) -> None:
    """They read the source: each name is bound at the top of the module, perhaps for type checkers alone."""
    module = module_of(name)
    tree = ast.parse(Path(inspect.getsourcefile(module)).read_text(encoding="utf-8"))  # type: ignore[arg-type]
    bound: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body)
    for node in waiting:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.If, ast.Try)):
            waiting += [*node.body, *node.orelse]
    assert "*" in bound or set(module.__all__) <= bound, set(module.__all__) - bound  # type: ignore[attr-defined]


def test_the_package_is_typed() -> None:
    assert (files("attnrb") / "py.typed").is_file()


def test_the_native_library_shows_what_python_asks_of_it_and_nothing_else() -> None:
    """The ops reach torch by its registry: of ours, the C functions alone are symbols that others could meet."""
    if sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("nm is missing")
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", _native.library()], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].partition("@")[0] for line in shown.stdout.splitlines()}
    assert names == {f"attnrb_{each}" for each in set(library.__all__) - {"version"}}


def test_the_native_library_calls_no_function_of_python() -> None:
    """One build of it serves every version of Python."""
    if sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("nm is missing")
    asked = subprocess.run(
        ["nm", "-D", "--undefined-only", _native.library()], capture_output=True, text=True, check=True
    )
    assert not re.findall(r"\bPy\w+", asked.stdout)


# ---------------------------------------------------------------------------------------------- versions, deprecation


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_version_is_written_in_one_place_and_the_changelog_dates_it() -> None:
    """The native library takes it from pyproject.toml, and attnrb.__version__ from the library."""
    assert VERSION is not None
    assert attnrb.__version__ == library.version()
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert dated[0] == VERSION[1]
    assert "0.1.0" in dated
    assert dated == sorted(dated, key=numbers, reverse=True)


def test_something_deprecated_warns_the_line_that_uses_it() -> None:
    def old() -> int:
        """Stands for something public."""
        deprecated("old()", "new()", removed_in="99.0.0")
        return 1

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert old() == 1
    (warning,) = said
    assert warning.category is FutureWarning
    assert str(warning.message) == "old() is deprecated and will be removed in attnrb 99.0.0: use new()"
    assert warning.filename == __file__


def test_what_is_deprecated_goes_in_time_and_is_listed() -> None:
    page = (REPOSITORY / "docs" / "deprecation.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \| [\d.]+ \| ([\d.]+) \|", page, re.MULTILINE)
    used = [
        (call[1], call[2])
        for path in (REPOSITORY / "python").rglob("*.py")
        for call in re.finditer(
            r'\bdeprecated\(\s*"([^"]+)",.*?removed_in="([\d.]+)"', path.read_text("utf-8"), re.DOTALL
        )
        if path.name != "deprecation.py"
    ]
    assert sorted(listed) == sorted(used)
    assert VERSION is not None
    assert not [name for name, removed_in in used if numbers(removed_in) <= numbers(VERSION[1])]


def test_learnt_gains_of_a_patch_are_its_policy() -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny

    with (
        attnrb.patch(tiny("llama"), attnrb.Rebalance()) as patched,
        pytest.warns(FutureWarning, match=r"Patch\.policy"),
    ):
        assert patched.learned is None
