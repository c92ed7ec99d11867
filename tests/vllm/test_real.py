"""SmolLM2 in float32: prompts of 4 to 900 tokens, batched, in parts of 128 tokens, with cached prefixes.

Note: [A threshold that no weight is near]
Among millions of weights there is one closer to a threshold of 0.01 than float32 can tell. In the prompt of 606 tokens
here there are two, 5e-10 and 6e-10 above it. Of these transformers takes none for an outlier and vLLM one, so that the
next tokens' log-probabilities are 1.4e-4 and 3e-5 from those of float64, with all tokens equal. That is the method's
discontinuity: each engine is right for weights that float32 has rounded. So re-balancing has a threshold here in the
widest gap between the weights of its source layers, by float64, and engines must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attnrb
import engines
import pytest
import torch
from attnrb.policies import Plain

MOST = 1e-4  # between two engines' log-probabilities
NEW = 32
NEAR = 1e-8
"""How far a weight of 0.01 may be off in float32: its score is off by some 1e-6."""
SOURCES = (0, 2)
"""The source layers of the policies below."""

POLICIES: dict[str, dict[str, Any]] = {
    "published": {"policy": "rebalance", "alpha": 1.0},
    "normalised": {"policy": "rebalance", "alpha": 1.0, "normalize": True},
    "chosen": {"policy": "rebalance", "alpha": 1.0, "source_layer": 2, "heads": [0, 2, 5, 8]},
    "stronger": {"policy": "emphasis", "strength": 8},
    "weaker": {"policy": "emphasis", "strength": 0.25},
}
NOTHING: list[dict[str, Any]] = [{"policy": "rebalance", "alpha": 0}, {"policy": "emphasis", "strength": 1}]


def threshold_in_a_gap(folder: Path, texts: Sequence[Sequence[int]]) -> float:
    """See Note: [A threshold that no weight is near]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=max(SOURCES) + 1, dtype=torch.float64)
    near: list[torch.Tensor] = []

    def observe(call: attnrb.AttentionCall) -> None:
        if call.layer in SOURCES:
            keys = call.key.shape[2]
            identity = torch.eye(keys, dtype=call.key.dtype).expand(1, call.key.shape[1], keys, keys)
            weights = call.attention(identity)
            near.append(weights[(weights - 0.01).abs() < 1e-4])

    with attnrb.patch(model, Plain(), observer=observe), torch.no_grad():
        for text in texts:
            model(torch.tensor([list(text)]), use_cache=False)
    weights = torch.cat(near).sort().values
    gaps = weights.diff()
    widest = int(gaps.argmax())
    assert float(gaps[widest]) > 2 * NEAR
    return float(weights[widest] + gaps[widest] / 2)


def prompts(tokenizer: Any) -> list[list[int]]:
    licence = (Path(__file__).parents[2] / "LICENSE").read_text("utf-8")
    long = tokenizer(licence[2000:])["input_ids"]

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    return [
        ids("Three reasons to sleep well:"),
        long[:880] + ids("\n\nIn short, this licence says that"),
        ids("Water boils at"),
        long[:600] + ids("\n\nThe word contributor means"),
        ids("Once upon a time, in a small village by the sea, there lived an old fisherman who"),
        long[:450] + ids("\n\nQuestion: who may use the Work? Answer:"),
        ids("def fibonacci(n):\n"),
        long[700:840],
    ]


class Real:
    """The model, an engine that runs it, and the prompts with one span each."""

    def __init__(self, folder: Path) -> None:
        import attnrb.models

        self.model, tokenizer = attnrb.models.load()
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.model.generation_config.eos_token_id = None
        self.prompts = prompts(tokenizer)
        assert min(map(len, self.prompts)) <= 4
        assert max(map(len, self.prompts)) >= 880
        self.threshold = threshold_in_a_gap(folder, self.prompts)
        self.spans = [[[len(prompt) // 3, len(prompt) // 3 + 1 + len(prompt) // 20]] for prompt in self.prompts]

    def policy(self, name: str) -> dict[str, Any]:
        policy = POLICIES[name]
        return {**policy, "threshold": self.threshold} if policy["policy"] == "rebalance" else policy

    def options(self, policy: dict[str, Any]) -> list[Any]:
        marked = policy["policy"] == "emphasis"
        return [{**policy, "spans": own} if marked else policy for own in self.spans]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Real, Any]]:
    folder = tmp_path_factory.mktemp("smollm2")
    found = Real(folder)
    room: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 512 << 20}
    with engines.engine(folder, "off", **room) as llm:
        yield found, llm


@pytest.mark.parametrize("name", POLICIES)
def test_every_token_is_that_of_transformers(real: tuple[Real, Any], name: str) -> None:
    found, llm = real
    policy = found.policy(name)
    wanted = engines.reference(
        found.model, policy, found.prompts, found.spans if policy["policy"] == "emphasis" else None, NEW
    )
    for _ in range(2):  # the second time the prompts' keys are cached
        got = engines.asked(llm, found.prompts, found.options(policy), NEW)
        assert engines.differences(got, wanted) <= (0, MOST)


def test_strengths_that_change_nothing(real: tuple[Real, Any]) -> None:
    found, llm = real
    plain = engines.asked(llm, found.prompts, "off", NEW)
    assert engines.differences(plain, engines.reference(found.model, None, found.prompts, None, NEW)) <= (0, MOST)
    for policy in NOTHING:
        assert engines.differences(engines.asked(llm, found.prompts, found.options(policy), NEW), plain) <= (0, MOST)
    for name in POLICIES:  # and those of the tests above do change something
        others = engines.asked(llm, found.prompts, found.options(found.policy(name)), NEW)
        assert engines.differences(others, plain)[0] > 0
