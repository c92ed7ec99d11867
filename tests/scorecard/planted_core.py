"""Plants faults in the CPU kernels, one at a time, and asks the C++ tests to find each.

    python tests/scorecard/planted_core.py --count 120

Operators on patterns: bounds off by one, dropped conditions, swapped signs, another head, batch or slot, a statement
that is not there. Only float32 under AVX2 is compiled for a fault, at -O1, and linked with the tests' own objects; what
16-bit types share with it is most of the code. What passes so is compiled once more for AddressSanitizer, as the tests
are: a fault may lead out of an array and change no result. ``survivors_core.json`` has the argument for each survivor.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from builds import PLAIN, TOOLS, build, run_step
from faults import Arguments, Planted, Verdict, draw, try_all
from row import ROOT, Tally, run

HERE = Path(__file__).resolve().parent
CORE = ROOT / "csrc" / "core"
FOLDER = ROOT / "build" / "scorecard" / "planted-core"
FLAGS = ["-std=c++17", "-O1", "-w", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FILES = (
    "visibility.h",
    "edit.h",
    "kernels/bias.h",
    "kernels/marks.h",
    "kernels/rows.h",
    "kernels/prefill.h",
    "kernels/decode.h",
    "kernels/received.h",
    "kernels/elementwise.h",
    "kernels/gradient.h",
    "kernels/gradient_rows.h",
    "kernels/gradient_scores.h",
    "kernels/gradient_products.h",
    "kernels/driver.h",
    "kernels/float_engine.h",
)

# What a line must not have: it concerns speed or room, so that a change of it is no fault.
_NOT_ABOUT_RESULTS = re.compile(
    r"^\s*(//|#|template|static_assert|using|struct|class|namespace|public|private)|prefetch|Upcoming|ahead|fetch\("
    r"|constexpr|carver|reserve|capacity_|kTasks|kShortest|span_keys_ =|spans_ =|wanted|kGradientBudget|kPackedBudget"
    r"|round_up|elements|blocks_\(|columns_\(|heads_per_block|queries_per_block|kBlock.*=|divide\("
)

# (kind, pattern, replacement): each place where it matches is one fault.
OPERATORS: tuple[tuple[str, str, str], ...] = (
    ("bound off by one", r" < (?=[a-zA-Z0])", " <= "),
    ("bound off by one", r" <= (?=[a-zA-Z0])", " < "),
    ("bound off by one", r" > (?=[a-zA-Z0-])", " >= "),
    ("bound off by one", r" >= (?=[a-zA-Z0-])", " > "),
    ("off by one", r" \+ 1\b(?!\.)", ""),
    ("off by one", r" - 1\b(?!\.)", ""),
    ("swapped condition", r" == ", " != "),
    ("swapped condition", r" != ", " == "),
    ("swapped condition", r" && ", " || "),
    ("swapped condition", r" \|\| ", " && "),
    ("dropped negation", r"(?<=[( ])!(?=[a-zA-Z])", ""),
    ("swapped sign", r"(?<=[a-z\])]) - (?=[a-z(])", " + "),
    ("swapped sign", r"(?<=[a-z\])]) \+ (?=[a-z(])", " - "),
    ("swapped sign", r"-kInfinity", "kInfinity"),
    ("another head", r"\b(?:\w+\.)?head \* ", "0 * "),
    ("another head", r"\b(?:\w+\.)?key_head \* ", "0 * "),
    ("another head", r"\[head\]", "[0]"),
    ("another sequence", r"\b(?:\w+\.)?batch \* ", "0 * "),
    ("another sequence", r"\[batch\]", "[0]"),
    ("wrong slot", r"\b(?:\w+\.)?visibility_?\.key_offset", "0"),
    ("wrong slot", r"(?<![.\w])key_offset\b(?=[ ;)])", "0"),
    ("another factor", r"\b1\.0f \+ ", "2.0f + "),
    ("another factor", r" \* to_log2", ""),
    ("another factor", r"Vec::max\(", "Vec::min("),
    ("another factor", r"\bfma\(", "fms("),
)
_STATEMENT = re.compile(r"^\s+(?:if \([^;{}]*\) )?[A-Za-z_][\w.\[\]>-]* (?:[+*|&-]?=) [^=][^;{}]*;$")
_CHECK = re.compile(r"^(\s+)if \((.*)\) (return|continue)\b(.*);$")


def faults() -> Iterator[Planted]:
    """Every place that an operator fits."""
    for name in FILES:
        for number, line in enumerate((CORE / name).read_text("utf-8").splitlines(), 1):
            code = line.split("  //")[0]
            if _NOT_ABOUT_RESULTS.search(code):
                continue
            loop = "for (" in code  # whose bounds would lead out of an array
            for kind, pattern, replacement in OPERATORS:
                if loop and kind in ("bound off by one", "off by one", "swapped condition"):
                    continue
                if kind == "bound off by one" and " ? " in code:  # a maximum or minimum, where equals are equal
                    continue
                for match in re.finditer(pattern, code):
                    new = code[: match.start()] + replacement + code[match.end() :]
                    yield Planted(name, number, kind, line, new)
            if _STATEMENT.match(code) and not loop and " = carver" not in code:
                yield Planted(name, number, "missing statement", line, "")
            if found := _CHECK.match(code):
                yield Planted(name, number, "dropped check", line, f"{found[1]};")


def build_tests() -> None:
    """The tests' own objects, and those of the core that no fault is planted in."""
    build(PLAIN, "attnrb_truth")  # also configures
    listed = run_step([TOOLS / "ninja", "-C", PLAIN, "-t", "targets", "all"]).splitlines()
    names = [line.split(":")[0] for line in listed]
    libraries = [name for name in names if "gtest" in name and name.endswith((".a", ".so"))]
    build(PLAIN, *(name for name in names if _is_test(Path(name))), *libraries)


