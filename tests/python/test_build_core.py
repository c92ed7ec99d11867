"""The core as an archive that was compiled before: used while it is as new as its sources, and not later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("state", ["new", "old", "missing"])
def test_an_archive_is_used_unless_its_sources_are_newer(state: str, tmp_path: Path) -> None:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja, compiler = (shutil.which(name, path=tools) for name in ("cmake", "ninja", "c++"))
    if cmake is None or ninja is None or compiler is None:
        pytest.skip("cmake, ninja or a C++ compiler is not here")
    tree, archive, build = tmp_path / "tree", tmp_path / "libattnrb_core.a", tmp_path / "build"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "cmake", tree / "cmake", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    source = tree / "csrc" / "core" / "edit.h"
    if state != "missing":
        archive.touch()
        newest = max(path.stat().st_mtime for path in (tree / "csrc").rglob("*"))
        os.utime(archive, (newest + 60, newest + 60))
        if state == "old":
            os.utime(source, (newest + 120, newest + 120))
    configure = [cmake, "-S", tree, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DATTNRB_BUILD_PACKAGE=OFF", f"-DATTNRB_CORE_ARCHIVE={archive}"]
    said = subprocess.run(configure, capture_output=True, text=True, check=True).stdout
    listed = [ninja, "-C", build, "-t", "targets", "all"]
    targets = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    compiled = state != "new"
    assert ("the core is compiled here" in said) == compiled
    assert ("kernels/portable.cpp.o:" in targets) == compiled
