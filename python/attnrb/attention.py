"""`attnrb.hosts.session.AttentionCall` under the name that programs of version 0.1 import it by."""

from attnrb.hosts.session import AttentionCall

__all__ = ["AttentionCall"]
