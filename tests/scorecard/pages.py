"""Hostile texts of tokens through every page, in a real browser.

    python tests/scorecard/pages.py --count 1000

Pages: the report of `attnrb analyze`, those of `attnrb eval` and `attnrb search`, and a marked batch as notebooks show
it. Some dozens of texts share a page: each stands for a token, a marked phrase, a group of items and a trial, and some
for the names of a model, an arm and a task. A fault is a dialog, a request, a word on the console, an element that a
text made, a variable that it set, or a text that is not there.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import draw
from row import ROOT, Tally, run

sys.path.insert(0, str(ROOT / "tests" / "python"))

import attnrb
from attnrb.analysis import AttentionReport, TextReport, analyze
from attnrb.evaluation.grid import evaluate
from attnrb.evaluation.page import page
from attnrb.evaluation.plan import Plan
from attnrb.evaluation.search_page import search_page
from attnrb.evaluation.trials import SearchPlan, search
from attnrb.hosts.lm_eval.model import AttnrbLM
from attnrb.reports.printable import printable
from attnrb.text import mark
from browser import browser, opened
from saved_tiny_model import TEXT, tiny_model, tiny_tokenizer
from tiny_evaluation import roomy_model, save_data

_ROWS_SHOWN = 16  # of a batch in a notebook
_A_PAGE = 96  # texts
_ARMS = 8
_FORBIDDEN = (
    "img, iframe, object, embed, link, base, form, input[autofocus], a[href^='javascript'], script[src], plaintext"
)


class Pages:
    """The reports that the texts are put into: made once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tiny_tokenizer()
        self.analysis = analyze(
            tiny_model(),
            self.tokenizer,
            [" ".join([TEXT] * 4), TEXT[:40]],
            compare=attnrb.Rebalance(alpha=0.5),
            model_name="MODEL",
        )
        assert len(self.analysis.texts[0].tokens) >= _A_PAGE
        lm = AttnrbLM(roomy_model(), tokenizer=self.tokenizer, plain=True)
        data = save_data(folder / "data")
        plan = Plan(("mmlu_anatomy", "siqa"), data, (attnrb.Rebalance(alpha=3.0),), "both", (0, 4), limit=3)
        self.evaluation: Any = evaluate(lm, plan, folder / "run.jsonl", model="MODEL")
        self.search: Any = search(
            lm, SearchPlan(("siqa",), data, evaluations=3, development=2), folder / "search.jsonl", model="MODEL"
        )

    def of_analysis(self, texts: list[str]) -> str:
        """The report with each token of the first text replaced, and the model's name."""
        report: AttentionReport = self.analysis
        first = report.texts[0]
        tokens = tuple(
            dataclasses.replace(token, text=texts[place % len(texts)]) for place, token in enumerate(first.tokens)
        )
        runs = tuple(
            dataclasses.replace(
                each, model=texts[0], sinks=tuple(dataclasses.replace(sink, text=texts[-1]) for sink in each.sinks)
            )
            for each in report.runs
        )
        whole = (TextReport("".join(texts), tokens), *report.texts[1:])
        return dataclasses.replace(report, texts=whole, runs=runs, notes=(texts[0],)).to_html()

    def of_evaluation(self, texts: list[str]) -> str:
        """The report with texts for its model, arms, groups, subjects, tasks and notes."""
        return page(_crowded(self.evaluation.to_dict(), texts))

    def of_search(self, texts: list[str]) -> str:
        """The same of a search, whose trials have texts for names too."""
        result = self.search.to_dict()
        trials = result["development"]["trials"]
        named = [
            {**trials[place % len(trials)], "number": place, "label": text, "pareto": place % 9 == 0}
            for place, text in enumerate(texts)
        ]
        held_out = _crowded(result["held_out"], texts)
        return search_page({**result, "development": {**result["development"], "trials": named}, "held_out": held_out})

    def of_marked(self, texts: list[str]) -> str:
        """A marked batch, as a notebook would show it."""
        texts = [text.replace("⟦", "").replace("⟧", "") for text in texts]
        shown = ""
        for first in range(0, len(texts), _ROWS_SHOWN):
            rows = [f"a ⟦{text} ⟧ b" for text in texts[first : first + _ROWS_SHOWN]]
            shown += mark(self.tokenizer, rows, open="⟦", close="⟧")._repr_html_()
        head = "<!DOCTYPE html><html><head><meta charset=utf-8><title>a</title></head>"
        return f"{head}<body>{shown}</body></html>"


