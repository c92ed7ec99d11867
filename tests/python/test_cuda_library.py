"""What nvcc made of the CUDA ops, looked at without a GPU: that it loads beside any torch, and what its kernels use.

The table of resources in tests/cuda_host/resources.txt is compared line by line, for the architectures that the library
was compiled for: one after `make test`, all of the table after `make test-cuda`. After a change that is meant, write it
again: ``make test-cuda``, then ``ATTNRB_WRITE_RESOURCES=1 python -m pytest tests/python/test_cuda_library.py``.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import REPOSITORY

LIBRARY = REPOSITORY / "build" / "cuda" / "libattnrb_cuda.so"
TABLE = REPOSITORY / "tests" / "cuda_host" / "resources.txt"
pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="the CUDA ops were not compiled: make test-cuda, with nvcc"
)

_SPEC = spec_from_file_location("count_sass", REPOSITORY / "tools" / "count_sass.py")
assert _SPEC is not None and _SPEC.loader is not None
count_sass = module_from_spec(_SPEC)
sys.modules["count_sass"] = count_sass
_SPEC.loader.exec_module(count_sass)

COUNTED = ("sm_90",)  # in the table of docs/cuda.md
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
    """What cuobjdump says of the library."""
    try:
        return count_sass.tool(*arguments, str(LIBRARY))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


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
            found[count_sass.demangled(kernel), architecture] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            kernel = ""
    return found


def header_of_resources() -> str:
    version = re.search(r"V([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    assert version is not None
    return f"# kernel, architecture, registers a thread, bytes of static shared memory a block (nvcc {version[1]})"


def test_registers_and_shared_memory_are_those_of_the_table() -> None:
    rows = (
        f"{kernel:50} {architecture:8} {used['REG']:4} {used['SHARED']:6}\n"
        for (kernel, architecture), used in resources().items()
    )
    lines = [f"{header_of_resources()}\n", *sorted(rows)]
    compiled = {architecture for _, architecture in resources()}
    if os.environ.get("ATTNRB_WRITE_RESOURCES") == "1":
        assert len(compiled) > 1, "compiled for one architecture alone: make test-cuda compiles for those of the table"
        TABLE.write_text("".join(lines), encoding="utf-8")
    table = TABLE.read_text(encoding="utf-8").splitlines(keepends=True)
    if table[0] != lines[0]:
        pytest.skip(f"another nvcc than the table's allots registers otherwise: {table[0].strip()}")
    assert [row for row in table[1:] if row.split()[-3] in compiled] == lines[1:]


def test_the_table_of_instructions_is_true() -> None:
    """The one in docs/cuda.md, for the architectures that were compiled; no work takes more than it may."""
    header, _, *rows = count_sass.table({each: {work.name: 0 for work in count_sass.WORKS} for each in COUNTED})
    text = (REPOSITORY / "docs" / "cuda.md").read_text(encoding="utf-8").splitlines()
    assert header in text, header
    first = text.index(header) + 2
    told = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text[first : first + len(rows)]]
    for column, architecture in enumerate(COUNTED, start=2):
        if architecture not in {each for _, each in resources()}:
            continue
        counts = count_sass.counts(LIBRARY, architecture)
        for work in count_sass.WORKS:
            assert counts[work.name] is not None and counts[work.name] <= work.most, (architecture, work, counts)
        if TABLE.read_text(encoding="utf-8").splitlines()[0] == header_of_resources():
            assert [row[column] for row in told] == [f"{counts[work.name]:,}" for work in count_sass.WORKS], counts
    assert [row[:2] for row in told] == [[work.name, work.kernel] for work in count_sass.WORKS]


@cache
def instructions() -> dict[str, list[str]]:
    """The mnemonics of each kernel on sm_80."""
    resources()  # skips where there is no cuobjdump
    return {kernel: [each.name for each in listing] for kernel, listing in count_sass.kernels(LIBRARY, "sm_80").items()}


def test_no_kernel_spills() -> None:
    """Neither spilled registers nor arrays in memory: both would take stack, or local memory.

    Rule rest at widths beyond 128 alone may: two softmaxes and sums of 256 columns are more than registers hold.
    """
    assert resources()
    for (kernel, architecture), used in resources().items():
        most = 128 if kernel.startswith("attention_kernel") else 160  # for keys in blocks: 136 on 9.0
        assert used["STACK"] <= (most if ", 256, rest>" in kernel else 0), (kernel, architecture)
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
