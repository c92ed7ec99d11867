"""SmolLM2 in float32: prompts of 4 to 900 tokens, batched, in parts of 128 tokens, with cached prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest

MOST = 1e-4  # between two engines' log-probabilities
NEW = 32

POLICIES: dict[str, dict[str, Any]] = {
    "published": {"policy": "rebalance", "alpha": 1.0},
    "normalised": {"policy": "rebalance", "alpha": 1.0, "normalize": True},
    "chosen": {"policy": "rebalance", "alpha": 1.0, "source_layer": 2, "heads": [0, 2, 5, 8]},
    "stronger": {"policy": "emphasis", "strength": 8},
    "weaker": {"policy": "emphasis", "strength": 0.25},
}
NOTHING: list[dict[str, Any]] = [{"policy": "rebalance", "alpha": 0}, {"policy": "emphasis", "strength": 1}]


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
        self.spans = [[[len(prompt) // 3, len(prompt) // 3 + 1 + len(prompt) // 20]] for prompt in self.prompts]

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
    policy = POLICIES[name]
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
    for policy in POLICIES.values():  # and those of the tests above do change something
        others = engines.asked(llm, found.prompts, found.options(policy), NEW)
        assert engines.differences(others, plain)[0] > 0
