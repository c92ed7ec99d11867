"""Continuous batching, ``generate_batch``: under a patch it says what ``generate`` says of each prompt."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch
import transformers
from attnrb import Emphasis, LearnedGains, Rebalance, SinkDamping
from attnrb.policies import ModelShape
from tiny_models import LAYERS, tiny, tokens

pytestmark = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="generate_batch tells attention less before transformers 5.23",
)
NEW = 12
MOST = 1e-4
"""Between log-probabilities by two orders of additions, of logits whose size is 10 or so."""


def model_of(name: str = "llama") -> Any:
    model = tiny(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts() -> list[list[int]]:
    """Of 1 to 70 tokens, two of which begin alike: by whole pages, so that their keys are shared."""
    long = tokens(1, 70, seed=3)[0].tolist()
    return [tokens(1, 9, seed=1)[0].tolist(), long, [5], [*long[:40], *tokens(1, 11, seed=4)[0].tolist()], long[20:50]]


def batched(model: Any, asked: list[list[int]], *, persistent: bool = False) -> list[Any]:
    """What continuous batching says: pages of 8 tokens, 24 tokens a step, so that prompts are read in parts."""
    config = transformers.ContinuousBatchingConfig(
        page_size=8, num_blocks=80, max_batch_tokens=24, return_logprobs=True
    )
    return list(
        model.generate_batch(
            asked,
            continuous_batching_config=config,
            generation_config=transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
            persistent_manager=persistent,
        ).values()
    )


def one_by_one(model: Any, asked: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    found = []
    for prompt in asked:
        said = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = [float(each.log_softmax(-1).max()) for each in said.scores]
        found.append((said.sequences[0, len(prompt) :].tolist(), scores))
    return found


def learned() -> LearnedGains:
    gains = LearnedGains(ModelShape(LAYERS, 4), Rebalance(alpha=0.7)).requires_grad_(False)
    gains.gains.copy_(torch.linspace(-0.5, 2.0, gains.gains.numel()).view_as(gains.gains))
    return gains


@pytest.mark.parametrize(
    "policy",
    [
        Rebalance(alpha=1.5),
        Rebalance(alpha=1.5, normalize=True, source_layer=1, heads=(0, 2)),
        pytest.param("learned", id="learned"),
    ],
)
def test_every_answer_is_that_of_generate(policy: Any) -> None:
    model, asked = model_of(), prompts()
    plain = one_by_one(model, asked)
    with attnrb.patch(model, learned() if policy == "learned" else policy) as patched:
        wanted = one_by_one(model, asked)
        before = patched.stats.outliers
        found = batched(model, asked)
        assert patched.stats.outliers > before
    assert [each.generated_tokens for each in found] == [said for said, _ in wanted]
    for each, (_, scores) in zip(found, wanted, strict=True):
        assert each.logprobs == pytest.approx(scores, abs=MOST)
    assert wanted != plain


def test_a_model_without_its_patch_is_as_before() -> None:
    model, asked = model_of(), prompts()
    wanted = [each.generated_tokens for each in batched(model, asked)]
    with attnrb.patch(model, Rebalance(alpha=1.5)):
        batched(model, asked)
    assert [each.generated_tokens for each in batched(model, asked)] == wanted


@pytest.mark.parametrize(
    ("name", "policy", "options", "said"),
    [
        ("llama", Emphasis(strength=4), {}, "no spans can be"),
        ("llama", SinkDamping(threshold=0.1), {}, "looks at texts one by one"),
        ("llama", Rebalance(), {"observer": lambda call: None}, "an observer"),
        ("mistral", Rebalance(), {}, "this one has windows"),
    ],
)
def test_what_is_not_served_fails_by_name(name: str, policy: Any, options: dict[str, Any], said: str) -> None:
    model = model_of(name)
    with attnrb.patch(model, policy, **options):
        found = batched(model, prompts()[:2])
    assert found
    for each in found:
        assert not each.generated_tokens
        assert said in str(each.error)


def test_keys_of_another_policy_are_not_shared() -> None:
    model, asked = model_of(), prompts()

    def again() -> list[Any]:
        return batched(model, asked, persistent=True)

    with attnrb.patch(model, Rebalance(alpha=1.5)) as patched:
        wanted = [said for said, _ in one_by_one(model, asked)]
        for _ in range(2):  # the second time with keys of the first
            assert [each.generated_tokens for each in again()] == wanted
        patched.update(alpha=0.5)
        assert all("another policy" in str(each.error) for each in again())
        model.destroy_cached_continuous_batching_manager()
        assert [each.generated_tokens for each in again()] == [said for said, _ in one_by_one(model, asked)]
    model.destroy_cached_continuous_batching_manager()
