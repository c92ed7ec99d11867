"""The rows of the scorecard: what each says, the programs that make it, how much of it counts, and how little."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One row.

    Attributes:
        name: of its file in build/scorecard.
        title: what it says, for the page.
        says: a sentence or two on what is tried and what counts as a fault.
        program: under tests/scorecard, with the options of the whole count.
        smoke: options of a few cases, for the suite.
        least: the figure that must be there, and how large it must be at least.
    """

    name: str
    title: str
    says: str
    program: tuple[str, ...]
    smoke: tuple[str, ...]
    least: tuple[str, int]


_FUZZ = "over every option: rules, key bias, first query, emission, windows, chunks, softcap, sinks, groups of heads, \
other widths of values, padding, masks, three dtypes, layouts, decoding"

ROWS: tuple[Row, ...] = (
    Row(
        "forward",
        "Outputs against float64",
        f"Random configurations {_FUZZ}. The output and the log-sum-exp may be off by twice PyTorch's own error in the "
        "same dtype and one rounding; outliers are those of the NumPy reference, but for weights within a rounding of "
        "the threshold.",
        ("fuzz.py", "--count", "20000"),
        ("--count", "8"),
        ("configurations", 20_000),
    ),
    Row(
        "gradients",
        "Gradients against float64",
        "The same configurations, forward and backward, with the gradients of query, key, value, gain, key bias and "
        "sinks. PyTorch's own error is the larger of two: eager autograd, and gradients from a stored log-sum-exp and "
        "output, as every fused attention computes them.",
        ("fuzz.py", "--gradients", "1", "--count", "1000"),
        ("--gradients", "1", "--count", "4"),
        ("configurations", 1000),
    ),
    Row(
        "invalid",
        "Invalid calls",
        "Valid calls of every native op with one argument made invalid, drawn from the schemas. Each must raise; "
        "none may crash or give a result.",
        ("invalid_calls.py", "--count", "5000"),
        ("--count", "20"),
        ("calls", 5000),
    ),
    Row(
        "layouts",
        "Odd layouts",
        "Every tensor of a call laid out anew: transposed, expanded, sliced, at an odd offset, rows that overlap, "
        "sizes of zero, a storage that others share. Results must have the bits that contiguous copies give, and "
        "nothing that was passed may be written.",
        ("layouts.py", "--count", "5000"),
        ("--count", "40"),
        ("calls", 5000),
    ),
    Row(
        "differential",
        "Instruction sets against each other",
        "The same generated cases by every instruction set, each held to the oracle in float64 with bounds that are "
        "derived, not chosen (`tests/cpp/oracle.h`).",
        ("core.py", "--mode", "differential", "--count", "10000"),
        ("--mode", "differential", "--count", "20"),
        ("cases", 10_000),
    ),
    Row(
        "calls",
        "AddressSanitizer and UndefinedBehaviorSanitizer",
        "Small cases and some large ones under both sanitizers. A kernel call is one call of an entry of a kernel "
        "table: attention, received attention, their gradients, and the three operations on weights in memory.",
        ("core.py", "--mode", "calls", "--count", "1000000"),
        ("--mode", "calls", "--count", "50"),
        ("kernel calls", 1_000_000),
    ),
    Row(
        "callers",
        "ThreadSanitizer with 8 callers",
        "Eight threads call kernels at once, half of the calls with a pool of two threads of their own. Results must "
        "have the bits of a call alone. One instruction set is built for it: what threads share is the same in all.",
        ("core.py", "--mode", "callers", "--count", "20000"),
        ("--mode", "callers", "--count", "50"),
        ("callers at once", 8),
    ),
    Row(
        "hidden",
        "NaN in everything hidden",
        "Keys and values that no query sees, the bias of such slots and of slots that a layer does not hold become "
        "NaN or infinite, and what lies in outlier lists behind the last entry becomes any number. No bit of a "
        "forward, of received attention or of a backward may change.",
        ("core.py", "--mode", "hidden", "--count", "4000"),
        ("--mode", "hidden", "--count", "20"),
        ("cases with something hidden", 2000),
    ),
    Row(
        "threads",
        "The same bits on 1 to 4 threads",
        "A forward, received attention and a backward on 1, 2, 3, 4 threads and once more on 1, by every "
        "instruction set.",
        ("core.py", "--mode", "threads", "--count", "2000"),
        ("--mode", "threads", "--count", "20"),
        ("cases", 2000),
    ),
    Row(
        "memory",
        "Memory",
        "The largest resident memory above the operands, over lengths that double, and the exponent of its growth. 1 "
        "is linear; a matrix of all queries and keys would show as 2. A fault is an exponent above 1.1.",
        ("memory.py",),
        ("--count", "1", "--shortest", "256"),
        ("measurements", 12),
    ),
    Row(
        "pages",
        "Hostile texts of tokens in a browser",
        "Texts that try to become markup, scripts, styles or commands, in every place of every page where text of a "
        "model, a token or a data set is shown, opened in Chromium. A fault is a dialog, a request, a message on the "
        "console, an element that the text made, or a text that is not shown.",
        ("pages.py", "--count", "1000"),
        ("--count", "6"),
        ("texts", 1000),
    ),
    Row(
        "killed",
        "Killed at any moment",
        "An evaluation, a search, a training and a conversion of a GGUF file, each ended by kill -9 at a random moment "
        "and started again until it is done. Nothing may be lost or done twice, and nothing half-written may be taken "
        "for whole.",
        ("killed.py", "--count", "40"),
        ("--count", "0"),
        ("kills", 40),
    ),
    Row(
        "planted-core",
        "Planted faults: CPU kernels",
        "One change at a time in the kernels (bounds, conditions, signs, heads, sequences, slots, statements that are "
        "not there), and the C++ tests must fail. A change that changes no result is no fault: it is listed and not "
        "counted. A fault of this row is a survivor without an argument.",
        ("planted_core.py", "--count", "110"),
        ("--count", "0"),
        ("faults planted", 100),
    ),
    Row(
        "planted-host",
        "Planted faults: the Python package",
        "One change at a time on the syntax tree (dropped checks and calls, missing restores, bounds, conditions, "
        "signs, axes, slots), and the tests of that module must fail. A change that changes no result is no fault: it "
        "is listed and not counted. A fault of this row is a survivor without an argument.",
        ("planted_host.py", "--count", "110"),
        ("--count", "0"),
        ("faults planted", 100),
    ),
)
