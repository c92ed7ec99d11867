"""attnrb inside vLLM, which finds `attnrb.hosts.vllm.plugin` by itself. Importing this imports no vLLM.

    llm = LLM(model, additional_config={"attnrb": {"policy": "rebalance", "alpha": 0.2}})
    llm.generate(prompt, SamplingParams(extra_args={"attnrb": {"alpha": 1.0}}))

The page "vLLM" of the documentation has the options, what is exact and what is refused.
"""

from attnrb.hosts.vllm.requests import MarkedRequest, requests_of

__all__ = ["MarkedRequest", "requests_of"]
