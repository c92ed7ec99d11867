"""Plants faults in the Python package, one at a time, and asks the tests of that module to find each.

    python tests/scorecard/planted_host.py --count 120

Operators on the syntax tree: dropped checks and calls, missing restores, bounds off by one, swapped signs and
conditions, another axis, a slot's offset that is not added. A fault goes into a copy of the package. One process has
loaded torch and transformers; a child of it for each fault imports the copy and runs the tests that `TESTS` names, up
to the first failure. ``survivors_host.json`` has the argument for each survivor.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("ATTNRB_TEST_GRADIENT_SAMPLE", "13")
os.environ.setdefault("ATTNRB_TEST_SAMPLE", "11")

from faults import Arguments, Planted, Verdict, draw, try_all
from row import ROOT, Tally, run

PACKAGE = ROOT / "python" / "attnrb"
FOLDER = ROOT / "build" / "scorecard" / "planted-host"
_PROCESSOR_SECONDS = 240  # for the tests of one fault; a machine that is shared takes longer
_LIMIT = 1800  # by the clock

_QUICK = "not (slow or real_model or browser or vllm)"
_SLOW = "not compile and not inductor and not reach_every and not memory and not process"
_ATTENTION = ("attention_errors", "attention_edits", "attention_accuracy", "dense_calls")
_PATCH = ("patch_masks", "patch_batches", "patch_stats", "patch_generate", "patch_cleanup", "patch_refusals")
_MASKS = ("patch_masks", "patch_patterns")
_EMPHASIS = ("emphasis", "emphasis_generate")
_TEXT = ("text_markup", "text_spans", "text_mark", "text_find", "text_chat", "text_show")
# Which tests know a module.
TESTS: dict[str, tuple[str, ...]] = {
    "ops/attention.py": (*_ATTENTION, "ops_errors", "attention_registration"),
    "ops/edit.py": (*_ATTENTION, "ops_errors"),
    "ops/visibility.py": ("attention_errors", "ops_errors", "reference", "attention_accuracy", "accuracy_attention"),
    "ops/operands.py": ("attention_errors", "ops_errors", "attention_edits"),
    "ops/dense.py": (
        "attention_accuracy",
        "dense_calls",
        "dense_gradients",
        "training_ops",
        "accuracy_weights",
        "ops_gradient",
    ),
    "ops/scores.py": ("ops_errors", "attention_accuracy", "accuracy_attention", "dense_calls", "patch_stats"),
    "ops/rebalancing.py": ("ops_errors", "ops_registration", "training_ops", "dense_calls"),
    "ops/received.py": ("ops_errors", "ops_registration", "dense_calls", "attention_edits"),
    "ops/weights_in_memory.py": ("accuracy_weights", "ops_errors", "ops_gradient"),
    "policies/base.py": ("policies", "config", "trust_cli"),
    "policies/checks.py": ("policies", "config", "emphasis"),
    "policies/rebalance.py": ("config", "policies", "patch_options"),
    "policies/emphasis.py": (*_EMPHASIS, "policies"),
    "policies/sinks.py": ("sinks", "policies"),
    "policies/learned.py": ("learned_gains", "policies"),
    "policies/compose.py": ("patch_compose", "policies"),
    "policies/request.py": _EMPHASIS,
    "policies/profile.py": ("profile", "emphasis"),
    "policies/parse.py": ("policies", "config", "cli_emphasis"),
    "policies/custom.py": ("policies", "patch_compose"),
    "hosts/session.py": (*_PATCH, "patch_options", "trust_configuration", "trust_removal"),
    "hosts/stats.py": ("patch_stats", *_PATCH),
    "hosts/requests.py": (*_EMPHASIS, *_PATCH),
    "hosts/transformers/attention.py": (*_PATCH, "patch_weights", "emphasis_generate", "patch_left_out"),
    "hosts/transformers/masks.py": (*_MASKS, "patch_batches", "patch_generate", "patch_left_out"),
    "hosts/transformers/patterns.py": _MASKS,
    "hosts/transformers/patch.py": (*_PATCH, "patch_copies", "patch_weights", "patch_left_out", "trust_removal"),
    "hosts/transformers/caches.py": ("patch_left_out", "patch_generate", "patch_refusals", "sinks"),
    "hosts/transformers/decoder.py": ("patch_refusals", "patch_models", "patch_cleanup"),
    "hosts/transformers/left_out.py": ("patch_left_out", "patch_refusals", "trust_configuration"),
    "text/markup.py": _TEXT,
    "text/spans.py": _TEXT,
    "text/mark.py": _TEXT,
    "text/placing.py": _TEXT,
    "text/find.py": _TEXT,
    "text/offsets.py": _TEXT,
    "evaluation/runfile.py": ("evaluation_run",),
    "evaluation/extraction.py": ("evaluation_extraction",),
    "evaluation/statistics.py": ("evaluation_statistics",),
    "evaluation/data.py": ("evaluation_data", "trust_text"),
    "models/gguf.py": ("models", "trust_loading"),
}

# ------------------------------------------------------------------------------------------------------- operators

_COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_SWAPPED = {"query_offset": "key_offset", "key_offset": "query_offset", "key_start": "key_end", "key_end": "key_start"}
_QUIET = ("warn", "debug", "info", "say", "print", "prefetch", "tell")  # calls whose loss changes no result
_SHOWN = ("__repr__", "__str__", "describe")


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Each fault that fits a node: its kind, and what takes the node's place (None: nothing)."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        ordered = isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE))
        new.ops = [_COMPARED[type(node.ops[0])]()]
        yield "bound off by one" if ordered else "swapped condition", new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "swapped condition", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "dropped negation", new.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not _is_index(node):
        yield "swapped sign", new.operand
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)) and not _is_text(node):
        if isinstance(node.right, ast.Constant) and node.right.value == 1:
            yield "off by one", new.left
        new.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield "swapped sign", new
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, 1, 2):
        new.slice = ast.Constant(node.slice.value + 1 if node.slice.value < 2 else 1)
        yield "another axis", new
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in _SWAPPED:
        new.attr = _SWAPPED[node.attr]
        yield "wrong slot", new
    elif isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise) and not node.orelse:
        yield "dropped check", None
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_quiet(node.value):
        yield "dropped call", None
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool):
        new.value = ast.Constant(not node.value.value)
        yield "other answer", new
    elif isinstance(node, ast.AugAssign):
        yield "missing statement", None
    elif (
        isinstance(node, ast.Try) and node.finalbody and not all(isinstance(each, ast.Pass) for each in node.finalbody)
    ):
        new.finalbody = [ast.Pass()]
        yield "missing restore", new


def _is_index(node: ast.UnaryOp) -> bool:
    return isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(each, (ast.JoinedStr, ast.List, ast.Tuple))
        or (isinstance(each, ast.Constant) and isinstance(each.value, str))
        for each in ast.walk(node)
    )


def _is_quiet(call: ast.Call) -> bool:
    return any(word in ast.unparse(call.func).rsplit(".", 1)[-1] for word in _QUIET)


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node that may be changed: its parent, the field and the place in it; not in annotations or messages."""
    stack: list[ast.AST] = [tree]
    while stack:
        parent = stack.pop()
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list", "exc", "msg", "bases"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or isinstance(node, (ast.JoinedStr, ast.Raise)):
                    continue
                if isinstance(node, ast.FunctionDef) and node.name in _SHOWN:
                    continue
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    continue
                yield parent, name, index, node
                stack.append(node)


