"""When the CUDA ops are built (ATTNRB_CUDA, cmake/Cuda.cmake) and when they are loaded (_native.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnrb.ops import _native
from conftest import REPOSITORY

CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

# What the file asks of a project before it looks for nvcc.
PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(alone LANGUAGES NONE)
set(torch_folder "${CMAKE_CURRENT_SOURCE_DIR}/torch")
include("%s/cmake/Cuda.cmake")
message(STATUS "built for: [${ATTNRB_CUDA_TARGETS}]")
"""


def configure(folder: Path, choice: str | None, *, torch_has_cuda: bool) -> tuple[int, str]:
    """Exit status and words of a configuration on a machine without nvcc."""
    (folder / "torch" / "lib").mkdir(parents=True)
    if torch_has_cuda:
        (folder / "torch" / "lib" / "libtorch_cuda.so").touch()
    (folder / "CMakeLists.txt").write_text(PROJECT % REPOSITORY, encoding="utf-8")
    assert CMAKE is not None
    command = [CMAKE, "-S", str(folder), "-B", str(folder / "build"), "-G", "Unix Makefiles"]
    command += ["-D", f"CMAKE_MAKE_PROGRAM={shutil.which('true')}"]
    command += [] if choice is None else ["-D", f"ATTNRB_CUDA={choice}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")}
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"CUDACXX": str(folder / "no nvcc here")},
    )
    return ran.returncode, " ".join((ran.stdout + ran.stderr).split())


@pytest.mark.skipif(CMAKE is None, reason="there is no cmake")
@pytest.mark.parametrize(
    ("choice", "torch_has_cuda", "builds", "words"),
    [
        ("OFF", True, True, "built for: []"),
        (None, False, True, "this torch has no CUDA, so the CUDA ops are left out (ATTNRB_CUDA=ON builds them all the"),
        ("AUTO", True, True, "no nvcc, so the CUDA ops are left out"),
        ("ON", False, False, "ATTNRB_CUDA=ON needs nvcc 12 or newer, and none is found: install the CUDA toolkit, or"),
        ("PERHAPS", True, False, "ATTNRB_CUDA: expected AUTO, ON or OFF, got PERHAPS"),
    ],
)
def test_what_is_built_where_there_is_no_nvcc(
    choice: str | None, torch_has_cuda: bool, builds: bool, words: str, tmp_path: Path
) -> None:
    status, said = configure(tmp_path, choice, torch_has_cuda=torch_has_cuda)
    assert words in said
    assert (status == 0) == builds


@pytest.mark.parametrize("version", [None, "13.0"])
@pytest.mark.parametrize("built", [False, True])
def test_the_cuda_ops_are_loaded_where_they_were_built_and_torch_has_cuda(
    version: str | None, built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libattnrb_cuda.so"
    if built:
        library.touch()
    loaded: list[Path] = []
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(_native, "cuda_library", lambda: library)
    monkeypatch.setattr(_native, "_load_into_torch", loaded.append)
    monkeypatch.setattr(_native, "_warn_of_driver", lambda library: None)
    _native._load()
    assert [path.name for path in loaded] == ["libattnrb.so", *(["libattnrb_cuda.so"] if version and built else [])]
