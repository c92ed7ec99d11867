"""The operations on plain tensors, under their public name; `attnrb.ops.functional` holds them."""

from attnrb.ops.functional import *  # noqa: F403
from attnrb.ops.functional import __all__ as __all__
