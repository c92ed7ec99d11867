"""The operations' definition in NumPy, under its public name; `attnrb.ops.reference` holds it."""

from attnrb.ops.reference import *  # noqa: F403
from attnrb.ops.reference import __all__ as __all__
