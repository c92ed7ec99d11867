"""Where a request enters the engine: what it asks for is checked and written down, and its cached keys get their salt.

Here a mistake is answered: vLLM makes HTTP 400 of a ValueError, and the other requests do not notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnrb.hosts.vllm.asked import KEY, OFF, Ask, engine_policy
from attnrb.hosts.vllm.refusals import shape_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

    from attnrb.policies.base import ModelShape, Policy

__all__ = ["Admission", "admit", "asked_for", "options_of"]


def options_of(config: Any) -> Any:
    """The options of attnrb in an engine's ``additional_config``; None: vLLM runs as it is."""
    options = getattr(config, "additional_config", None)
    return options.get(KEY) if isinstance(options, dict) else None


class Admission:
    """The requests of one engine, as they come in.

    Attributes:
        default: the policy of requests that do not ask for another.
        shape: of the model, all heads.
        whole_prompts: whether a prompt is always read in one step.
    """

    default: Policy
    shape: ModelShape
    whole_prompts: bool

    def __init__(self, config: VllmConfig) -> None:
        """Raises ValueError where the engine's options are no policy, or one that does not fit the model."""
        self.default = engine_policy(options_of(config))
        self.shape = shape_of(config)
        self.whole_prompts = not config.scheduler_config.enable_chunked_prefill
        if self.default.resolve(self.shape).keeps:
            self._check_whole(self.default)

    def admit(self, request: EngineCoreRequest) -> None:
        """Check what a request asks for, and write into it what the engine needs to know.

        Raises:
            ValueError: it cannot be served; the message says why.
        """
        params = request.sampling_params
        if params is None:
            raise ValueError(f"{KEY}: this engine edits attention, which is not served for pooling")
        extra = dict(params.extra_args or {})
        _check_names(extra)
        tokens = request.prompt_token_ids
        if tokens is None:
            raise ValueError(f"{KEY}: prompts of embeddings are not served: give text or tokens")
        ask = Ask.of_options(extra.get(KEY), self.default, self.shape, tokens)
        params.extra_args = {**extra, KEY: OFF if ask is None else ask.to_text()}
        if ask is None:
            return
        request.cache_salt = (request.cache_salt or "") + ask.salt()
        if ask.sequence is not None:
            self._check_whole(ask.plan(self.shape))
            params.skip_reading_prefix_cache = True

    def _check_whole(self, what: Any) -> None:
        if not self.whole_prompts:
            raise ValueError(
                f"{KEY}: this policy looks at the whole prompt where it is read, which needs an engine with "
                "enable_chunked_prefill=False (--no-enable-chunked-prefill)"
            )


def admit(config: VllmConfig, request: EngineCoreRequest) -> None:
    """`Admission.admit` by the engine with this configuration.

    Raises:
        ValueError: the request cannot be served, or asks for attnrb in an engine that was started without.
    """
    if options_of(config) is None:
        extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        _check_names(extra)
        if KEY in extra:
            raise ValueError(
                f"{KEY}: this engine was started without attnrb: start it with additional_config={{'attnrb': 'off'}}, "
                "or with a policy"
            )
        return
    admission = vars(config).get(_ADMISSION)
    if admission is None:
        admission = vars(config)[_ADMISSION] = Admission(config)
    admission.admit(request)


def asked_for(params: Any) -> str | None:
    """The text of what an admitted request asks for; None where nothing is edited.

    Raises:
        RuntimeError: the request was not admitted.
    """
    text = (params.extra_args or {}).get(KEY)
    if text is None:
        raise RuntimeError(
            f"{KEY}: a request came to the model that did not pass attnrb's admission, so its policy is not known: "
            "this version of vLLM takes requests in by a way that attnrb does not know"
        )
    return None if text == OFF else str(text)


_ADMISSION = "_attnrb_admission"


def _check_names(extra: dict[str, Any]) -> None:
    if mistaken := sorted(name for name in extra if name.startswith(KEY) and name != KEY):
        raise ValueError(
            f"{mistaken[0]}: expected all options of a request in {KEY!r}: a mapping, or over HTTP in vllm_xargs a "
            f'JSON text, {{"{KEY}": "{{\\"strength\\": 8}}"}}'
        )
