"""The documentation is true: examples run, recipes work as written, links lead somewhere, the site is complete."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECIPES = DOCS / "recipes"


def examples(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# ----------------------------------------------------------------------------------------------------------- examples


def evaluation_data() -> None:
    """What docs/evaluation.md takes for granted: a folder with questions."""
    rows = [{"query": f"Which word comes after {word}?", "choices": [word, word + "s"], "gold": 1} for word in "abcd"]
    Path("data").mkdir()
    Path("data/siqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def finetuned() -> None:
    """What docs/finetuning.md takes for granted: an adapter and gains that an earlier run wrote."""
    import attnrb
    from attnrb.models import load
    from peft import LoraConfig, get_peft_model

    adapter = Path("finetune-lora/rebalanced-seed0/adapter")
    model, _ = load()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    attnrb.Rebalance().save_pretrained(adapter)
    attnrb.LearnedGains(load().model).save("finetune-gains/gains-seed0")


PREPARED: dict[str, tuple[str, Callable[[], None]]] = {
    "evaluation": ("lm_eval", evaluation_data),
    "finetuning": ("peft", finetuned),
    "vllm": ("vllm", lambda: None),
}
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if examples(page))


@pytest.mark.usefixtures("smollm2_folder")
@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_a_page_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    needed, prepare = PREPARED.get(name, ("torch", lambda: None))
    pytest.importorskip(needed, reason=f"the examples of docs/{name}.md need the package {needed}")
    prepare()
    names: dict[str, object] = {"__name__": f"docs_{name}"}
    for number, example in enumerate(examples(DOCS / f"{name}.md")):
        exec(compile(example, f"docs/{name}.md, example {number}", "exec"), names)


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.slow
def test_the_recipe_of_a_policy_gives_a_policy_that_passes_its_own_tests(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    policy, registration, tests = examples(RECIPES / "policy.md")
    (tmp_path / "scale_heads.py").write_text(policy, encoding="utf-8")
    (tmp_path / "test_recipe.py").write_text(tests, encoding="utf-8")
    # What the reader types into policies/__init__.py, without writing there; in a process of its own, since the
    # registry of policies lasts as long as the process.
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests' / 'python')!r}]\n"
        "import attnrb.policies\n"
        "import scale_heads\n"
        "sys.modules['attnrb.policies.scale_heads'] = scale_heads\n"
        f"exec({registration!r}, vars(attnrb.policies))\n",
        encoding="utf-8",
    )
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b6 passed", done.stdout), done.stdout


def test_the_file_of_a_recipe_s_policy_passes_the_linter() -> None:
    pytest.importorskip("ruff")
    text = examples(RECIPES / "policy.md")[0]
    place = ["--stdin-filename", str(ROOT / "python" / "attnrb" / "policies" / "scale_heads.py"), "-"]
    for what in (["check"], ["format", "--check"]):
        run = [sys.executable, "-m", "ruff", *what, *place]
        done = subprocess.run(run, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*.md")), ids=lambda page: page.stem)
def test_a_recipe_names_files_that_exist(page: Path) -> None:
    made_up = ("scale_heads", "sve2", "questions")
    named = re.findall(
        r"`((?:csrc|cuda|python|tests|docs|cmake|bench)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")
    )
    missing = [name for name in named if not (ROOT / name).exists() and not any(word in name for word in made_up)]
    assert not missing


# -------------------------------------------------------------------------------------------------------------- links


def is_there(path: Path) -> bool:
    """Whether it is a file, or the page that docs/notebooks.py makes of one."""
    return path.exists() or (path.parent.name == "notebooks" and path.with_suffix(".ipynb").exists())


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md")]),
    ids=lambda page: page.name,
)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^(```|    ).*?$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [each for each in targets if each and "://" not in each and not is_there(page.parent / each)]
    assert not missing


# ----------------------------------------------------------------------------------------------------------- the site

MODULES = (
    "attnrb",
    "attnrb.functional",
    "attnrb.policies",
    "attnrb.text",
    "attnrb.models",
    "attnrb.analysis",
    "attnrb.evaluation",
    "attnrb.hosts.vllm",
    "attnrb.protocols",
    "attnrb.reference",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs (pip install 'attnrb[docs]')")
    pytest.importorskip("material", reason="the site needs the extra docs (pip install 'attnrb[docs]')")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra docs (pip install 'attnrb[docs]')")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_the_site_shows_every_public_name(name: str, site: Path) -> None:
    module = importlib.import_module(name)
    page = (site / "api" / f"{name.removeprefix('attnrb.')}.html").read_text(encoding="utf-8")
    own = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == name]
    public = [each for each in getattr(module, "__all__", own) if not each.startswith("_")]
    assert public
    # A function that has the name of its module is shown by its full name, on one page.
    whole = "".join(each.read_text(encoding="utf-8") for each in (site / "api").glob("*.html"))

    def shown(public_name: str) -> bool:
        place = getattr(getattr(module, public_name), "__module__", None)
        return f'id="{name}.{public_name}"' in page or f'id="{place}.{public_name}"' in whole

    assert [each for each in public if not shown(each) and f"{name}.{each}" not in MODULES] == []


@pytest.mark.slow
def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    asks = re.compile(
        r'<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//|<link[^>]*\shref="?(?:https?:)?//(?![^>]*canonical)'
    )
    found = {page.name: asks.findall(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert {page: what for page, what in found.items() if what} == {}


@pytest.mark.slow
def test_the_reference_shows_no_markup_of_another_tool(site: Path) -> None:
    found = {
        page.name: re.findall(r":(?:func|class|mod|meth|attr):", page.read_text("utf-8")) for page in site.glob("api/*")
    }
    assert {page: roles for page, roles in found.items() if roles} == {}
