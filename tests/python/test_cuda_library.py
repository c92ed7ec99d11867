"""What nvcc made of the CUDA ops, looked at without a GPU: that it loads beside any torch, and what its kernels use.

The table of resources in tests/cuda_host/resources.txt is compared line by line, for the architectures that the library
was compiled for: one after `make test`, all of the table after `make test-cuda`. After a change that is meant, write it
again: ``make test-cuda``, then ``ATTNRB_WRITE_RESOURCES=1 python -m pytest tests/python/test_cuda_library.py``.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

LIBRARY = REPOSITORY / "build" / "cuda" / "libattnrb_cuda.so"
TABLE = REPOSITORY / "tests" / "cuda_host" / "resources.txt"
pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="the CUDA ops were not compiled: make test-cuda, with nvcc"
)

# The enumerations in cuda/kernels/*parameters.h, by number.
TASKS = {
    "GradientTask": ("queries", "keys", "received_deltas", "received_queries", "received_keys", "rest", "bias"),
    "Task": ("source", "rebalance", "softmax", "edited", "biased_softmax", "rest"),
}

TILED = {f"{name}_kernel" for name in ("attention", "ragged_attention", "received", "gradient", "select")}

LOADED_ELSEWHERE = """
import sys, torch, attnrb
torch.ops.load_library(sys.argv[1])
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("attnrb::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
cpu = {name for name in names if has(name, "CPU")}
print(len(cpu) >= 6, sorted(name for name in cpu if not has(name, "CUDA")))
"""


ASKED_OF_DRIVERS = """
import ctypes, sys, torch, attnrb
torch.ops.load_library(sys.argv[1])
problem = ctypes.CDLL(sys.argv[1]).attnrb_driver_problem
problem.restype = ctypes.c_char_p
print(problem())
"""


def test_it_loads_beside_any_torch_and_every_op_has_its_twin() -> None:
    """In a process of its own: ops cannot be unloaded."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, str(LIBRARY)], capture_output=True, text=True, check=True
    )
    all_there, without = ran.stdout.split(maxsplit=1)
    assert all_there == "True"
    assert ast.literal_eval(without) == []


def test_it_is_linked_with_no_cuda_library() -> None:
    """Not even with the runtime, of which it has a copy: it must load where there is neither CUDA nor a driver."""
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert not [name for name in libraries if "cuda" in name or "cudart" in name or "c10" in name], libraries


def test_it_has_nothing_against_a_missing_driver() -> None:
    """What `import attnrb` asks it: a driver that is too old is a problem, one that is not there is none."""
    ran = subprocess.run(
        [sys.executable, "-c", ASKED_OF_DRIVERS, str(LIBRARY)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "None"


def tool(*arguments: str) -> str:
    """What cuobjdump says of the library; it comes with the CUDA toolkit, or with a package of its own."""
    packaged = [
        str(path)
        for folder in getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()
        for path in Path(folder).glob("*/bin")
    ]
    search = os.pathsep.join([*packaged, os.environ.get("PATH", "")])
    program = shutil.which("cuobjdump", path=search)
    if program is None or shutil.which("nvdisasm", path=search) is None:
        pytest.skip("cuobjdump and nvdisasm are not installed (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    environment = {**os.environ, "PATH": search}
    command = [program, *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@cache
def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    kernel = re.match(r"void attnrb::cuda::(\w+)<(.*)>\(", text)
    assert kernel is not None, text
    arguments = kernel[2].replace("attnrb::cuda::", "").replace("attnrb::", "")
    for kind, names in TASKS.items():
        for number, task in enumerate(names):
            arguments = arguments.replace(f"({kind}){number}", task)
    return f"{kernel[1]}<{arguments}>"


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Of each kernel and architecture: registers, stack, shared and local memory."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = kernel = ""
    for line in tool("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line and kernel:
            found[demangled(kernel), architecture] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            kernel = ""
    return found


def test_registers_and_shared_memory_are_those_of_the_table() -> None:
    header = "# kernel, architecture, registers a thread, bytes of static shared memory a block (nvcc {})\n"
    version = re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    assert version is not None
    rows = (
        f"{kernel:50} {architecture:8} {used['REG']:4} {used['SHARED']:6}\n"
        for (kernel, architecture), used in resources().items()
    )
    lines = [header.format(version[1]), *sorted(rows)]
    compiled = {architecture for _, architecture in resources()}
    if os.environ.get("ATTNRB_WRITE_RESOURCES") == "1":
        assert len(compiled) > 1, "compiled for one architecture alone: make test-cuda compiles for those of the table"
        TABLE.write_text("".join(lines), encoding="utf-8")
    table = TABLE.read_text(encoding="utf-8").splitlines(keepends=True)
    if table[0] != lines[0]:
        pytest.skip(f"another nvcc than the table's allots registers otherwise: {table[0].strip()}")
    assert [row for row in table[1:] if row.split()[-3] in compiled] == lines[1:]


@cache
def instructions() -> dict[str, list[str]]:
    """The mnemonics of each kernel on sm_80."""
    found: dict[str, list[str]] = {}
    kernel = ""
    for line in tool("--dump-sass", "--gpu-architecture", "sm_80").splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = demangled(match[1])
            found[kernel] = []
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            found[kernel].append(match[1])
    return found


def test_no_kernel_spills() -> None:
    """Neither spilled registers nor arrays in memory: both would take stack, or local memory.

    Rule rest at widths beyond 128 alone may: two softmaxes and sums of 256 columns are more than registers hold.
    """
    assert resources()
    for (kernel, architecture), used in resources().items():
        assert used["STACK"] <= (128 if ", 256, rest>" in kernel else 0), (kernel, architecture)
        assert used["LOCAL"] == 0, (kernel, architecture)


@pytest.mark.slow
def test_instructions_are_those_that_were_meant() -> None:
    """Tensor cores, ldmatrix and asynchronous copies in the tiled kernels; 16-byte accesses in those on weights."""
    assert instructions()
    for kernel, used in instructions().items():
        names = " ".join(used)
        if kernel.split("<")[0] in TILED:
            assert "HMMA.1688.F32.TF32" in names if "<float," in kernel else "HMMA.16816.F32" in names, kernel
            assert "LDSM" in names, kernel
            assert "LDGSTS" in names and "128" in "".join(name for name in used if name.startswith("LDGSTS")), kernel
        elif kernel.startswith(("correction_kernel", "sparse_queries_kernel", "sparse_keys_kernel")):
            # Gathered rows of two operands, four or two of each, before the first sum over lanes.
            loads = "".join(
                "L" if each.startswith("LDG") and each.endswith("128") else "S" if "SHFL" in each else ""
                for each in used
            )
            assert max(map(len, loads.split("S"))) >= (7 if kernel.startswith("correction") else 4), kernel
        elif kernel.startswith(("outlier_mask_kernel", "rebalance_kernel", "gradient_rows_kernel")):
            assert any(name.startswith("LDG") and name.endswith("128") for name in used), kernel
