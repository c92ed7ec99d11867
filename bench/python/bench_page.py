"""How fast a page of ``attnrb analyze`` answers in a browser: loading, a step of the slider, and a click on a token.

    attnrb analyze --text FILE --max-tokens 8000 --compare default --html page.html
    python bench/python/bench_page.py page.html

or, for rows that are computed when they are asked for, with ``--serve --port 8000`` and ``http://127.0.0.1:8000/`` in
place of the file. It needs the package playwright, and Chromium. A step is timed from the slider's event to the frame
after it, a click until the token's row is on the screen.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1200, "height": 900}},
    "phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
}

STEPS = """async () => {
  const slider = document.getElementById("layer");
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  const times = [];
  for (let layer = 0; layer <= Number(slider.max); layer++) {
    await frame();
    const start = performance.now();
    slider.value = layer;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    await frame();
    times.push(performance.now() - start);
  }
  return [times, document.querySelectorAll("#text .t").length];
}"""


CLICKS = """async (count) => {
  const tokens = [...document.querySelectorAll("#text .t")];
  const stored = tokens.filter((token) => token.classList.contains("has-row"));
  const from = stored.length ? stored : tokens;
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  const times = [];
  for (let number = 1; number <= count; number++) {
    const token = from[Math.floor((number * from.length) / (count + 1))];
    token.scrollIntoView({ block: "center" });
    await frame();
    await frame();
    const start = performance.now();
    token.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    const there = () => token.classList.contains("query") && !document.getElementById("query-there").hidden;
    while (!there() && performance.now() - start < 10000) await new Promise((done) => setTimeout(done, 1));
    await frame();
    times.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 300));
  }
  return times;
}"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="a page of attnrb analyze: a file, or where it is served")
    options = parser.parse_args(arguments)

    from playwright.sync_api import sync_playwright

    program = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name, screen in SCREENS.items():
            tab = browser.new_context(**screen).new_page()
            tab.set_default_timeout(60_000)
            start = time.perf_counter()
            tab.goto(options.page if "://" in options.page else Path(options.page).absolute().as_uri())
            tab.wait_for_selector("html[data-ready]")
            seconds = time.perf_counter() - start
            times, tokens = tab.evaluate(STEPS)
            print(
                f"{name}: {tokens:,} tokens, loaded in {seconds:.1f} s; a step of the slider "
                f"{statistics.median(times):.0f} ms, {max(times):.0f} at most"
            )
            times = tab.evaluate(CLICKS, 12)
            print(f"{name}: a click on a token {statistics.median(times):.0f} ms, {max(times):.0f} at most")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
