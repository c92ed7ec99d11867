"""Builds that compile less of the core: one instruction set, or nothing where an archive is as new as its sources."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

CORE = REPOSITORY / "csrc" / "core"
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
NINJA = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
COMPILER, NM = shutil.which("c++") or shutil.which("g++"), shutil.which("nm")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")


def configure(folder: Path, *chosen: str, tree: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    if CMAKE is None or NINJA is None or COMPILER is None:
        pytest.skip("CMake, ninja or a C++ compiler is missing")
    options = [*chosen, "ATTNRB_BUILD_PACKAGE=OFF", f"CMAKE_MAKE_PROGRAM={NINJA}"]
    options += ["CMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command = [CMAKE, "-S", tree, "-B", folder, "-G", "Ninja", *(f"-D{each}" for each in options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_set_is_compiled(tmp_path: Path) -> None:
    done = configure(tmp_path, "ATTNRB_ONLY=avx512")
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text("utf-8"))
    kernels = [Path(each["file"]).name for each in commands if "kernels" in each["file"]]
    assert kernels == ["avx512.cpp"]
    (dispatch,) = [each["command"] for each in commands if each["file"].endswith("dispatch.cpp")]
    assert "ATTNRB_ONLY" in dispatch
    assert "avx512" in dispatch


def test_a_set_that_is_none_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "ATTNRB_ONLY=avx9")
    assert done.returncode != 0
    assert "there is no instruction set 'avx9'" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("only", "tables"),
    [
        ("", {"portable", "avx2", "avx512", "avx512_bf16", "amx"}),
        ("amx", {"amx"}),
        ("avx512", {"avx512"}),
        ("portable", {"portable"}),
    ],
)
def test_the_choice_refers_to_what_is_built_alone(only: str, tables: set[str], tmp_path: Path) -> None:
    if COMPILER is None or NM is None:
        pytest.skip("a C++ compiler or nm is missing")
    made = tmp_path / "dispatch.o"
    define = [f'-DATTNRB_ONLY="{only}"'] if only else []
    subprocess.run(
        [COMPILER, "-std=c++17", f"-I{CORE.parent}", *define, "-c", str(CORE / "dispatch.cpp"), "-o", str(made)],
        check=True,
    )
    undefined = subprocess.run([NM, "-C", "-u", str(made)], capture_output=True, text=True, check=True).stdout
    found = {
        line.split("attnrb::")[1].removesuffix("_kernels") for line in undefined.splitlines() if "_kernels" in line
    }
    assert found == tables


@pytest.mark.parametrize("state", ["new", "old", "missing"])
def test_an_archive_stands_for_the_core_unless_its_sources_are_newer(state: str, tmp_path: Path) -> None:
    tree, archive, build = tmp_path / "tree", tmp_path / "libattnrb_core.a", tmp_path / "build"
    for folder in ("csrc", "cmake"):
        shutil.copytree(REPOSITORY / folder, tree / folder)
    shutil.copy(REPOSITORY / "CMakeLists.txt", tree)
    newest = max(path.stat().st_mtime for path in (tree / "csrc").rglob("*"))
    if state != "missing":
        archive.touch()
        os.utime(archive, (newest + 60, newest + 60))
    if state == "old":
        os.utime(tree / "csrc" / "core" / "edit.h", (newest + 120, newest + 120))
    done = configure(build, f"ATTNRB_CORE_ARCHIVE={archive}", tree=tree)
    assert done.returncode == 0, done.stderr
    compiled = "kernels/portable.cpp.o" in (build / "build.ninja").read_text("utf-8")
    assert compiled == ("the core is compiled here" in done.stdout) == (state != "new")
