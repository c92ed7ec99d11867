"""What bench_gpu.py measures: the cases, what they move and compute, and the bar that each has to clear."""

from __future__ import annotations

from dataclasses import dataclass

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
SLOTS = 99  # places for outliers in a row, at the threshold of 0.01
KINDS = ("prefill", "source", "decode", "training")


@dataclass(frozen=True)
class Case:
    """One row of the table, in bfloat16 and causal. `training` is forward and backward; `source` emits outliers."""

    kind: str
    batch: int
    keys: int

    @property
    def name(self) -> str:
        return f"{self.kind} batch {self.batch} n{self.keys}"

    @property
    def queries(self) -> int:
        return 1 if self.kind == "decode" else self.keys

    @property
    def capacity(self) -> int:
        return min(SLOTS, self.keys)

    @property
    def at_most(self) -> float | None:
        """Time divided by that of scaled_dot_product_attention with enable_gqa."""
        if self.kind == "prefill":
            return 1.10 if self.keys >= 16384 else 1.50 if self.keys >= 4096 else None
        return {"decode": 1.05, "source": 1.80}.get(self.kind)

    @property
    def flops(self) -> float:
        """Of the dense part: two products of each pair that is seen, seven with the backward."""
        seen = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) / 2
        return (7.0 if self.kind == "training" else 2.0) * 2.0 * self.batch * HEADS * WIDTH * seen

    def bytes(self, outliers_a_row: float) -> float:
        """Every operand and result once; of the table of outliers what is written, or what a layer below reads."""
        rows = self.batch * HEADS * self.queries
        queries, keys = 2.0 * rows * WIDTH, 2.0 * self.batch * KEY_HEADS * self.keys * WIDTH
        slots = 4.0 * rows * (1 + (self.capacity if self.kind == "source" else outliers_a_row))
        forward = 2 * queries + 2 * keys + 4.0 * rows + slots
        # The backward reads both ends of the forward and the gradient of its output, and writes three gradients.
        backward = 4 * queries + 4 * keys + 4.0 * rows + slots
        return forward + (backward if self.kind == "training" else 0.0)


def cases(lengths: list[int], batches: list[int], kinds: list[str]) -> list[Case]:
    """All of these kinds: decoding at every batch, the others at one sequence."""
    return [
        Case(kind, batch, keys)
        for kind in KINDS
        if kind in kinds
        for keys in lengths
        for batch in (batches if kind == "decode" else [1])
    ]
