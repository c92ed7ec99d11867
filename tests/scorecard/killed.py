"""kill -9 at random moments of an evaluation, a search, a training and a conversion, each started again until done.

    python tests/scorecard/killed.py --count 40

Each is started in a child that has torch and transformers loaded already, killed after a random part of the time that
it takes undisturbed, and started again; each kind of work gets as many kills. What a run's file held at a kill must be
in it after the next. At the end its results are compared with those of a run that nobody killed: every item once and
with the same answer, the same losses, the same weights.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from row import ROOT, Tally, run

sys.path[:0] = [str(ROOT / "tests" / "python"), str(ROOT / "examples")]

_RUN = "run.jsonl"
_LIMIT = 1200  # seconds for one undisturbed start


def in_child(work: Callable[[], None], log: Path, after: float | None) -> tuple[int, float]:
    """The exit code, and the seconds it took: of a child that is killed after so many seconds, or left alone."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    while time.monotonic() - begun < (_LIMIT if after is None else after):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - begun
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # a child so young that it leads no group yet has no children
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL, time.monotonic() - begun


class Work:
    """One kind of work in a folder: how it is done, and what came of it."""

    name = ""

    def __init__(self, given: Path) -> None:
        self.given = given
        self.finished: list[str] = []
        """The whole lines of a run's file when it was last looked at."""

    def do(self, folder: Path) -> None:
        """Do it, or go on with it."""
        raise NotImplementedError

    def result(self, folder: Path) -> Any:
        """What must be the same with and without kills. Raises AssertionError where something is there twice."""
        raise NotImplementedError

    def check_half(self, folder: Path) -> None:
        """What must hold right after a kill."""


class _CommandLine(Work):
    def options(self) -> list[str]:
        raise NotImplementedError

    def do(self, folder: Path) -> None:
        from attnrb.cli.app import app

        names = ["--run", folder / _RUN, "--json", folder / "out.json"]
        common = ["--data", self.given / "data", "-m", self.given / "roomy", "--batch-size", "1"]
        app([str(each) for each in (*self.options(), *common, *names)])

    def result(self, folder: Path) -> Any:
        self.check_half(folder)
        records = [json.loads(line) for line in self.finished]
        answers = {}
        for each in records:
            if "task" not in each:
                continue
            key = json.dumps([each["task"], each["item"], each["arm"], each["prompting"], each["budget"]])
            assert key not in answers, f"twice: {key}"
            answers[key] = [each.get("answer"), each.get("output"), each.get("loglikelihoods")]
        found = json.loads((folder / "out.json").read_text("utf-8"))
        return answers, found.get("results"), found.get("chosen"), found.get("differences")

    def check_half(self, folder: Path) -> None:
        """What was on disk at the last kill still is."""
        data = (folder / _RUN).read_bytes() if (folder / _RUN).exists() else b""
        whole = data[: data.rfind(b"\n") + 1].decode().split("\n")[:-1]
        assert whole[: len(self.finished)] == self.finished, "finished items are gone"
        self.finished = whole


class Evaluation(_CommandLine):
    """`attnrb eval` with answers that are generated, one at a time."""

    name = "evaluation"

    def options(self) -> list[str]:
        return ["eval", "-t", "siqa,gsm8k", "--prompting", "both", "--budgets", "12"]


class Search(_CommandLine):
    """`attnrb search`."""

    name = "search"

    def options(self) -> list[str]:
        return ["search", "-t", "siqa", "--evaluations", "4", "--development", "3"]


class Training(Work):
    """The fine-tuning study: two arms with checkpoints."""

    name = "training"

    def do(self, folder: Path) -> None:
        import typer
        from finetune_structured import main

        sizes = ["--held-out", "4", "--length", "32", "--evaluations", "2", "--analysis-texts", "1", "--alpha", "0.5"]
        options = ["--model", self.given / "tiny", "--data", self.given / "cards.jsonl", "--steps", "12", *sizes]
        application = typer.Typer()
        application.command()(main)
        application([str(each) for each in ("--output", folder / "study", *options)])

    def result(self, folder: Path) -> Any:
        report = json.loads((folder / "study" / "report.json").read_text("utf-8"))
        names = ("arm", "training", "held_out_curve", "held_out", "attention")
        return (
            report["before"],
            report["differences"],
            [{name: each[name] for name in names} for each in report["runs"]],
        )


