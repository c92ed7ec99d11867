"""`attnrb.hosts.lm_eval.model` under the name that programs of version 0.1 import it by."""

from attnrb.hosts.lm_eval.model import AttnrbLM, Computed

__all__ = ["AttnrbLM", "Computed"]