def _crowded(report: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """A report that says these texts wherever it names something."""
    distinct = list(dict.fromkeys(texts))
    arm, more = texts[1 % len(texts)], distinct[2 : 2 + _ARMS]

    def groups(of: dict[str, Any], names: list[str]) -> dict[str, Any]:
        kinds = list(of.values())
        return {name: kinds[place % len(kinds)] for place, name in enumerate(names)}

    def named(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for part in parts:
            # A picture for each group would stand for every budget of computed tokens.
            names = distinct if part["prompting"] == "direct" else distinct[:2]
            every = {**part, "groups": groups(part["groups"], names)}
            if part.get("subjects"):
                every["subjects"] = groups(part["subjects"], distinct)
            found.append({**every, "arm": arm if part["arm"] != "plain" else "plain"})
            if part["arm"] != "plain":
                few = groups(part["groups"], distinct[:2])
                found += [{**every, "arm": each, "groups": few} for each in more]
        return found

    note = next(iter(report["tasks"].values()))
    return {
        **report,
        "model": texts[0],
        "results": named(report["results"]),
        "differences": named(report["differences"]),
        "tasks": {text: {**note, "note": text} for text in distinct},
    }


def _letters(text: str) -> str:
    """Without what stands for the end of a line, and without blanks."""
    return "".join(text.replace("⏎", "").split())


def attempt(tally: Tally, chromium: Any, make: Callable[[list[str]], str], texts: list[str], file: Path) -> int:
    """One page with these texts: how many elements it has of kinds that texts might add."""
    kind = make.__name__.removeprefix("of_")
    file.write_text(make(texts), "utf-8")
    with opened(chromium, file) as (tab, heard):
        if kind == "analysis":
            tab.wait_for_selector("html[data-ready=true]")
            shown = tab.locator("#text .t").all_text_contents()
            expected = [printable(texts[place % len(texts)]) for place in range(len(shown))]
            for came, wanted in zip(shown, expected, strict=True):
                assert _letters(came) == _letters(wanted), f"{came!r} is shown for {wanted!r}"
        else:
            body = _letters(tab.inner_text("body"))
            missing = [text for text in texts if _letters(printable(text))[:20] not in body]
            assert not missing, f"not shown: {missing!a}"
        tally.counts[f"pages of {kind}"] += 1
        assert tab.evaluate("typeof window.caught") == "undefined", "a text set a variable"
        assert tab.locator(_FORBIDDEN).count() == 0, "a text became an element"
        elements = tab.locator("script, style, meta, a, svg:not(.plot svg)").count()
        assert heard.dialogs == [] and heard.messages == [] and heard.requests == [], str(heard)
    return int(elements)


def work(tally: Tally) -> None:
    """All texts, some dozens a page, in one browser."""
    with tempfile.TemporaryDirectory() as place, browser() as chromium:
        pages = Pages(Path(place))
        makers = (pages.of_analysis, pages.of_marked, pages.of_evaluation, pages.of_search)
        harmless = Tally(0, 1, tally.seconds)
        names = [f"a{number}" for number in range(_A_PAGE)]
        plain = {make: attempt(harmless, chromium, make, names, Path(place) / "page.html") for make in makers}
        for seed in tally.seeds(_A_PAGE):
            end = min(seed + _A_PAGE, tally.seed * 10_000_000 + tally.count)
            texts = [draw(each) for each in range(seed, end)]
            tally.counts["texts"] += len(texts)
            for make in makers:
                try:
                    found = attempt(tally, chromium, make, texts, Path(place) / "page.html")
                    assert found == plain[make], f"{found} elements, {plain[make]} without the texts"
                except Exception as error:
                    line = " ".join(str(error).split())[:400]
                    tally.fault(f"{make.__name__}, seeds {seed} to {end - 1}: {type(error).__name__}: {line!a}")


if __name__ == "__main__":
    sys.exit(run("pages", __doc__, work, count=1000))
