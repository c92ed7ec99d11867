"""Markup over HTTP: between the clients of vLLM's OpenAI server and the server, as a middleware that it loads itself.

Note: [Markup in a request]
The body of a request may have a field ``attnrb``: options of a policy, or ``"off"``. Markup in its prompt or messages
is resolved with the server's own tokenizer and chat template: the server gets the text without it, and the spans travel
in ``vllm_xargs`` with a digest of the tokens that they were made for. The engine compares it with the tokens it reads
(`attnrb.hosts.vllm.asked.Ask.of_options`), so that a template with other options there is an error and no other span.

Markup is read unless ``attnrb`` is ``"off"`` or has ``"markup": false``, as long as the policy of the request takes
spans: in an engine that re-balances, ``((`` is text. A request to another address that has the field is refused.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attnrb.hosts.vllm.asked import KEY, OFF, digest, engine_policy, wants_spans
from attnrb.hosts.vllm.chats import Chats, chats_of
from attnrb.policies import Plain, Policy
from attnrb.text.mark import mark, spans
from attnrb.text.marked import Marked, batch_rows
from attnrb.text.markup import parse_markup

__all__ = ["Markup", "Resolver"]

Message = MutableMapping[str, Any]
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MOST_BYTES = 64 << 20
_FIELD = f'"{KEY}"'.encode()


class Resolver:
    """Makes of a request with markup one that vLLM understands.

    Args:
        tokenizer: the server's.
        default: the engine's policy.
        chats: how the server reads chats.
    """

    def __init__(self, tokenizer: Any, default: Policy, chats: Chats | None = None) -> None:
        self.tokenizer = tokenizer
        self.default = default
        self.chats = Chats() if chats is None else chats

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
        messages, chats = body.get("messages"), self.chats
        if not isinstance(messages, list) or not any(_has_markup(text) for text in _texts(messages)):
            return None
        _check_messages(messages)
        given = _object(body, "chat_template_kwargs")
        template = body.get("chat_template") or chats.template
        if not chats.trusts_templates and (body.get("chat_template") or given.get("chat_template")) is not None:
            raise ValueError(
                "chat_template: this server takes none from a request: it was started without "
                "--trust-request-chat-template"
            )
        tools = chats.tools_of(body)
        options = {**chats.options, **given}
        if template is not None:
            options["chat_template"] = template
        for name in ("documents", "continue_final_message", "reasoning_effort"):
            if body.get(name):
                options[name] = body[name]
        if body.get("reasoning_effort") is not None:
            options.setdefault("enable_thinking", body["reasoning_effort"] != "none")
        if tools:
            options["tools"] = tools
        if body.get("add_special_tokens"):
            options["add_special_tokens"] = True
        start = bool(body.get("add_generation_prompt", True)) and not body.get("continue_final_message")
        read = chats.read_messages(messages, template, tools)
        marked = mark(self.tokenizer, read, add_generation_prompt=start, return_tensors=None, **options)
        body["messages"] = [_without_markup(message) for message in messages]
        return marked


def _options(body: dict[str, Any]) -> Any:
    """The options of a body, taken out of it; None where it has none."""
    outer = body.pop(KEY, None)
    inner = _object(body, "vllm_xargs").get(KEY)
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
    return {**body, "vllm_xargs": {**_object(body, "vllm_xargs"), KEY: text}}


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field of a body that is an object; an empty one where it is missing."""
    found = body.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise TypeError(f"{name}: expected an object, got {type(found).__name__}")
    return found or {}


def _placed(marked: Marked) -> dict[str, Any]:
    (row,) = batch_rows(marked.inputs)
    placed = [
        [span.start - row.first, span.end - row.first] + ([] if span.strength is None else [span.strength])
        for span in marked.spans[0]
    ]
    return {"spans": placed, "tokens": digest(row.ids)}


def _has_markup(text: str) -> bool:
    return "((" in text or "))" in text


