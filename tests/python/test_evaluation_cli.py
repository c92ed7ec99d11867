"""``attnrb eval``, ``search`` and ``lm-eval``: files, resumption, a page that escapes, and errors in one sentence."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

for package in ("typer", "lm_eval", "optuna", "plotly"):
    pytest.importorskip(package)

from attnrb.cli.app import app  # noqa: E402
from saved_tiny_model import tiny_model  # noqa: E402
from tiny_evaluation import PAIRS, save_data, save_roomy_model, save_task  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roomy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
        return CliRunner().invoke(app, [str(each) for each in arguments], env=environment)

    return run


def failed(result: Result) -> str:
    """The error: one sentence on stderr after the steps, exit code 1."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…") and " answers, " not in line]
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(r"attnrb: .*[^.][.?]", lines[0])
    return lines[0]


def test_writes_json_csv_and_html(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    tasks = "mmlu_anatomy,mmlu_sociology,siqa"
    files = ("--json", "out.json", "--csv", "out.csv", "--html", "out.html")
    result = run("eval", "-t", tasks, "--data", data, "-m", model, "--prompting", "both", "--budgets", "0,6", *files)
    assert result.exit_code == 0, result.output
    assert "two-choice form" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert found["seed"] == 0
    assert found["environment"]["attnrb"]
    assert found["environment"]["lm_eval"]
    assert found["peak_memory"]["resident"] > 1 << 20
    assert found["tasks"]["siqa"]["sha256"]
    assert [(each["arm"], each["label"]) for each in found["results"]] == [
        (arm, label) for label in ("direct", "cot 0", "cot 6") for arm in ("plain", "alpha=0.2")
    ]
    for each in found["results"]:
        assert list(each["groups"]) == ["stem", "non_stem", "mmlu", "siqa"]
        assert list(each["subjects"]) == ["mmlu_anatomy", "mmlu_sociology"]
        low, high = each["groups"]["stem"]["wilson"]
        assert 0 <= low <= each["groups"]["stem"]["accuracy"] <= high <= 1
    assert [each["computed_tokens"]["mean"] for each in found["results"]] == [0, 0, 0, 0, 6, 6]
    for each in found["differences"]:
        assert each["arm"] == "alpha=0.2"
        for group in each["groups"].values():
            assert {"mcnemar", "bootstrap", "holm", "verdict", "needed_items"} <= group.keys()
    assert len(found["correction"]["over"]) == 3 * 4

    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 6
    assert {row["group"] for row in rows} == {"stem", "non_stem", "mmlu", "siqa", "mmlu_anatomy", "mmlu_sociology"}

    page = (tmp_path / "out.html").read_text("utf-8")
    assert "Content-Security-Policy" in page
    assert not re.search(r"<(?:script|link|img)[^>]*\b(?:src|href)=", page)
    assert "Accuracy against computed tokens" in page
    records = [json.loads(line) for line in (tmp_path / "out.items.jsonl").read_text("utf-8").splitlines()]
    assert sum("task" in record for record in records) == 6 * (10 + PAIRS)


def test_the_terminal_has_figures_and_no_paragraphs(run: Run, data: Path, model: Path) -> None:
    configs = ("--config", "alpha=2,threshold=0.05", "--config", "default")
    result = run("eval", "-t", "siqa,piqa", "--data", data, "-m", model, "--limit", "3", *configs, "--run", "r.jsonl")
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert re.fullmatch(r"((Better|Worse|No difference shown) in \d of 4 comparisons.*)+", first)
    heads = [line.split() for line in rest if line.strip().startswith("tasks")]
    assert [each[-1] for each in heads] == ["mean", "found"]
    told = [line for line in rest if re.search(r"no difference shown|improves|worsens", line)]
    assert len(told) == 4
    assert all(re.search(r"[+−]\d+\.\d .*[+−]\d+\.\d to [+−]\d+\.\d", line) for line in told)
    assert max(len(line) for line in rest if not line.startswith("siqa: ")) <= 100  # a note wraps by itself


def test_goes_on_where_it_was(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    command = ("eval", "-t", "siqa", "--data", data, "-m", model, "--json", "out.json")
    assert run(*command, "--limit", "2").exit_code == 0
    first = (tmp_path / "out.items.jsonl").read_bytes().count(b'"task":')
    assert run(*command).exit_code == 0
    assert (first, (tmp_path / "out.items.jsonl").read_bytes().count(b'"task":')) == (4, 2 * PAIRS)
    again = run(*command)
    assert "12 of 12 answers" in again.stderr
    assert (tmp_path / "out.items.jsonl").read_bytes().count(b'"task":') == 2 * PAIRS


# attnrb, killed by itself right after its fifth answer is written: no clock decides where.
KILLED = """
import os, signal

write, written = os.write, 0

def write_and_die(handle, content):
    global written
    size = write(handle, content)
    written += content.count(b'"task":')
    if written >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return size

os.write = write_and_die
from attnrb.cli import main

main()
"""


@pytest.mark.slow
def test_a_kill_loses_nothing(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["eval", "-t", "siqa,gsm8k", "--data", data, "-m", model, "--batch-size", "1"]
    arguments += ["--prompting", "both", "--budgets", "30", "--run", tmp_path / "run.jsonl"]
    arguments += ["--json", tmp_path / "out.json"]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    kept = (tmp_path / "run.jsonl").read_bytes().count(b"\n")
    finished = run(*arguments)
    assert finished.exit_code == 0, finished.output
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text("utf-8").splitlines()]
    keys = [(r["task"], r["item"], r["arm"], r["prompting"], str(r["budget"])) for r in records if "task" in r]
    assert len(keys) == len(set(keys)) == 2 * 2 * (PAIRS + 3)
    assert len(records) > kept


def test_json_on_standard_output(run: Run, data: Path, model: Path) -> None:
    result = run("eval", "-t", "siqa", "--data", data, "-m", model, "--limit", "1", "--run", "r.jsonl", "--json", "-")
    assert json.loads(result.stdout)["results"][0]["groups"]["siqa"]["items"] == 1


def test_several_configurations(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"alpha": 0.5, "normalize": true}', "utf-8")
    configs = ("--config", "alpha=2,threshold=0.05", "--config", "c.json", "--config", "default")
    result = run("eval", "-t", "siqa", "--data", data, "-m", model, "--limit", "2", *configs, "--json", "o.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "o.json").read_text("utf-8"))
    assert [each["arm"] for each in found["differences"]] == [
        "alpha=2,threshold=0.05",
        "alpha=0.5,normalize=true",
        "alpha=0.2",
    ]


def test_hostile_names_stay_text(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    folder = tmp_path / hostile.replace("/", "")
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    result = run(
        "eval", "-t", "siqa", "--data", data, "-m", folder, "--limit", "1", "--html", "o.html", "--run", "r.jsonl"
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "o.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--model", "./nowhere"), "./nowhere"),
            (("--data", "./nowhere"), "data: there is no folder 'nowhere'"),
            (("--tasks", "mmlu_virology"), "there is no file .*virology_test.csv"),
            (("--tasks", ","), "tasks: expected at least one"),
            (("--prompting", "loud"), "prompting: expected direct, cot or both, got 'loud'"),
            (("--budgets", "64"), "budgets: expected --prompting cot or both"),
            (("--prompting", "cot", "--budgets", "6,x"), "budgets: expected numbers like 0,64,128"),
            (("--prompting", "cot", "--min-computed", "9", "--max-computed", "8"), "min_computed: expected from 0"),
            (("--prompting", "cot", "--budgets", "4000"), "leave no room"),
            (("--batch-size", "0"), "batch_size: expected auto, or a number"),
            (("--shots", "99"), "shots: siqa has 6 items"),
            (("--config", "alpha=x"), "alpha: expected a number"),
            (("--config", "beta=1"), "unknown 'beta'"),
            (("--config", "layers=1-99"), "layers: the model's layers are 0 to 2"),
            (("--threshold", "2"), "threshold: expected a number between 0 and 1"),
            (("--json", "nowhere/o.json"), "there is no folder 'nowhere'"),
            (("--dtype", "int3"), "dtype: expected one of"),
        ],
    )
    def test_options(self, run: Run, data: Path, model: Path, arguments: tuple[str, ...], message: str) -> None:
        usual = {"--tasks": "siqa", "--data": str(data), "--model": str(model)}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        merged = [part for pair in {**usual, **given}.items() for part in pair]
        assert re.search(message, failed(run("eval", *merged)))

    def test_malformed_row(self, run: Run, model: Path, tmp_path: Path) -> None:
        folder = save_data(tmp_path / "bad")
        with (folder / "mmlu" / "anatomy_test.csv").open("a", encoding="utf-8") as file:
            file.write("a question,with,too,few\n")
        message = failed(run("eval", "-t", "mmlu_anatomy", "--data", folder, "-m", model))
        assert "anatomy_test.csv, line 7: expected 6 fields (question, four choices, letter), got 4" in message

    def test_unknown_task(self, run: Run, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import lm_eval.tasks

        class Manager:
            all_tasks = ("hellaswag", "piqa")

            def __init__(self, include_path: str | None) -> None:
                pass

        monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
        message = failed(run("eval", "-t", "sica", "--data", data, "-m", model))
        assert "there is no task 'sica'" in message
        assert "did you mean siqa" in message
        assert failed(run("eval", "-t", "piqqa", "--data", data, "-m", model)).endswith("did you mean piqa or siqa?")

    def test_no_tokenizer(self, run: Run, data: Path, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path / "untold")
        assert "no tokenizer" in failed(run("eval", "-t", "siqa", "--data", data, "-m", tmp_path / "untold"))

    def test_earlier_results_are_kept(self, run: Run, data: Path, model: Path, tmp_path: Path) -> None:
        command = ("eval", "-t", "siqa", "--data", data, "-m", model, "--limit", "1", "--json", "o.json")
        assert run(*command).exit_code == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert "was made with dtype" in failed(run(*command, "--dtype", "bfloat16"))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    def test_a_file_that_cannot_be_used_is_said_before_the_model_is_read(
        self, run: Run, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("eval", "-t", "siqa", "--data", data, "-m", model, "--limit", "1", "--json", "o.json")
        assert run(*command).exit_code == 0

        def read(*_: object, **__: object) -> None:
            raise AssertionError("the model was read first")

        monkeypatch.setattr("attnrb.hosts.lm_eval.model.AttnrbLM", read)
        assert "was made with chat False and not True" in failed(run(*command, "--chat"))
        with (tmp_path / "o.items.jsonl").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert "'o.items.jsonl' is in use by another run" in failed(run(*command))

    def test_a_missing_package_of_the_extra(self, run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        message = failed(run("eval", "-t", "siqa", "--data", data))
        assert message == "attnrb: this needs the package datasets: run `pip install 'attnrb[eval]'`."

    def test_report_on_a_full_disk(
        self, run: Run, data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, content: str | bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("attnrb.reports.files.write_whole", full)
        result = run("eval", "-t", "siqa", "--data", data, "-m", model, "--limit", "1", "--json", "o.json")
        assert result.exit_code == 1
        assert "'o.json' could not be written: No space left on device" in result.stderr
        assert (tmp_path / "o.items.jsonl").read_bytes().count(b'"task":') == 2


def test_search_reports_on_held_out_items(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    command = ("search", "-t", "siqa,piqa", "--data", data, "-m", model, "-n", "4", "--development", "2")
    result = run(*command, "--json", "s.json", "--html", "s.html")
    assert result.exit_code == 0, result.output
    assert "On held-out items" in result.stdout
    found = json.loads((tmp_path / "s.json").read_text("utf-8"))
    trials = found["development"]["trials"]
    assert len(trials) == 4
    assert trials[0]["label"] == "alpha=0.2"  # the default setting is always among them
    assert any(trial["pareto"] for trial in trials)
    assert max(trial["accuracy"] for trial in trials) == next(
        trial["accuracy"] for trial in trials if trial["config"] == found["chosen"]
    )
    for each in found["held_out"]["results"]:
        assert each["groups"]["siqa"]["items"] == PAIRS - 2
    assert "Trials, on the development split" in (tmp_path / "s.html").read_text("utf-8")
    size = (tmp_path / "s.items.jsonl").read_bytes().count(b'"task":')
    assert run(*command, "--json", "s.json").exit_code == 0
    assert (tmp_path / "s.items.jsonl").read_bytes().count(b'"task":') == size  # the same settings, already answered
    assert json.loads((tmp_path / "s.json").read_text("utf-8"))["chosen"] == found["chosen"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--development", "6"), "development: siqa has 6 items, which leaves none held out"),
        (("--data", "./nowhere"), "data: there is no folder 'nowhere'"),
        (("--tasks", "mmlu_virology"), "there is no file .*virology_test.csv"),
        (("--model", "./nowhere"), "./nowhere"),
        (("--alpha", "1,0"), "alpha: expected a lower and a higher bound"),
        (("--alpha", "1"), "alpha: expected two numbers like 0,1, got '1'"),
        (("--threshold", "0,1"), "threshold: expected a number between 0 and 1"),
        (("--most-source-layer", "9"), "most_source_layer: this model has layers 0 to 2, got 9"),
        (("--html", "nowhere/s.html"), "html: .* cannot be written: there is no folder 'nowhere'"),
    ],
)
def test_errors_of_a_search(run: Run, data: Path, model: Path, arguments: tuple[str, ...], message: str) -> None:
    usual = {"--tasks": "siqa", "--data": str(data), "--model": str(model), "--development": "2", "-n": "1"}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    merged = [part for pair in {**usual, **given}.items() for part in pair]
    assert re.search(message, failed(run("search", *merged)))


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness without its ten thousand tasks, which take it seconds to list."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.mark.usefixtures("own_tasks_alone")
class TestHarnessTasks:
    def test_a_task_file_with_items_from_a_file(self, run: Run, model: Path, tmp_path: Path) -> None:
        tasks = save_task(tmp_path / "tasks")
        command = ("eval", "-t", "colours", "--include-path", tasks, "-m", model, "--json", "o.json")
        result = run(*command)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "o.json").read_text("utf-8"))
        assert [each["groups"]["colours"]["items"] for each in found["results"]] == [PAIRS, PAIRS]
        records = [json.loads(line) for line in (tmp_path / "o.items.jsonl").read_text("utf-8").splitlines()[1:]]
        assert all(record["gold"] == "ABC"[record["item"] % 3] for record in records)
        assert all(len(record["loglikelihoods"]) == 3 for record in records)

    def test_shots_reach_its_prompts(self, model: Path, tmp_path: Path) -> None:
        from attnrb.evaluation import AttnrbLM
        from attnrb.evaluation.runner import prepare
        from attnrb.evaluation.selection import Cell, select

        tasks = save_task(tmp_path / "tasks")
        lm = AttnrbLM(str(model), plain=True)
        for shots in (0, 2):
            selected = select(["colours"], None, include_path=tasks, shots=shots)
            for question in prepare(lm, selected, [Cell("direct")]):
                assert question.context.count("Answer:") == 1 + shots

    def test_offline(self, run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub.constants

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        tasks = save_task(tmp_path / "tasks")
        task = json.loads((tasks / "colours.yaml").read_text("utf-8"))
        task |= {"dataset_path": "nobody/colours", "dataset_kwargs": None}
        (tasks / "colours.yaml").write_text(json.dumps(task), "utf-8")
        message = failed(run("eval", "-t", "colours", "--include-path", tasks, "-m", model))
        assert "tasks: the items of 'colours' could not be loaded" in message
        assert "nobody/colours" in message
        assert "name a folder of files with --data" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--include-path", "nowhere"), "include_path: there is no folder 'nowhere'"),
            (("--prompting", "cot"), "prompting: colours has the harness' own prompt"),
            (("--generated",), "generated: colours is asked as the harness does"),
        ],
    )
    def test_what_it_cannot_do(
        self, run: Run, model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        tasks = save_task(tmp_path / "tasks")
        result = run("eval", "-t", "colours", "--include-path", tasks, "-m", model, *arguments)
        assert message in failed(result)


def test_the_harness_knows_the_model() -> None:
    from attnrb.evaluation import AttnrbLM
    from lm_eval.api.registry import get_model

    assert get_model("attnrb") is AttnrbLM
