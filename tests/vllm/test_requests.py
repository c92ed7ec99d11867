"""Requests with policies of their own in one engine: mixed, refused, cached, preempted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from attnrb import Emphasis, HeadProfile, LearnedGains, Policy, Rebalance
from attnrb.policies import ModelShape

MOST = 1e-4

POLICIES: list[dict[str, Any] | None] = [
    None,
    {"policy": "rebalance", "alpha": 0.2},
    {"policy": "rebalance", "alpha": 1.5, "normalize": True, "source_layer": 1},
    {"policy": "emphasis", "strength": 8},
    {"policy": "compose", "policies": [{"policy": "emphasis", "strength": 3}, {"policy": "rebalance", "alpha": 1.0}]},
]


def marked(policy: dict[str, Any] | None) -> bool:
    return policy is not None and policy["policy"] in ("emphasis", "compose")


def asking(policy: dict[str, Any] | None, spans: list[list[Any]]) -> Any:
    """What a request says to have this policy."""
    if policy is None:
        return "off"
    return {**policy, "spans": spans} if marked(policy) else policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return engines.tiny_model("llama", folder)


@pytest.fixture(scope="module")
def jobs(model: Any) -> tuple[list[list[int]], list[Any], list[engines.Answer]]:
    """20 requests of five policies, in an order that mixes them: prompts, options and what transformers says."""
    prompts = engines.tiny_prompts()[:4]
    spans = engines.spans_of(prompts)
    listed, options, wanted = [], [], []
    answers = [engines.reference(model, policy, prompts, spans if marked(policy) else None) for policy in POLICIES]
    for index, prompt in enumerate(prompts):
        for policy, said in zip(POLICIES, answers, strict=True):
            listed.append(prompt)
            options.append(asking(policy, spans[index]))
            wanted.append(said[index])
    return listed, options, wanted


@pytest.fixture(scope="module")
def llm(folder: Path, model: Any) -> Iterator[Any]:
    with engines.engine(folder, {"policy": "rebalance", "alpha": 0.2}) as started:
        yield started


def test_twenty_requests_of_five_policies_in_one_batch(llm: Any, jobs: Any) -> None:
    prompts, options, wanted = jobs
    for _ in range(2):
        assert engines.differences(engines.asked(llm, prompts, options), wanted) <= (0, MOST)
    assert len({tuple(answer.tokens) for answer in wanted}) > 10  # the policies say different things


def test_a_request_without_options_has_the_engines_policy(llm: Any, jobs: Any) -> None:
    prompts, options, wanted = jobs
    mine = [index for index, each in enumerate(options) if each == {"policy": "rebalance", "alpha": 0.2}]
    found = engines.asked(llm, [prompts[index] for index in mine])
    assert engines.differences(found, [wanted[index] for index in mine]) <= (0, MOST)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": "strong"}, "alpha: expected a number"),
        ({"policy": "emphasis", "spans": [[0, 99]]}, "expected tokens of the prompt, which has 5"),
        ({"policy": "sinks"}, "enable_chunked_prefill=False"),
        ("louder", "expected 'off', or options as a JSON object"),
    ],
)
def test_a_bad_request_is_its_own_affair(llm: Any, jobs: Any, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match="attnrb: ") as caught:
        engines.asked(llm, [[5, 6, 7, 8, 9]], options)
    assert said in str(caught.value)
    test_a_request_without_options_has_the_engines_policy(llm, jobs)


def test_a_flat_option_is_refused(llm: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    with pytest.raises(ValueError, match="attnrb_alpha: expected all options of a request in 'attnrb'"):
        llm.generate(TokensPrompt(prompt_token_ids=[5, 6]), SamplingParams(extra_args={"attnrb_alpha": 1.0}))


def test_the_same_policy_shares_cached_keys_and_another_does_not(llm: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    def cached(options: Any, prompt: list[int]) -> int:
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args={"attnrb": options})
        (said,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
        return int(said.num_cached_tokens or 0)

    prompt = [7 + each % 400 for each in range(130)]
    assert cached({"alpha": 0.9}, prompt) == 0
    assert cached({"alpha": 0.9}, prompt) >= 96
    assert cached('{"alpha": 0.9}', prompt) >= 96
    assert cached({"alpha": 0.8}, prompt) == 0
    assert cached("off", prompt) == 0
    assert cached({"alpha": 0}, prompt) >= 96  # edits nothing, as "off"
    assert cached({"policy": "emphasis", "spans": [[3, 5]]}, prompt) == 0
    assert cached({"policy": "emphasis", "spans": [[3, 6]]}, prompt) == 0
    assert cached({"policy": "emphasis", "spans": [[3, 6]]}, prompt) >= 96
    assert cached({"policy": "emphasis"}, prompt) >= 96  # no spans: nothing to edit


def test_several_answers_to_one_request(llm: Any, jobs: Any) -> None:
    """And parameters that are used again are as they were."""
    from vllm import SamplingParams, TokensPrompt

    prompts, options, wanted = jobs
    chosen = [index for index, each in enumerate(options) if isinstance(each, dict) and marked(each)][:2]
    for index in chosen:
        given = {"attnrb": dict(options[index])}
        # One of one token is the greedy one, and vLLM has several answers for sampling only.
        params = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=16, ignore_eos=True, detokenize=False,
                                extra_args=given)  # fmt: skip
        for _ in range(2):
            prompt = TokensPrompt(prompt_token_ids=list(prompts[index]))
            (said,) = llm.generate([prompt], params, use_tqdm=False)
            assert [list(each.token_ids) for each in said.outputs] == [wanted[index].tokens] * 3
        assert params.extra_args == {"attnrb": options[index]}


# From here on each test has engines of its own, whose end takes that of the tests above with it.


def test_gains_that_were_learned_and_heads_of_a_profile(folder: Path, model: Any, tmp_path: Path) -> None:
    shape = ModelShape(4, 4)
    gains = LearnedGains(shape, Rebalance(alpha=0.7)).requires_grad_(False)
    gains.gains.copy_(torch.linspace(-0.5, 2.0, gains.gains.numel()).view_as(gains.gains))
    gains.save(tmp_path / "gains")
    scores = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)).tolist()
    profile = HeadProfile(scores, keep=6)
    profile.save(tmp_path / "profile.json")
    prompts = engines.tiny_prompts()
    spans = engines.spans_of(prompts)
    learned = engines.reference(model, gains, prompts)
    chosen = engines.reference(model, Emphasis(strength=6, heads=profile), prompts, spans)
    with engines.engine(folder, {"policy": "learned_gains", "path": str(tmp_path / "gains")}) as started:
        assert engines.differences(engines.asked(started, prompts), learned) <= (0, MOST)
    with engines.engine(
        folder, {"policy": "emphasis", "strength": 6, "heads": str(tmp_path / "profile.json")}
    ) as started:
        for _ in range(2):
            options = [{"spans": own} for own in spans] + [gains.to_dict()] * len(prompts)
            found = engines.asked(started, prompts * 2, options)
            assert engines.differences(found, chosen + learned) <= (0, MOST)
        plain = engines.asked(started, prompts, "off")
    assert engines.differences(plain, learned) > (0, 10 * MOST)
    assert engines.differences(plain, chosen) > (0, 10 * MOST)


def test_preempted_requests_go_on_as_they_were(folder: Path, model: Any) -> None:
    prompts = [[3 + (7 * each + 11 * start) % 500 for each in range(50 + start)] for start in range(2)]
    spans, new = engines.spans_of(prompts), 48
    listed, options, wanted = [], [], []
    for policy in POLICIES:
        wanted += engines.reference(model, policy, prompts, spans if marked(policy) else None, new)
        listed += prompts
        options += [
            "off" if policy is None else {**policy, "spans": own} if marked(policy) else policy for own in spans
        ]
    # Eight requests run at once: two blocks of 32 tokens each as they start, and four as they end.
    block = 32 * 4 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, width, bytes
    room: dict[str, Any] = {"kv_cache_memory_bytes": 20 * block, "max_model_len": 320, "disable_log_stats": False}
    with engines.engine(folder, "off", **room) as small:
        found = engines.asked(small, listed, options, new)
        metrics = {each.name: each.value for each in small.get_metrics() if hasattr(each, "value")}
    assert metrics["vllm:num_preemptions"] > 0
    assert engines.differences(found, wanted) <= (0, MOST)


def test_sinks_are_found_in_whole_prompts(folder: Path, model: Any) -> None:
    prompts = engines.tiny_prompts()
    policy = {"policy": "sinks", "threshold": 0.03, "first_key": 0.5}
    wanted = engines.reference(model, Policy.from_dict(policy), prompts)
    options: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": 512}
    with engines.engine(folder, policy, **options) as whole:
        for _ in range(2):
            assert engines.differences(engines.asked(whole, prompts), wanted) <= (0, MOST)
    assert engines.differences(engines.reference(model, None, prompts), wanted) > (0, 10 * MOST)


def test_an_engine_that_asks_for_nothing_is_vllms_own(folder: Path, model: Any) -> None:
    prompts = engines.tiny_prompts()
    with engines.engine(folder) as plain:
        assert engines.differences(engines.asked(plain, prompts), engines.reference(model, None, prompts)) <= (0, MOST)
        layers = plain.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert all(layer.impl.attnrb is None for layer in layers)
        with pytest.raises(ValueError, match="was started without attnrb"):
            engines.asked(plain, prompts[:1], {"alpha": 1.0})
