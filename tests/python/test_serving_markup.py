"""Markup in the body of a request: what the server gets instead, and what is answered without it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import attnrb
import pytest
from attnrb import Emphasis, Policy, Rebalance
from attnrb.hosts.vllm import serve
from attnrb.hosts.vllm.asked import Ask, digest
from attnrb.hosts.vllm.chats import Chats
from attnrb.hosts.vllm.serve import Markup, Resolver
from attnrb.policies import ModelShape, Plain
from text_tokenizers import byte_level

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<|quick|>{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT, PLAIN = "The cat ((sat on)) the mat", "The cat sat on the mat"


def joined(messages: Any, template: str | None, tools: Any) -> list[Any]:
    """As a server reads messages whose template knows no parts."""
    return [
        {**each, "content": "\n".join(part["text"] for part in each["content"])}
        if isinstance(each["content"], list)
        else each
        for each in messages
    ]


def resolver(default: Policy | None = None, **options: Any) -> Resolver:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    return Resolver(tokenizer, Emphasis() if default is None else default, Chats(**options))


def asked(body: dict[str, Any]) -> Any:
    text = body["vllm_xargs"]["attnrb"]
    return text if text == "off" else json.loads(text)


def marked_words(made: Resolver, options: dict[str, Any], tokens: list[int]) -> list[str]:
    """The spans as text, once the engine has admitted them for these tokens."""
    ask = Ask.of_options(options, made.default, ModelShape(4, 4), tokens)
    assert ask is not None
    return [made.tokenizer.decode(tokens[span.start : span.end]).strip() for span in ask.spans]


def test_a_completion_loses_its_markup() -> None:
    made = resolver()
    body = made.resolve(COMPLETIONS, {"prompt": TEXT, "attnrb": {"strength": 3}, "vllm_xargs": {"other": 1}})
    assert body["prompt"] == PLAIN
    assert "attnrb" not in body
    assert body["vllm_xargs"]["other"] == 1
    tokens = list(made.tokenizer(PLAIN)["input_ids"])
    assert asked(body)["tokens"] == digest(tokens)
    assert marked_words(made, asked(body), tokens) == ["sat on"]


@pytest.mark.parametrize("content", [TEXT, [{"type": "text", "text": "Say:"}, {"type": "text", "text": TEXT}]])
def test_a_chat_loses_its_markup(content: Any) -> None:
    made = resolver(read_messages=joined)
    sent = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]}
    body = made.resolve(CHAT, json.loads(json.dumps(sent)))
    plain = json.loads(json.dumps(sent).replace("((", "").replace("))", ""))
    assert body["messages"] == plain["messages"]
    text = made.tokenizer.apply_chat_template(
        joined(plain["messages"], None, None), tokenize=False, add_generation_prompt=True
    )
    tokens = list(made.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert marked_words(made, asked(body), tokens) == ["sat on"]


def test_a_chat_is_rendered_with_the_options_of_the_request() -> None:
    made = resolver(read_tools=lambda tools: [{**tool, "strict": None} for tool in tools], drops_tools=True)
    messages, tools = [{"role": "user", "content": TEXT}], [{"type": "function"}]
    plain = [{"role": "user", "content": PLAIN}]

    def tokens(**options: Any) -> list[int]:
        text = made.tokenizer.apply_chat_template(plain, tokenize=False, **options)
        return list(made.tokenizer(text, add_special_tokens=False)["input_ids"])

    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {}),
        ({"tools": tools}, {"add_generation_prompt": True, "tools": [{"type": "function", "strict": None}]}),
        ({"tools": tools, "tool_choice": "none"}, {"add_generation_prompt": True}),
        ({"reasoning_effort": "none"}, {"add_generation_prompt": True, "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"add_generation_prompt": True, "enable_thinking": True},
        ),
    ]
    for body, options in cases:
        assert asked(made.resolve(CHAT, {"messages": messages, **body}))["tokens"] == digest(tokens(**options)), body


def test_what_is_left_alone() -> None:
    assert resolver().resolve(COMPLETIONS, {"prompt": PLAIN}) == {"prompt": PLAIN}
    assert resolver(Rebalance()).resolve(COMPLETIONS, {"prompt": TEXT}) == {"prompt": TEXT}
    assert resolver(Plain()).resolve(COMPLETIONS, {"prompt": TEXT}) == {"prompt": TEXT}
    off = resolver().resolve(COMPLETIONS, {"prompt": TEXT, "attnrb": "off"})
    assert (off["prompt"], asked(off)) == (TEXT, "off")
    literal = resolver().resolve(CHAT, {"messages": [{"role": "user", "content": TEXT}], "attnrb": {"markup": False}})
    assert (literal["messages"][0]["content"], asked(literal)) == (TEXT, {})
    tokens = resolver().resolve(COMPLETIONS, {"prompt": [5, 6, 7], "attnrb": {"spans": [[0, 1]]}})
    assert (tokens["prompt"], asked(tokens)) == ([5, 6, 7], {"spans": [[0, 1]]})


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COMPLETIONS, {"prompt": "((open"}, "opens a span that no"),
        (COMPLETIONS, {"prompt": [TEXT, TEXT]}, "one text in a request with markup"),
        (COMPLETIONS, {"prompt": TEXT, "attnrb": 3}, "expected 'off', or options as a JSON object, got int"),
        (COMPLETIONS, {"prompt": TEXT, "attnrb": {"markup": "no"}}, "markup: expected true or false"),
        (COMPLETIONS, {"prompt": [5], "attnrb": {"characters": [[0, 1]]}}, "characters: expected with a prompt of one"),
        (COMPLETIONS, {"prompt": PLAIN, "attnrb": {"characters": [[0, 99]]}}, "expected 0 <= start < end <= 22"),
        (COMPLETIONS, {"prompt": TEXT, "vllm_xargs": "x"}, "vllm_xargs: expected an object, got str"),
        (COMPLETIONS, {"prompt": "a", "attnrb": {}, "vllm_xargs": {"attnrb": "off"}}, "expected once"),
        (CHAT, {**user(TEXT), "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got list"),
        (CHAT, {**user(TEXT), "tools": "x"}, "tools: expected a list, got str"),
        (CHAT, {**user(TEXT), "chat_template": "{{ 1 }}"}, "takes none from a request"),
        (CHAT, {**user(TEXT), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "takes none from a request"),
        (CHAT, user([{"type": "text", "text": TEXT}, {"type": "image_url"}]), "expected text beside markup, got"),
        (CHAT, {"messages": [*user(TEXT)["messages"], 7]}, "messages[1]: expected a dictionary"),
    ],
)  # fmt: skip
def test_mistakes_are_named(path: str, body: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        resolver().resolve(path, body)
    assert said in str(caught.value)


def test_a_template_of_a_request_runs_where_the_server_trusts_it() -> None:
    own = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    body = resolver(trusts_templates=True).resolve(CHAT, {**user(TEXT), "chat_template": own})
    assert asked(body)["tokens"] == digest(list(byte_level()(PLAIN)["input_ids"]))


# What a middleware does with whole requests.


def request(body: bytes, path: str, made: Resolver, monkeypatch: pytest.MonkeyPatch, kind: bytes = b"application/json",
            parts: int = 1, key: str | None = None, given: str | None = None) -> tuple[int, Any, Any]:  # fmt: skip
    """Status, JSON that was answered, and the body that came through to the server."""
    sent, came = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        whole = message["body"]
        while message.get("more_body"):
            message = await receive()
            whole += message["body"]
        assert not lengths or lengths == [len(whole)]
        came.append(whole)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    size = -(-len(body) // parts)
    waiting = [body[at : at + size] for at in range(0, len(body), size)] or [b""]

    async def receive() -> Any:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setattr(serve, "resolver_of", lambda state: made)
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if given is not None:
        headers.append((b"authorization", given.encode()))
    server = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=None if key is None else [key])))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": server}
    asyncio.run(Markup(app)(scope, receive, send))
    answer = json.loads(sent[1]["body"])
    return sent[0]["status"], answer, came[0] if came else None


def test_a_request_comes_through_without_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": TEXT, "attnrb": {"strength": 2}}).encode()
    status, _, came = request(body, "/root" + COMPLETIONS, resolver(), monkeypatch, parts=3)
    assert status == 200
    assert json.loads(came)["prompt"] == PLAIN


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"{", COMPLETIONS),
        (b"\xff", COMPLETIONS),
        (b"[]", CHAT),
        (b"[" * 100_000, CHAT),
        (json.dumps({"input": TEXT}).encode(), "/v1/responses"),
        (b'{"input": "\\"attnrb\\" is a word"}', "/tokenize"),
        (b'["attnrb"]', "/tokenize"),
    ],
)
def test_what_is_not_attnrbs_goes_through_as_it_came(body: bytes, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert request(body, path, resolver(), monkeypatch)[::2] == (200, body)


def test_other_bodies_go_through_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": TEXT, "attnrb": "x"}).encode()
    assert request(body, COMPLETIONS, resolver(), monkeypatch, kind=b"multipart/form-data")[::2] == (200, body)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (COMPLETIONS, {"prompt": "((open"}, 400, "opens a span that no"),
        ("/v1/responses", {"input": "x", "attnrb": {"strength": 2}}, 400, "expected in requests to /v1/chat/compl"),
        ("/v1/messages", {"attnrb": "off"}, 400, "markup is not read"),
        (COMPLETIONS, {"prompt": "x" * 2000, "attnrb": "off"}, 413, "at most 0 MiB"),
        (CHAT, {"messages": [{"content": TEXT, "role": {}}]}, 400, ""),
    ],
)
def test_what_is_wrong_is_answered(
    path: str, body: dict[str, Any], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_MOST_BYTES", 1000)
    made = resolver()
    made.tokenizer.chat_template = "{{ messages[0]['role']['missing']['twice'] }}"
    got, answer, came = request(json.dumps(body).encode(), path, made, monkeypatch)
    assert (got, came) == (status, None)
    assert answer is not None
    assert answer["error"]["code"] == status
    assert said in answer["error"]["message"]
    assert answer["error"]["message"]


@pytest.mark.parametrize("given", [None, "Bearer other", "Basic key", "Bearer ", "key", "Bearer kéy"])
def test_nothing_is_read_for_clients_without_the_key(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": "((open"}).encode()
    assert request(body, COMPLETIONS, resolver(), monkeypatch, key="key", given=given)[::2] == (200, body)
    monkeypatch.setenv("VLLM_API_KEY", "key")
    assert request(body, COMPLETIONS, resolver(), monkeypatch, given=given)[::2] == (200, body)


def test_clients_with_the_key_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": "((open"}).encode()
    assert request(body, COMPLETIONS, resolver(), monkeypatch, key="key", given="bearer key")[0] == 400


def test_a_client_that_goes_away_is_no_request() -> None:
    reached: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    server = SimpleNamespace(state=SimpleNamespace())
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "app": server}
    asyncio.run(Markup(app)(scope, receive, lambda message: None))  # type: ignore[arg-type,return-value]
    assert reached == []


def test_markup_is_that_of_attnrb_mark() -> None:
    made = resolver()
    text = "A ((cat ((sat:2)):3)) here"
    spans = attnrb.mark(made.tokenizer, text, return_tensors=None).spans[0]
    found = asked(made.resolve(COMPLETIONS, {"prompt": text}))["spans"]
    assert found == [[each.start, each.end] + ([] if each.strength is None else [each.strength]) for each in spans]
