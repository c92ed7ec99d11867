"""Makes the model ``attnrb`` known to lm-evaluation-harness' own command, ``lm_eval --model attnrb``.

The harness (0.4) knows a model once somebody has imported it, and has no entry points. So this module stands beside the
package, with ``_attnrb_lm_eval.pth``, a line that Python runs as it starts: it imports this module where ``lm_eval`` is
in the command line of the process, and does nothing anywhere else. What it then does is wait: attnrb itself is imported
only when its model is asked for.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELS = "lm_eval.models"


class _Watch:
    """Sees the harness' models being imported, once, and adds ours to them."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            loader.exec_module = load_and_register
        return spec


def _register() -> None:
    try:
        from lm_eval.api.registry import model_registry

        if "attnrb" not in model_registry:
            model_registry.register("attnrb", target="attnrb.hosts.lm_eval.model:AttnrbLM")
    except Exception as error:  # whatever a harness of the future does, its own models are not to suffer
        print(
            f"attnrb: this lm_eval cannot be told of the model attnrb ({error!r}): use attnrb lm-eval", file=sys.stderr
        )


sys.meta_path.insert(0, _Watch())
