"""Every error of the command line is one sentence, whatever raised it and where; a model's own settings work."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

from attnrb import models  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from attnrb.cli.console import print_json  # noqa: E402
from attnrb.policies import HeadProfile  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from saved_tiny_model import CHAT_TEMPLATE, TEXT, save_tiny_model, tiny_model, tiny_tokenizer  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run() -> Run:
    def run(*arguments: str | Path, **settings: Any) -> Result:
        environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
        return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, **settings)

    return run


def failed(result: Result, code: int = 1) -> str:
    """The error: one sentence on stderr behind the progress, and the exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line and not line.endswith("…")]
    assert len(lines) == 1, lines
    assert re.fullmatch(r"attnrb: .*[^.]\.", lines[0])
    return lines[0]


# ------------------------------------------------------------------------------------------------ any error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("a tensor went wrong\nException raised from here"),
            "RuntimeError: a tensor went wrong; attnrb did",
        ),
        (IndexError("index out of range in self"), "IndexError: index out of range in self; attnrb did not foresee"),
        (KeyError("layer"), "KeyError: 'layer'; attnrb did not foresee"),
        (AssertionError(), "AssertionError: ; attnrb did not foresee"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/a/b"), "'/data/a/b': Disk quota exceeded"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), "'/data/a': Permission denied"),
        (OSError("some device is gone"), "some device is gone"),
        (MemoryError(), "memory is short"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory is short (CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), "memory is short"),
        (SafetensorError("I/O error: File too large"), "SafetensorError: I/O error"),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), "a text cannot be read or written"),
        (ValueError(), "ValueError; and ATTNRB_DEBUG=1 shows"),
        (ValueError("depth: expected a positive number, got 0"), "depth: expected a positive number, got 0"),
        (models.ModelError("model: there is none"), "model: there is none"),
        (ImportError("this needs the package x"), "this needs the package x"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("command", ["generate", "compare", "analyze"])
def test_an_error_of_any_type(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception, words: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(models, "load", broken)
    arguments = ("--text-string", TEXT) if command == "analyze" else (TEXT,)
    assert words in failed(run(command, *arguments))
    monkeypatch.setenv("ATTNRB_DEBUG", "1")
    result = run(command, *arguments)
    assert result.exception is error  # and so the interpreter shows its traceback


def test_an_error_behind_the_work(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is printed is no part of the work, and has its own errors."""
    from attnrb.cli import render

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr(render, "comparison", broken)
    assert "the terminal is gone" in failed(run("compare", TEXT, "--model", folder, "-n", "2"))


def test_json_of_what_is_not_finite() -> None:
    for value in (float("nan"), float("inf"), [1.0, {"a": -float("inf")}]):
        with pytest.raises(ValueError, match=r"not finite, which JSON has not: .*try --dtype float32"):
            print_json({"value": value})


class Full(io.StringIO):
    """A stream on a full disk: it takes text, and fails where that has to be written out."""

    encoding = "utf-8"

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("arguments", [("info",), ("info", "--json"), ("info", "--report"), ("generate", "hi", "-n2")])
def test_a_full_disk_behind_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as ended:
        app([*arguments, *(("-m", str(folder)) if "hi" in arguments else ())])
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "attnrb: No space left on device."


@pytest.mark.parametrize("arguments", [("info",), ("info", "--json"), ("generate", "hi", "-n2"), ("generate", "-")])
def test_closed_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...]
) -> None:
    """As a shell's ``>&-`` and ``<&-`` leave them: without an output there is nothing to say, and no input to read."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        app([*arguments, *(() if "info" in arguments else ("-m", str(folder)))])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if arguments[-1] == "-":
        assert (ended.value.code, error) == (1, "attnrb: standard input is closed, so nothing can be read from it.\n")
    else:
        assert ended.value.code == 0


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("", False), ("1", True)])
def test_debugging_is_off_by_zero(run: Run, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool) -> None:
    monkeypatch.setenv("ATTNRB_DEBUG", value)
    result = run("generate", "-m", "/nowhere/at/all", "hi")
    assert result.exit_code == 1
    assert isinstance(result.exception, models.ModelError) is shown


def test_a_profile_that_cannot_be_written_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for options in (("--out", tmp_path / "a"), ("--html", tmp_path / "none" / "a.html")):
        assert "cannot be written" in failed(run("profile", *options, "-m", "/nowhere/at/all"))


@pytest.mark.parametrize("command", ["generate", "compare", "analyze", "info"])
def test_an_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    from attnrb.cli import about

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupted)
    monkeypatch.setattr(about, "about", interrupted)
    arguments = {"analyze": ("--text-string", TEXT), "info": ()}.get(command, (TEXT,))
    assert failed(run(command, *arguments), 130) == "attnrb: stopped."


