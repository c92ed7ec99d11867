"""The table of cases and the bar each has to clear: time divided by that of `scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Denominators. SDPA is called with enable_gqa=True; at its best, in decoding, it is given the G query heads of a key
# head as G query rows, which it can do only because a single query needs no causal mask.
SDPA, SDPA_BEST, OFF = "sdpa", "sdpa at best", "re-balancing off"
# What decoding cannot beat: a reduction over the same keys and values, each read once.
READ = "plain read"


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype
    queries: int
    keys: int
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    batch: int = 1
    source: bool = False  # source_attention, which emits outliers; else rebalanced_attention, which uses them
    ragged: bool = False  # left padding of another length in each batch row
    bars: tuple[tuple[str, float], ...] = ()
    # What even a first version has to hold against SDPA; the bars are stricter.
    least: float | None = None
    # The bar against SDPA on AMX, where PyTorch multiplies by tiles as well.
    amx: float | None = None

    @property
    def decode(self) -> bool:
        return self.queries == 1

    def on(self, instruction_set: str) -> Case:
        """The case with the bars of an instruction set."""
        if instruction_set != "amx" or self.amx is None:
            return self
        return replace(self, bars=tuple((name, self.amx if name == SDPA else bar) for name, bar in self.bars))

    def starts(self) -> list[int]:
        """The first visible slot of each batch row."""
        return [row * self.keys // (2 * self.batch) if self.ragged else 0 for row in range(self.batch)]

    def pairs(self) -> int:
        """Query-key pairs that are visible, over all heads."""
        count = 0
        for start in self.starts():
            for query in (self.keys - self.queries, self.keys - 1):
                count += (query + 1 - start) * self.queries  # twice the mean length of the causal rows
        return count * self.heads // 2

    def flops(self) -> float:
        return 4.0 * self.width * self.pairs()

    def bytes(self) -> float:
        """Keys and values that have to be read once."""
        size = torch.finfo(self.dtype).bits // 8
        return 2.0 * self.key_heads * self.width * size * sum(self.keys - start for start in self.starts())


BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# Re-balancing costs at most 5% over the same kernel without it.
_LIGHT = (OFF, 1.05)

CASES = (
    Case("bf16 prefill 32/8 d128 n2048", BF16, 2048, 2048, bars=((SDPA, 0.60), _LIGHT), amx=0.65),
    Case("bf16 prefill 32/8 d128 n4096", BF16, 4096, 4096, bars=((SDPA, 0.60), _LIGHT), amx=0.65),
    Case("bf16 prefill 9/3 d64 n4096", BF16, 4096, 4096, 9, 3, 64, bars=((SDPA, 0.60), _LIGHT), amx=0.65),
    Case("bf16 source 32/8 d128 n4096", BF16, 4096, 4096, source=True, bars=((SDPA, 0.70),), amx=0.72),
    Case("fp32 prefill 32/8 d128 n2048", FP32, 2048, 2048, bars=((SDPA, 0.85), _LIGHT), least=3.0),
    Case("fp32 prefill 9/3 d64 n4096", FP32, 4096, 4096, 9, 3, 64, bars=((SDPA, 0.85), _LIGHT)),
    Case("fp16 prefill 32/8 d128 n2048", FP16, 2048, 2048, bars=((SDPA, 0.60), _LIGHT)),
    Case("bf16 decode 32/8 d128 n4096", BF16, 1, 4096, bars=((SDPA, 0.40), (SDPA_BEST, 0.60))),
    Case("bf16 decode 32/8 d128 n16384", BF16, 1, 16384, bars=((SDPA, 0.30), (SDPA_BEST, 0.55)), least=1.0),
    Case("fp32 decode 32/8 d128 n4096", FP32, 1, 4096, bars=((SDPA, 0.40), (SDPA_BEST, 1.00))),
    Case("fp32 decode 32/8 d128 n16384", FP32, 1, 16384, bars=((SDPA, 0.33), (SDPA_BEST, 0.65)), least=1.0),
    Case("fp16 decode 32/8 d128 n16384", FP16, 1, 16384, bars=((SDPA, 0.20), (SDPA_BEST, 0.65)), least=1.0),
    Case("bf16 decode batch 8 ragged n2048", BF16, 1, 2048, batch=8, ragged=True, bars=((SDPA, 0.40),)),
    Case("bf16 chunked prefill 256 onto 8192", BF16, 256, 8192 + 256, bars=((SDPA, 0.45),), amx=0.47),
    Case("bf16 short prefill n64", BF16, 64, 64, bars=((SDPA, 1.20),), amx=1.0),
)

# Decoding reads at this share of a plain read of the same bytes, at the least.
READ_SHARE = 0.80
