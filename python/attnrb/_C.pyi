"""How the native library of attnrb was built, and what it runs on."""

version: str

def build_options() -> dict[str, str | list[str]]:
    """Compiler, build type, instruction sets built, nvcc and what it built for, torch whose headers, oldest served.

    ``cuda`` is the version of nvcc and ``cuda_targets`` the architectures; both are empty without the CUDA ops.
    """

def instruction_set() -> str:
    """The instruction set in use: the best one, or the one that the environment variable ATTNRB_CPU names."""

def instruction_sets() -> list[str]:
    """The instruction sets that this processor can run, lowest first."""

def outlier_capacity(threshold: float) -> int:
    """The most outliers a row can have: ``ceil(1 / threshold) - 1``."""

def scratch_bytes() -> int:
    """Bytes of working memory kept for the next call."""

def release_scratch() -> None:
    """Frees the working memory kept for the next call."""