def _texts(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [content]
        yield from (text for text in map(_text, parts) if text is not None)


def _text(part: Any) -> str | None:
    """The text of a part of a message's content; None where it is something else."""
    found = part.get("text") if isinstance(part, Mapping) else part
    return found if isinstance(found, str) else None


def _check_messages(messages: list[Any]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}]: expected a dictionary with role and content, got {message!r:.80}")
        content = message.get("content")
        for number, part in enumerate(content if isinstance(content, list) else []):
            if _text(part) is None:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"messages[{index}].content[{number}]: expected text beside markup, got {kind!r:.80}")


def _without_markup(message: Mapping[str, Any]) -> Mapping[str, Any]:
    def plain(part: Any) -> Any:
        text = _text(part)
        if text is None:
            return part
        read = parse_markup(text)[0]
        return {**part, "text": read} if isinstance(part, Mapping) else read

    if "content" not in message:
        return message
    content = message["content"]
    return {**message, "content": list(map(plain, content)) if isinstance(content, list) else plain(content)}


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
        if scope["type"] != "http" or scope.get("method") != "POST" or not _is_json(scope) or not _has_key(scope):
            await self.app(scope, receive, send)
            return
        try:
            sent = await _read(receive)
        except ValueError as error:
            await _answer(send, 413, str(error))
            return
        if sent is None:
            return
        try:
            sent = await self._resolved(scope, path, sent)
        except (TypeError, ValueError) as error:
            await _answer(send, 400, str(error))
            return
        await self.app(_with_length(scope, len(sent)), _again(sent, receive), send)

    async def _resolved(self, scope: Message, path: str, sent: bytes) -> bytes:
        """The body that the server gets."""
        served = path.endswith((_CHAT, _COMPLETIONS))
        if not served and _FIELD not in sent:
            return sent
        try:
            body = json.loads(sent)
        except (ValueError, RecursionError):
            return sent  # the server's own words are best
        if not isinstance(body, dict):
            return sent
        if not served:
            if KEY in body:
                raise ValueError(
                    f"{KEY}: expected in requests to {_CHAT} and {_COMPLETIONS}; elsewhere options travel as JSON text "
                    "in vllm_xargs, and markup is not read"
                )
            return sent
        resolve = functools.partial(self._resolve, scope, path, body)
        return await asyncio.get_running_loop().run_in_executor(self._worker, resolve)

    def _resolve(self, scope: Message, path: str, body: dict[str, Any]) -> bytes:
        if self._resolver is None:
            self._resolver = resolver_of(scope["app"].state)
        try:
            return json.dumps(self._resolver.resolve(path, body)).encode()
        except (AttributeError, LookupError, RecursionError) as error:  # of messages that are none, in a template
            raise ValueError(f"{KEY}: the request cannot be read: {type(error).__name__}: {error}") from error


def resolver_of(state: Any) -> Resolver:
    """The resolver of a server of vLLM, from the state of its application."""
    from transformers import AutoTokenizer

    config = state.engine_client.vllm_config
    model = config.model_config
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    options = (config.additional_config or {}).get(KEY, OFF)
    return Resolver(tokenizer, engine_policy(options), chats_of(model, state.args, tokenizer))


def _header(scope: Message, name: bytes) -> bytes | None:
    return next((value for each, value in scope["headers"] if each.lower() == name), None)


def _is_json(scope: Message) -> bool:
    """Whether a request has a JSON body, which servers assume where nothing is said."""
    kind = _header(scope, b"content-type")
    return kind is None or b"json" in kind.lower()


def _has_key(scope: Message) -> bool:
    """Whether a request has the server's key, if it wants one. Of another nothing is read: the server refuses it."""
    args = getattr(scope["app"].state, "args", None)
    keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
    scheme, _, token = (_header(scope, b"authorization") or b"").partition(b" ")
    right = [hmac.compare_digest(token, key.encode()) for key in keys]
    return not keys or (scheme.lower() == b"bearer" and any(right))


async def _read(receive: Callable[[], Awaitable[Message]]) -> bytes | None:
    """The body of a request; None where the client went.

    Raises:
        ValueError: it is too large.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            raise ValueError(f"{KEY}: expected a request of at most {_MOST_BYTES >> 20} MiB")
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
