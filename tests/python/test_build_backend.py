"""The hooks through which pip builds: which torch they find, and what they say where something is missing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
sys.path.insert(0, str(SOURCE / "build_backend"))

import find_torch as finder  # noqa: E402


def make_torch(folder: Path, version: tuple[int, int, int], header: str = "headeronly/version.h") -> Path:
    """A package that has nothing of torch but the header that states its version."""
    path = folder / "include" / "torch" / header
    path.parent.mkdir(parents=True)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    path.write_text("".join(f"#define TORCH_VERSION_{part} {number}\n" for part, number in parts))
    (folder / "version.py").write_text("raise SystemExit('torch code was run')\n")
    return folder


@pytest.mark.parametrize("header", ["headeronly/version.h", "csrc/api/include/torch/version.h"])
def test_version_is_read_from_the_headers(tmp_path: Path, header: str) -> None:
    folder = make_torch(tmp_path / "torch", (2, 13, 1), header)
    assert finder.read_torch(folder) == finder.Torch(folder, (2, 13, 1))
    assert finder.read_torch(tmp_path / "elsewhere") is None


def test_named_torch_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_torch(tmp_path / "torch", (2, 10, 0))
    monkeypatch.setenv("ATTNRB_TORCH", str(folder))
    assert finder.require_torch() == finder.Torch(folder, (2, 10, 0))


def test_named_folder_without_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRB_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"ATTNRB_TORCH should name the folder of a torch package.* is none"):
        finder.find_torch()


def test_too_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRB_TORCH", str(make_torch(tmp_path / "torch", (2, 9, 1))))
    with pytest.raises(SystemExit, match=r"needs torch 2\.10 or newer.*torch 2\.9\.1: run `pip install"):
        finder.find_torch()


def test_torch_of_the_environment_is_found_though_the_build_cannot_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in pip's isolation: not on sys.path, but where sysconfig says that packages are.
    monkeypatch.delenv("ATTNRB_TORCH", raising=False)
    monkeypatch.setattr(finder.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finder.sysconfig, "get_path", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(finder.site, "getusersitepackages", lambda: str(tmp_path))
    assert finder.find_torch() is None
    folder = make_torch(tmp_path / "torch", (2, 11, 0))
    assert finder.find_torch() == finder.Torch(folder, (2, 11, 0))


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="only an environment that builds has scikit-build-core")
    backend = importlib.import_module("attnrb_build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"needs a C\+\+17 compiler to build: install GCC 11"):
        backend.build_wheel(str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit, match="CXX names 'no-such-compiler', and there is no such program"):
        backend.get_requires_for_build_wheel()


def test_an_old_python_gets_a_sentence() -> None:
    pytest.importorskip("scikit_build_core", reason="only an environment that builds has scikit-build-core")
    backend = importlib.import_module("attnrb_build")
    for module in ("attnrb_build", "find_torch"):  # pip asks them before it reads requires-python
        text = (SOURCE / "build_backend" / f"{module}.py").read_text("utf-8")
        ast.parse(text, feature_version=(3, 9))
        assert "\nfrom typing import TypeAlias" not in text
    with pytest.raises(SystemExit, match=r"attnrb needs Python 3\.10 or newer, this is 3\.9\."):
        backend._check_python((3, 9))
    backend._check_python((3, 10))


def test_a_library_that_does_not_load_is_built_again_where_it_came_from(tmp_path: Path) -> None:
    from attnrb.ops import _native

    broken = tmp_path / "libattnrb.so"
    broken.write_bytes(b"no library")
    with pytest.raises(ImportError, match=r"--force-reinstall --no-deps \.` in attnrb's source tree"):
        _native._load_into_torch(broken)


def import_attnrb(preparation: str) -> str:
    """Imports attnrb in a new process after `preparation` and returns what it said."""
    program = f"{preparation}\nimport attnrb"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    return run.stderr.strip().splitlines()[-1]


def test_import_with_too_old_a_torch_says_so() -> None:
    said = import_attnrb(
        "import sys, types\ntorch = sys.modules['torch'] = types.ModuleType('torch')\ntorch.__version__ = '2.9.1'"
    )
    assert (
        said == "ImportError: attnrb needs torch 2.10 or newer, this is torch 2.9.1: run `pip install 'torch>=2.10'`."
    )


def test_import_without_torch_says_so() -> None:
    said = import_attnrb("import sys\nsys.modules['torch'] = None")
    assert said == "ImportError: attnrb needs torch, which is not installed: run `pip install 'torch>=2.10'`."


def test_import_of_a_source_tree_says_so(tmp_path: Path) -> None:
    # Only the Python files, found before any installed package.
    package = SOURCE / "python" / "attnrb"
    for file in package.rglob("*.py"):
        copy = tmp_path / "attnrb" / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    said = import_attnrb(
        # Python's own finders only: an editable install adds one that finds the compiled files.
        "import sys\nsys.meta_path = [f for f in sys.meta_path if f.__module__.startswith('_frozen_importlib')]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})"
    )
    assert "libattnrb.so: this is perhaps a source tree that was never installed. Run `pip install .`" in said