def test_bad_usage_keeps_its_code(run: Run) -> None:
    result = run("generate", "--no-such-option")
    assert result.exit_code == 2
    assert "No such option" in result.output
    assert run("--version").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["torch", "typer", "rich"])
def test_an_interrupt_while_importing(tmp_path: Path, place: str) -> None:
    """Importing takes seconds, before any command runs; a package that interrupts stands for a person who does."""
    (tmp_path / f"{place}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    program = "import sys; sys.argv = ['attnrb', 'info']; from attnrb_command import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # A shell has its jobs in the background ignore interrupts, and so would this program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "attnrb: stopped.\n")


def test_the_program_hands_interrupts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnrb.cli
    import attnrb_command

    seen = []
    monkeypatch.setattr(attnrb.cli, "load", lambda: lambda: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    attnrb_command.main()
    assert seen == [before]
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------ weights and numbers


@pytest.mark.parametrize("command", ["generate", "compare", "analyze", "eval"])
def test_random_weights_are_refused_by_every_command(run: Run, tmp_path: Path, command: str) -> None:
    save_tiny_model(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "piqa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    arguments = {
        "analyze": ("--text-string", TEXT),
        "eval": ("--tasks", "piqa", "--data", tmp_path, "--run", tmp_path / "run.jsonl"),
    }.get(command, (TEXT, "-n", "2"))
    if command == "eval":
        pytest.importorskip("lm_eval")
    assert "lacks the weights lm_head.weight" in failed(run(command, *arguments, "--model", tmp_path / "m"))
    result = run(command, *arguments, "--model", tmp_path / "m", "--allow-missing")
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations exceed the range of float16, and are fine in float32."""
    path = tmp_path_factory.mktemp("broken")
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", TEXT, "-n", "2"),
        ("generate", TEXT, "-n", "2", "--temperature", "0.8"),
        ("generate", TEXT, "-n", "2", "--plain", "--json"),
        ("compare", TEXT, "-n", "2", "--json"),
        ("analyze", "--text-string", TEXT, "--json", "-"),
    ],
    ids=" ".join,
)
def test_activations_beyond_float16(run: Run, broken: Path, arguments: tuple[str, ...]) -> None:
    assert "not finite" in failed(run(*arguments, "--model", broken, "--dtype", "float16"))
    assert run(*arguments, "--model", broken).exit_code == 0


@pytest.mark.parametrize("command", ["demo", "profile", "study emphasis", "study rebalancing"])
def test_measurements_beyond_float16(run: Run, broken: Path, tmp_path: Path, command: str) -> None:
    """An answer whose likelihood is NaN is no wrong answer."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    options = {
        "demo": ("--items", "2", "--heads", tmp_path / "heads.json"),
        "profile": ("--count", "2", "--out", tmp_path / "out.json"),
    }.get(command, ("--quick", "--items", "2", "--run", tmp_path / "run.jsonl"))
    HeadProfile([[1.0] * 4] * 3, keep=2).save(tmp_path / "heads.json")
    result = run(*command.split(), *options, "--model", broken, "--dtype", "float16")
    assert result.exit_code == 1, result.output
    assert "logits are not finite" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", ["generate", "compare", "analyze"])
def test_a_tokenizer_of_more_tokens_than_the_model(run: Run, tmp_path: Path, command: str) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["turtle"])
    tokenizer.save_pretrained(tmp_path)
    arguments = ("--text-string", TEXT) if command == "analyze" else (TEXT, "-n", "2")
    message = failed(run(command, *arguments, "--model", tmp_path))
    assert "the model's embedding has 320 rows" in message
    assert "max_tokens" not in message


