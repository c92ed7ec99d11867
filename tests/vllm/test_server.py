"""``attnrb serve`` on loopback: many clients with policies of their own, some of whom go away, and one who is wrong."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attnrb
import engines
import httpx
import pytest
import servers
import torch

NEW = 8
SECONDS = float(os.environ.get("ATTNRB_SERVER_SECONDS", "120"))
CLIENTS = 16
MOST_GROWTH = 128 << 20
"""Bytes by which the server may grow once it is warm: caches of tokens and of answers fill up, no more."""

TEXT = "Currently, the capital is Bern. ((The capital is Geneva.)) Which city is the capital"
LITERAL = "f((x)) is"


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def parts(chat: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same messages as lists of parts, as some clients send them."""
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]


@dataclass
class Job:
    """One request, and the tokens that transformers answers."""

    path: str
    body: dict[str, Any]
    wanted: list[int] = field(default_factory=list)


class Server:
    """A server, the model that it serves, and what it should answer."""

    def __init__(self, folder: Path) -> None:
        import attnrb.models
        from transformers import AutoModelForCausalLM, LlamaConfig

        _, self.tokenizer = attnrb.models.load()
        config = engines.tiny_config("llama").to_dict()
        config.update(vocab_size=len(self.tokenizer), hidden_size=64, head_dim=32, num_attention_heads=4)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).float().eval()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.model.generation_config.eos_token_id = None
        self.port = servers.free_port()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def ask(self, path: str, body: dict[str, Any]) -> httpx.Response:
        usual = {"model": "tiny", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return httpx.post(self.url(path), json={**usual, **body}, timeout=300)

    def answer(self, policy: attnrb.Policy | None, prompt: Any) -> list[int]:
        """By transformers: ``prompt`` is a marked text, messages, or tokens."""
        marked = prompt if isinstance(prompt, attnrb.text.Marked) else attnrb.mark(self.tokenizer, prompt)
        ids = marked.inputs["input_ids"]
        with torch.no_grad():
            if policy is None:
                said = self.model.generate(ids, max_new_tokens=NEW, do_sample=False)
            else:
                with attnrb.patch(self.model, policy) as patched, patched.spans(marked.spans, prompt=ids.shape[1]):
                    said = self.model.generate(ids, max_new_tokens=NEW, do_sample=False)
        return list(said[0, ids.shape[1] :].tolist())

    def jobs(self) -> list[Job]:
        chat = [{"role": "system", "content": "Be ((brief))."}, {"role": "user", "content": TEXT}]
        completions, chats = "/v1/completions", "/v1/chat/completions"
        literal = attnrb.text.escape_markup(LITERAL)
        plain = TEXT.replace("((", "").replace("))", "")
        rebalance = {"policy": "rebalance", "alpha": 1.5}
        start = plain.index("The capital is Geneva.")
        characters = [[start, start + len("The capital is Geneva.")]]
        strong, stronger = attnrb.Emphasis(), attnrb.Emphasis(strength=20)
        share = attnrb.Emphasis(share=0.4)
        return [
            Job(completions, {"prompt": TEXT}, self.answer(strong, TEXT)),
            Job(completions, {"prompt": TEXT, "attnrb": {"strength": 20}}, self.answer(stronger, TEXT)),
            Job(completions, {"prompt": plain, "attnrb": {"strength": 20, "characters": characters}},
                self.answer(stronger, TEXT)),
            Job(completions, {"prompt": TEXT, "attnrb": {"share": 0.4}}, self.answer(share, TEXT)),
            Job(completions, {"prompt": plain}, self.answer(None, plain)),
            Job(completions, {"prompt": LITERAL, "attnrb": "off"}, self.answer(None, literal)),
            Job(completions, {"prompt": LITERAL, "attnrb": {"markup": False}}, self.answer(None, literal)),
            Job(completions, {"prompt": plain, "attnrb": rebalance}, self.answer(attnrb.Rebalance(alpha=1.5), plain)),
            Job(completions, {"prompt": plain, "vllm_xargs": {"attnrb": json.dumps(rebalance)}},
                self.answer(attnrb.Rebalance(alpha=1.5), plain)),
            Job(chats, {"messages": chat}, self.answer(strong, chat)),
            Job(chats, {"messages": chat, "attnrb": {"strength": 20}}, self.answer(stronger, chat)),
            Job(chats, {"messages": parts(chat)}, self.answer(strong, chat)),
            Job(chats, {"messages": chat, "tools": TOOLS, "tool_choice": "none"}, self.answer(strong, chat)),
            Job(chats, {"messages": [{"role": "user", "content": plain}], "attnrb": rebalance},
                self.answer(attnrb.Rebalance(alpha=1.5), [{"role": "user", "content": plain}])),
        ]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    found = Server(folder)
    options = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 --block-size 32 --host 127.0.0.1 "
    options += "--served-model-name tiny --max-num-batched-tokens 64 --kv-cache-memory-bytes 256M"
    with servers.serving(folder, found.port, options.split(), folder / "log.txt"):
        yield found


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_each_way_of_asking(server: Server) -> None:
    jobs = server.jobs()
    for job in jobs:
        assert tokens_of(server.ask(job.path, job.body)) == job.wanted, job.body
    assert len({tuple(job.wanted) for job in jobs}) >= 6  # the policies say different things


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "((open"}, "opens a span that no"),
        ("/v1/completions", {"prompt": TEXT, "attnrb": {"strength": "much"}}, "strength: expected a number"),
        ("/v1/completions", {"prompt": TEXT, "attnrb": {"strenght": 2}}, "unknown 'strenght'"),
        ("/v1/completions", {"prompt": TEXT, "attnrb": "louder"}, "expected 'off'"),
        ("/v1/completions", {"prompt": [TEXT, TEXT]}, "one text in a request with markup"),
        ("/v1/completions", {"prompt": "x", "vllm_xargs": {"attnrb_alpha": 1.0}}, "all options of a request"),
        ("/v1/completions", {"prompt": "x", "vllm_xargs": {"attnrb": '{"alpha": 1'}}, "expected 'off'"),
        ("/v1/completions", {"prompt": "x", "attnrb": {"spans": [[0, 99]]}}, "tokens of the prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "((a"}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}, 3]}, "expected a dictionary"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": TEXT}], "chat_template": "{{ 1 }}"},
            "takes none from a request",
        ),
        ("/v1/responses", {"input": "x", "attnrb": {"strength": 2}}, "elsewhere options travel as JSON text"),
        ("/v1/completions", {"prompt": "x", "attnrb": {"policy": "rebalance", "threshold": 1e-9}}, "expected at least"),
    ],
)
def test_a_bad_request_gets_400_and_a_sentence(server: Server, path: str, body: dict[str, Any], said: str) -> None:
    response = server.ask(path, body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def memory() -> int:
    """Bytes that the server's processes hold: children of this one, and theirs."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(rest[1]), []).append(int(status.parent.name))
    waiting, total = list(parents.get(os.getpid(), [])), 0
    while waiting:
        each = waiting.pop()
        waiting += parents.get(each, [])
        try:
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def test_sixteen_clients_for_two_minutes(server: Server) -> None:
    jobs, wrong, answered, gone = server.jobs(), [], [0], [0]
    end, lock = time.monotonic() + SECONDS, threading.Lock()

    def client(number: int) -> None:
        numbers = random.Random(number)
        while time.monotonic() < end:
            job = numbers.choice(jobs)
            if number % 4 == 3 and numbers.random() < 0.5:  # goes away in the middle of an answer
                body = {**job.body, "model": "tiny", "max_tokens": 100, "ignore_eos": True, "stream": True}
                with httpx.stream("POST", server.url(job.path), json=body, timeout=300) as stream:
                    next(stream.iter_bytes(), None)
                with lock:
                    gone[0] += 1
                continue
            got = tokens_of(server.ask(job.path, job.body))
            with lock:
                answered[0] += 1
                if got != job.wanted:
                    wrong.append((job.body, got, job.wanted))

    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(client, number) for number in range(CLIENTS)]
        time.sleep(SECONDS / 3)
        before = memory()
        bad = server.ask("/v1/completions", {"prompt": "x", "attnrb": {"policy": "rebalance", "alpha": "strong"}})
        for each in running:
            each.result()
    assert bad.status_code == 400
    assert "alpha: expected a number" in bad.json()["error"]["message"]
    assert wrong == []
    assert answered[0] >= CLIENTS
    assert gone[0] > 0
    assert memory() - before < MOST_GROWTH
    test_each_way_of_asking(server)