class Conversion(Work):
    """Loading a GGUF file, which leaves a converted copy."""

    name = "conversion"

    def do(self, folder: Path) -> None:
        os.environ["ATTNRB_CACHE"] = str(folder / "cache")
        from attnrb.models import load

        load(str(self.given / "tiny.gguf"))

    def result(self, folder: Path) -> Any:
        os.environ["ATTNRB_CACHE"] = str(folder / "cache")
        from attnrb.models import load

        model = load(str(self.given / "tiny.gguf"))[0]
        copies = [path for path in (folder / "cache" / "models").iterdir() if not path.name.startswith(".")]
        assert len(copies) == 1, f"{len(copies)} copies"
        return {name: weight.tolist() for name, weight in model.state_dict().items()}

    def check_half(self, folder: Path) -> None:
        """A copy under its own name is whole: its manifest and every file that it lists."""
        from attnrb.models.gguf import _is_whole

        for path in (folder / "cache" / "models").glob("[!.]*"):
            assert _is_whole(path), f"{path.name} is half-written"


WORKS = (Evaluation, Search, Training, Conversion)


def kills_of(work: Work | type[Work]) -> str:
    """The figure that counts them."""
    return f"kills of {'an' if work.name[0] in 'aeiou' else 'a'} {work.name}"


def prepare(folder: Path) -> None:
    """Models and data, and in this process what every child needs."""
    import make_cards
    import saved_tiny_model as tiny
    import tiny_evaluation

    tiny_evaluation.save_data(folder / "data")
    tiny_evaluation.save_roomy_model(folder / "roomy")
    tiny.save_tiny_model(folder / "tiny")
    tiny.save_tiny_gguf(folder / "tiny.gguf")
    (folder / "cards.jsonl").write_text(make_cards.document(24))
    for name in ("lm_eval", "optuna", "plotly", "accelerate", "peft", "attnrb.cli.app", "attnrb.hosts.lm_eval.model"):
        importlib.import_module(name)


def undisturbed(work: Work, folder: Path) -> tuple[Any, float]:
    """What comes of it when nobody kills it, and the seconds it takes."""
    folder.mkdir()
    code, seconds = in_child(lambda: work.do(folder), folder / "log", None)
    assert code == 0, (folder / "log").read_text("utf-8")[-800:]
    return work.result(folder), seconds


def attempt(
    tally: Tally, work: Work, folder: Path, expected: Any, whole: float, kills: int, rng: random.Random
) -> None:
    """Kill it so often, let it end, and compare."""
    folder.mkdir()
    log = folder / "log"
    for _ in range(kills):
        code, _ = in_child(lambda: work.do(folder), log, rng.uniform(0.0, 0.9) * whole)
        if code == -signal.SIGKILL:
            tally.counts["kills"] += 1
            tally.counts[kills_of(work)] += 1
            work.check_half(folder)
        else:
            assert code == 0, log.read_text("utf-8")[-500:]
            tally.counts["starts that ended before the kill"] += 1
    code, _ = in_child(lambda: work.do(folder), log, None)
    assert code == 0, f"it does not go on: {' '.join(log.read_text('utf-8').split())[-500:]}"
    assert work.result(folder) == expected, "another result than without kills"


def work(tally: Tally) -> None:
    """Always the kind of work that was killed least so far, a few kills each time."""
    rng, most = random.Random(tally.seed), 5
    each = -(-tally.count // len(WORKS))
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / "given"
        given.mkdir()
        prepare(given)
        known: dict[str, tuple[Any, float]] = {}
        rounds = 0
        while not tally.over():
            chosen = min(WORKS, key=lambda work: tally.counts[kills_of(work)])
            kind = chosen(given)
            kills = min(most, each - tally.counts[kills_of(kind)])
            if kills <= 0:
                break
            folder = Path(place) / f"{rounds}-{kind.name}"
            try:
                if kind.name not in known:
                    known[kind.name] = undisturbed(chosen(given), Path(place) / kind.name)
                attempt(tally, kind, folder, *known[kind.name], kills, rng)
                tally.counts["runs that were killed and went on to the same result"] += 1
            except Exception as error:
                tally.fault(
                    f"{kind.name}, round {rounds}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
                )
                if kind.name not in known:
                    return
            rounds += 1


if __name__ == "__main__":
    sys.exit(run("killed", __doc__, work, count=40))
