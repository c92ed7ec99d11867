"""How fast a page of ``attnrb analyze`` answers in a browser: loading, and a step of the slider through the layers.

    attnrb analyze --text FILE --max-tokens 8000 --compare default --html page.html
    python bench/python/bench_page.py page.html

It needs the package playwright, and Chromium. A step is timed from the slider's event to the frame after it.
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a page of attnrb analyze")
    options = parser.parse_args(arguments)

    from playwright.sync_api import sync_playwright

    program = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name, screen in SCREENS.items():
            tab = browser.new_context(**screen).new_page()
            tab.set_default_timeout(60_000)
            start = time.perf_counter()
            tab.goto(options.page.absolute().as_uri())
            tab.wait_for_selector("html[data-ready]")
            seconds = time.perf_counter() - start
            times, tokens = tab.evaluate(STEPS)
            print(
                f"{name}: {tokens:,} tokens, loaded in {seconds:.1f} s; a step of the slider "
                f"{statistics.median(times):.0f} ms, {max(times):.0f} at most"
            )
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
