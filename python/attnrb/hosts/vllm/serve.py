"""Markup over HTTP: between the clients of vLLM's OpenAI server and the server, as a middleware that it loads itself.

Note: [Markup in a request]
The body of a request may have a field ``attnrb``: options of a policy, or ``"off"``. Markup in its prompt or messages
is resolved with the server's own tokenizer and chat template: the server gets the text without it, and the spans travel
in ``vllm_xargs`` with a digest of the tokens that they were made for. The engine compares it with the tokens it reads
(`attnrb.hosts.vllm.asked.Ask.of_options`), so that a template with other options there is an error and no other span.

Markup is read unless ``attnrb`` is ``"off"`` or has ``"markup": false``, as long as the policy of the request takes
spans: in an engine that re-balances, ``((`` is text.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attnrb.hosts.vllm.asked import KEY, OFF, digest, engine_policy, wants_spans
from attnrb.policies import Plain, Policy
from attnrb.text.mark import mark, spans
from attnrb.text.marked import Marked, batch_rows
from attnrb.text.markup import parse_markup

__all__ = ["Markup", "Resolver"]

Message = MutableMapping[str, Any]
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MOST_BYTES = 64 << 20


class Resolver:
    """Makes of a request with markup one that vLLM understands.

    Args:
        tokenizer: the server's.
        default: the engine's policy.
        chat_template: the server's own, in place of the tokenizer's; None: the tokenizer's.
        template_options: what the server gives every chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        default: Policy,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.default = default
        self.chat_template = chat_template
        self.template_options = dict(template_options or {})

    def resolve(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The body without markup and without the field ``attnrb``.

        Args:
            path: of the request.
            body: of a completion or chat completion, parsed.

        Raises:
            ValueError, TypeError: the markup or an option cannot be read. The message says why.
        """
        body = dict(body)
        options = _options(body)
        if options == OFF:
            return _with_options(body, OFF)
        if options is None and isinstance(self.default, Plain):
            return body
        chat = path.endswith(_CHAT)
        asked = dict(options or {})
        markup, characters = asked.pop("markup", True), asked.pop("characters", None)
        if not isinstance(markup, bool):
            raise TypeError(f"markup: expected true or false, got {markup!r}")
        if characters is not None:
            if chat or not isinstance(body.get("prompt"), str):
                raise ValueError("characters: expected with a prompt of one text")
            marked = spans(self.tokenizer, body["prompt"], characters, return_tensors=None)
        elif not markup or "spans" in asked or not wants_spans(asked, self.default):
            return body if options is None else _with_options(body, asked)
        else:
            found = self._chat(body) if chat else self._prompt(body)
            if found is None:
                return body if options is None else _with_options(body, asked)
            marked = found
        return _with_options(body, {**asked, **_placed(marked)})

    def _prompt(self, body: dict[str, Any]) -> Marked | None:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(isinstance(each, str) and _has_markup(each) for each in prompt):
            raise ValueError("prompt: expected one text in a request with markup: send the others by themselves")
        if not isinstance(prompt, str) or not _has_markup(prompt):
            return None
        options: dict[str, Any] = {"add_special_tokens": False} if body.get("add_special_tokens") is False else {}
        marked = mark(self.tokenizer, prompt, return_tensors=None, **options)
        body["prompt"] = marked.texts[0]
        return marked

    def _chat(self, body: dict[str, Any]) -> Marked | None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not any(_has_markup(text) for text in _texts(messages)):
            return None
        options = {**self.template_options, **(body.get("chat_template_kwargs") or {})}
        if template := body.get("chat_template") or self.chat_template:
            options["chat_template"] = template
        for name in ("tools", "documents", "continue_final_message", "reasoning_effort"):
            if body.get(name):
                options[name] = body[name]
        if body.get("add_special_tokens"):
            options["add_special_tokens"] = True
        start = bool(body.get("add_generation_prompt", True)) and not body.get("continue_final_message")
        marked = mark(self.tokenizer, messages, add_generation_prompt=start, return_tensors=None, **options)
        body["messages"] = [_without_markup(message) for message in messages]
        return marked


def _options(body: dict[str, Any]) -> Any:
    """The options of a body, taken out of it; None where it has none."""
    outer = body.pop(KEY, None)
    inner = (body.get("vllm_xargs") or {}).get(KEY) if isinstance(body.get("vllm_xargs"), Mapping) else None
    if outer is not None and inner is not None:
        raise ValueError(f"{KEY}: expected once, got it in vllm_xargs too")
    given = inner if outer is None else outer
    if isinstance(given, str) and given != OFF:
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"{KEY}: expected {OFF!r}, or options as a JSON object, got {given[:80]!r}") from None
    if given is not None and given != OFF and not isinstance(given, Mapping):
        raise TypeError(f"{KEY}: expected {OFF!r}, or options as a JSON object, got {type(given).__name__}")
    return given


def _with_options(body: dict[str, Any], options: Any) -> dict[str, Any]:
    text = options if isinstance(options, str) else json.dumps(options)
    return {**body, "vllm_xargs": {**(body.get("vllm_xargs") or {}), KEY: text}}


def _placed(marked: Marked) -> dict[str, Any]:
    (row,) = batch_rows(marked.inputs)
    placed = [
        [span.start - row.first, span.end - row.first] + ([] if span.strength is None else [span.strength])
        for span in marked.spans[0]
    ]
    return {"spans": placed, "tokens": digest(row.ids)}


def _has_markup(text: str) -> bool:
    return "((" in text or "))" in text


def _texts(messages: list[Any]) -> list[str]:
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            found.append(content)
        elif isinstance(content, list):
            found += [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
    return found


def _without_markup(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        content = parse_markup(content)[0]
    elif isinstance(content, list):
        content = [
            {**part, "text": parse_markup(part["text"])[0]}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    return {**message, "content": content} if "content" in message else dict(message)


class Markup:
    """ASGI middleware that ``attnrb serve`` adds: ``vllm serve M --middleware attnrb.hosts.vllm.serve.Markup``."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._resolver: Resolver | None = None
        # One thread: tokenizers are not made to be shared, and the server's event loop must not wait.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attnrb-markup")

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Serve one connection."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or scope.get("method") != "POST" or not path.endswith((_CHAT, _COMPLETIONS)):
            await self.app(scope, receive, send)
            return
        sent = await _read(receive)
        if sent is None:
            return
        try:
            body = json.loads(sent)
        except ValueError:
            body = None  # the server's own words are best
        if isinstance(body, dict):
            try:
                resolved = await asyncio.get_running_loop().run_in_executor(
                    self._worker, lambda: self._resolve(scope, path, body)
                )
            except (TypeError, ValueError) as error:
                await _answer(send, 400, str(error))
                return
            sent = json.dumps(resolved).encode()
        await self.app(_with_length(scope, len(sent)), _again(sent, receive), send)

    def _resolve(self, scope: Message, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._resolver is None:
            self._resolver = resolver_of(scope["app"].state)
        return self._resolver.resolve(path, body)


def resolver_of(state: Any) -> Resolver:
    """The resolver of a server of vLLM, from the state of its application."""
    from transformers import AutoTokenizer

    config = state.engine_client.vllm_config
    model, args = config.model_config, state.args
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    template = getattr(args, "chat_template", None)
    if template is not None:
        from vllm.renderers.chat_utils import load_chat_template

        template = load_chat_template(template)
    options = (config.additional_config or {}).get(KEY, OFF)
    return Resolver(tokenizer, engine_policy(options), template, getattr(args, "default_chat_template_kwargs", None))


async def _read(receive: Callable[[], Awaitable[Message]]) -> bytes | None:
    """The body of a request; None where the client went."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
    """A ``receive`` that gives this body first."""
    waiting = [body]

    async def received() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return received


def _with_length(scope: Message, length: int) -> Message:
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def _answer(send: Callable[[Message], Awaitable[None]], status: int, sentence: str) -> None:
    error = {"message": sentence, "type": "BadRequestError", "param": KEY, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
