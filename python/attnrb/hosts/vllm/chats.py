"""How a server of vLLM reads the messages of a chat, before its chat template does.

Spans are found in what the template writes, so it must be given here what it is given there: texts of several parts
joined to one where the template wants one, arguments of tools parsed, and what a client left out filled in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Chats", "chats_of"]


def _as_they_are(messages: Sequence[Any], template: str | None, tools: Any) -> list[Any]:
    return list(messages)


@dataclass(frozen=True)
class Chats:
    """How a server reads chats.

    Attributes:
        template: the server's own, in place of the tokenizer's; None: the tokenizer's.
        options: what the server gives every template.
        trusts_templates: whether a request may bring a template of its own, which is a program.
        drops_tools: whether tools are left out where ``tool_choice`` is ``"none"``.
        read_tools: of a request's, what the template gets.
        read_messages: likewise, of messages, the template and its tools.
    """

    template: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trusts_templates: bool = False
    drops_tools: bool = False
    read_tools: Callable[[Sequence[Any]], list[Any]] = list
    read_messages: Callable[[Sequence[Any], str | None, Any], list[Any]] = _as_they_are

    def tools_of(self, body: Mapping[str, Any]) -> list[Any] | None:
        """What the template gets of the tools of a request.

        Raises:
            TypeError, ValueError: they are none.
        """
        tools = body.get("tools")
        if not tools or (self.drops_tools and body.get("tool_choice") == "none"):
            return None
        if not isinstance(tools, list):
            raise TypeError(f"tools: expected a list, got {type(tools).__name__}")
        return self.read_tools(tools)


def chats_of(model: Any, args: Any, tokenizer: Any) -> Chats:
    """How a server with this model configuration, command line and tokenizer reads chats."""
    template = getattr(args, "chat_template", None)
    if template is not None:
        template = _chat_utils().load_chat_template(template)
    asked = getattr(args, "chat_template_content_format", "auto")

    def read_messages(messages: Sequence[Any], template: str | None, tools: Any) -> list[Any]:
        renderer = importlib.import_module("vllm.renderers.hf")
        form = renderer.resolve_chat_template_content_format(template, tools, asked, tokenizer, model_config=model)
        try:
            return list(_chat_utils().parse_chat_messages(list(messages), model, content_format=form)[0])
        except _client_error() as error:
            raise ValueError(f"messages: {error}") from error

    return Chats(
        template,
        dict(getattr(args, "default_chat_template_kwargs", None) or {}),
        bool(getattr(args, "trust_request_chat_template", False)),
        bool(getattr(args, "exclude_tools_when_tool_choice_none", False)),
        _read_tools,
        read_messages,
    )


def _read_tools(tools: Sequence[Any]) -> list[Any]:
    protocol = importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol")
    return [protocol.ChatCompletionToolsParam.model_validate(tool).model_dump() for tool in tools]


def _client_error() -> type[Exception]:
    """What vLLM raises for a request that is wrong; it is no ValueError."""
    found: type[Exception] = importlib.import_module("vllm.exceptions").VLLMValidationError
    return found


def _chat_utils() -> Any:
    """It moved with vLLM 0.32."""
    try:
        return importlib.import_module("vllm.renderers.chat_utils")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.entrypoints.chat_utils")