def faults_of(name: str) -> Iterator[tuple[Planted, Callable[[], str]]]:
    """Every fault of one module, with what gives the module's text that has it: asked for before the next fault."""
    tree = ast.parse((PACKAGE / name).read_text("utf-8"))
    owners = _statements(tree)
    for parent, field, index, node in places(tree):
        for kind, new in changes(node):
            kept = owners[node] if new is None or isinstance(new, ast.expr) else node
            before = ast.unparse(kept)
            _put(parent, field, index, new if new is not None else ast.Pass())
            after = "" if new is None else ast.unparse(kept if isinstance(new, ast.expr) else new)
            fault = Planted(name, node.lineno, kind, _short(before), _short(after))
            yield fault, lambda: ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)


def _statements(tree: ast.Module) -> dict[ast.AST, ast.AST]:
    """Of every node the innermost statement that holds it."""
    owners: dict[ast.AST, ast.AST] = {tree: tree}
    for node in ast.walk(tree):  # from the outside in
        for child in ast.iter_child_nodes(node):
            owners[child] = child if isinstance(child, ast.stmt) else owners[node]
    return owners


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _short(text: str) -> str:
    lines = text.splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[1].strip()} ..."[:300]


def faults() -> Iterator[Planted]:
    """Of every module."""
    for name in TESTS:
        for fault, _ in faults_of(name):
            yield fault