def _is_test(path: Path) -> bool:
    """Whether an object file has tests of kernels, those of other tables and of symbols left out."""
    return path.match("attnrb_tests.dir/test_*.o") and path.name.split(".")[0] not in ("test_symbols", "test_types")


def prepare() -> None:
    """What all faults share: the tests as one object, and all that they are linked with."""
    build_tests()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    sources = [HERE / "one_table.cpp", ROOT / "tests" / "cpp" / "runner.cpp"]
    sources += [ROOT / "csrc" / "core" / name for name in ("scratch.cpp", "thread_pool.cpp", "kernels/portable.cpp")]
    for source in sources:
        run_step(["g++", *FLAGS, *include, "-c", source, "-o", FOLDER / f"{source.stem}.o"])
    objects = [path for path in PLAIN.rglob("*.o") if _is_test(path)] + sorted(FOLDER.glob("*.o"))
    run_step(["ld", "-r", "-o", FOLDER / "tests.o", *objects])


def link(fault_object: Path, program: Path, *options: str) -> None:
    """The tests with the kernels of one object and the portable ones, which serve 16-bit types."""
    text = (PLAIN / "build.ninja").read_text("utf-8")
    line = next(line for line in text.splitlines() if "LINK_LIBRARIES" in line and "gtest" in line)
    wanted = [part for part in line.split("=", 1)[1].split() if "gtest" in part or "attnrb_truth" in part]
    libraries = [part if part.startswith(("/", "-")) else str(PLAIN / part) for part in wanted]
    run_step(["g++", fault_object, FOLDER / "tests.o", *libraries, "-pthread", *options, "-o", program])


def attempt(fault: Planted) -> tuple[Verdict, str]:
    """Whether the tests find the fault."""
    folder = FOLDER / "one"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc" / "core", folder / "csrc" / "core")
    plant(folder / "csrc" / "core" / fault.file, fault)
    only_float32(folder / "csrc" / "core" / "kernels" / "table.h")
    target, program = folder / "fault.o", folder / "tests"
    verdict, how = Verdict.SURVIVED, ""
    for options in ((), ("-fsanitize=address", "-fno-omit-frame-pointer")):
        command = ["g++", *FLAGS, *AVX2, *options, f"-I{folder / 'csrc'}", "-c", HERE / "one_type.cpp", "-o", target]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return Verdict.NONE, "it does not compile"
        link(target, program, *options)
        verdict, how = run_tests(program)
        if verdict != Verdict.SURVIVED:
            return verdict, f"AddressSanitizer: {how}" if options else how
    return verdict, how


def plant(path: Path, fault: Planted) -> None:
    """Put the fault into a copy of the file."""
    lines = path.read_text("utf-8").splitlines()
    if lines[fault.line - 1] != fault.old:
        raise SystemExit(f"{fault.name}: line {fault.line} is another one")
    lines[fault.line - 1] = fault.new
    path.write_text("\n".join(lines) + "\n", "utf-8")


def only_float32(table: Path) -> None:
    """One element type: a third of the time to compile."""
    text = table.read_text("utf-8")
    cut, count = re.subn(r"  switch \(dtype\) \{.*?\n  \}\n", "  return function(float());\n", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit("table.h: where it chooses the element type is not found")
    table.write_text(cut, "utf-8")


# What finds most faults soonest goes first: a few generated cases, tests of edges, more cases, and the slowest test.
_SLOWEST = "Kernels/Edges.PoisonReachesOnlyTheRowsThatSeeIt/*"
_STAGES = (("Cases/*", 60), (f"Kernels/*-{_SLOWEST}", 120), ("Cases/*", 500), (_SLOWEST, 1))
_PROCESSOR_SECONDS = 60  # for a stage, which takes less than twenty: a fault may make threads wait for ever


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS))


def run_tests(program: Path) -> tuple[Verdict, str]:
    """Stops at the first failure."""
    for tests, cases in _STAGES:
        environment = {**os.environ, "ATTNRB_TEST_CASES": str(cases), "GTEST_FAIL_FAST": "1", "GTEST_BRIEF": "1"}
        environment["GTEST_FILTER"] = tests
        try:
            ran = subprocess.run(
                [program], env=environment, capture_output=True, text=True, timeout=3600, check=False, preexec_fn=_limit
            )
        except subprocess.TimeoutExpired:
            return Verdict.CAUGHT, "it never ends"
        if ran.returncode > 0:
            failed = [
                line.split("]")[1].split(",")[0].strip() for line in ran.stdout.splitlines() if "FAILED  ]" in line
            ]
            return Verdict.CAUGHT, failed[0] if failed else "a test fails"
        if ran.returncode < 0:
            return Verdict.CAUGHT, f"signal {-ran.returncode}"
    return Verdict.SURVIVED, "all tests pass"


def work(tally: Tally) -> None:
    """Plant as many as asked for."""
    chosen = draw(faults(), tally.seed)
    prepare()
    tally.restart()  # the time to build is not the row's
    line = (CORE / "edit.h").read_text("utf-8").splitlines()[0]
    healthy, how = attempt(Planted("edit.h", 1, "none", line, line))
    if healthy != Verdict.SURVIVED:
        tally.fault(f"the tests fail without any fault: {how}")
        return
    try_all(tally, chosen, attempt, Arguments.read(HERE / "survivors_core.json"))


if __name__ == "__main__":
    if "--list" in sys.argv:
        print(*(f"{each.line}: {each.kind}: {each.name}" for each in faults()), sep="\n")
    else:
        sys.exit(run("planted-core", __doc__, work, count=120, only=""))