def test_a_user_without_a_home(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ATTNRB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert run("generate", TEXT, "-n", "2", "--model", folder).exit_code == 0
    assert run("info").exit_code == 0


# -------------------------------------------------------------------------------------------- a model's own settings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--temperature", text) for text in ("nan", "inf", "-1", "1e-300", "1e-7")),
        *(("--seed", str(number)) for number in (2**64, -(2**63) - 1)),
    ],
)
def test_numbers_that_sampling_cannot_take(run: Run, folder: Path, option: str, value: str) -> None:
    error = failed(run("generate", "-m", folder, "-n", "2", option, value, TEXT))
    assert error.startswith(f"attnrb: {option[2:]}: expected")


@pytest.mark.parametrize("value", ["1e-6", "1e300"])
def test_the_outermost_temperatures(run: Run, folder: Path, value: str) -> None:
    result = run("generate", "-m", folder, "-n", "2", "--temperature", value, "--seed", str(2**64 - 1), TEXT)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("template", ["{{ raise_exception('no user') }}", "{% if %}", "{{ messages[9].a.b }}"])
@pytest.mark.parametrize("prompt", ["plain", "((marked)) text"])
def test_a_chat_template_that_fails(run: Run, tmp_path: Path, template: str, prompt: str) -> None:
    save_tiny_model(tmp_path / "m", template)
    error = failed(run("generate", "-m", tmp_path / "m", "-n", "2", prompt))
    assert "chat: the model's chat template fails: " in error and "--no-chat" in error
    assert run("generate", "-m", tmp_path / "m", "-n", "2", "--no-chat", prompt).exit_code == 0


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["zzz"]},
        {"prompt_lookup_num_tokens": 3},
        {"max_length": 3},
        {"dola_layers": "low"},
        {"constraints": [1]},
        {"top_k": 5, "top_p": 0.5, "temperature": 0.2},
    ],
    ids=lambda own: "+".join(own),
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_settings_of_the_model_itself(
    run: Run, folder: Path, tmp_path: Path, command: str, own: dict[str, Any]
) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    arguments = (command, TEXT, "-n", "4", "--json")
    result = run(*arguments, "--model", tmp_path)
    assert result.exit_code == 0, result.output
    usual, found = json.loads(run(*arguments, "--model", folder).stdout), json.loads(result.stdout)
    texts = [(each, found[each]) if command == "compare" else ("", found) for each in ("plain", "rebalanced")]
    for name, text in texts:
        assert text["token_ids"] == (usual[name] if name else usual)["token_ids"]
    left_out = [name for name in ("num_beams", "num_return_sequences", "dola_layers", "constraints") if name in own]
    assert all(f"{name}={own[name]}" in result.stderr for name in left_out)
    assert "attnrb" in result.stderr if left_out else "attnrb:" not in result.stderr


def test_a_stop_string_of_the_model_stops(run: Run, folder: Path, tmp_path: Path) -> None:
    usual = json.loads(run("generate", TEXT, "-n", "8", "--json", "--model", folder).stdout)
    pieces = [tiny_tokenizer().decode([token]) for token in usual["token_ids"]]
    stop = next(piece for piece in pieces[1:] if piece.strip() and "\N{REPLACEMENT CHARACTER}" not in piece)
    save_tiny_model(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stop_strings": [stop]}))
    found = json.loads(run("generate", TEXT, "-n", "8", "--json", "--model", tmp_path).stdout)
    assert found["token_ids"] == usual["token_ids"][: pieces.index(stop) + 1]


def test_chat_with_a_lone_surrogate(run: Run, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, CHAT_TEMPLATE)
    for command in ("generate", "compare"):
        message = failed(run(command, "a \ud83d b", "--model", tmp_path))
        assert "prompt: expected text, but character 3 is U+D83D" in message