# ------------------------------------------------------------------------------------------------------- the tests


def prepare() -> None:
    """A copy of the package, and in this process what every test imports, but for the package itself."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(PACKAGE, FOLDER / "attnrb", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in map(Path, sys.path):  # what was built beside it
        if (folder / "attnrb").is_dir() and (folder / "attnrb").resolve() != PACKAGE:
            for built in (folder / "attnrb").glob("*.so*"):
                shutil.copy2(built, FOLDER / "attnrb" / built.name)
    sys.path[:0] = [str(FOLDER), str(ROOT / "tests" / "python")]
    sys.meta_path[:] = [each for each in sys.meta_path if "ditable" not in type(each).__name__ + type(each).__module__]
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers", "pytest", "numpy", "tokenizers", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for name in ("transformers.generation", "torch.autograd.gradcheck", "torch.testing"):
        importlib.import_module(name)


_finders: set[str] = set()  # the tests that found a fault


def attempt(fault: Planted) -> tuple[Verdict, str]:
    """Whether the tests of the fault's module find it."""
    text = next((text() for each, text in faults_of(fault.file) if each == fault), None)
    if text is None:
        raise SystemExit(f"{fault.name}: no such place")
    original = (FOLDER / "attnrb" / fault.file).read_text("utf-8")
    (FOLDER / "attnrb" / fault.file).write_text(text, "utf-8")
    try:
        verdict, how = run_tests(_paths(TESTS[fault.file]))
    finally:
        (FOLDER / "attnrb" / fault.file).write_text(original, "utf-8")
    if how.startswith("tests/"):
        _finders.add(how)
    return verdict, how


def _paths(stems: Iterable[str]) -> list[str]:
    return [f"tests/python/test_{stem}.py" for stem in stems]


def run_tests(tests: Iterable[str], processor_seconds: int = _PROCESSOR_SECONDS) -> tuple[Verdict, str]:
    """In a child, which has everything loaded already: the verdict, and the first test that failed."""
    log = FOLDER / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        _child(tests, log, processor_seconds)
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                return Verdict.SURVIVED, "all tests pass"
            lines = log.read_text("utf-8", "replace").splitlines()
            failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED tests/", "ERROR tests/"))]
            return Verdict.CAUGHT, failed[0].split(" - ")[0] if failed else f"exit code {code}"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Verdict.CAUGHT, "it never ends"


def _child(tests: Iterable[str], log: Path, processor_seconds: int) -> None:
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + processor_seconds,) * 2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 99
    try:
        import pytest

        os.chdir(ROOT)
        options = [
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--tb=line",
            "-m",
            "not (slow or real_model or browser or vllm)",
            "-k",
            _SLOW,
        ]
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


def work(tally: Tally) -> None:
    """Plant as many as asked for."""
    chosen = draw(faults(), tally.seed)
    prepare()
    try_all(tally, chosen, attempt, Arguments.read(Path(__file__).parent / "survivors_host.json"))
    if _finders:
        healthy, how = run_tests(sorted(_finders), 10 * _PROCESSOR_SECONDS)
        if healthy != Verdict.SURVIVED:
            tally.fault(f"a test that found a fault fails without any: {how}")


if __name__ == "__main__":
    if "--list" in sys.argv:
        print(*(f"{each.line}: {each.kind}: {each.name}" for each in faults()), sep="\n")
    elif "--healthy" in sys.argv:
        prepare()
        for each in TESTS:
            begun = time.monotonic()
            print(each, *run_tests(_paths(TESTS[each])), f"{time.monotonic() - begun:.1f} s", flush=True)
    else:
        sys.exit(run("planted-host", __doc__, work, count=120, only=""))
