"""The operations of attnrb on plain tensors.

Axes: ``B`` batch, ``H`` query heads, ``Hk`` key/value heads (H a multiple of Hk), ``M`` queries, ``N`` keys, ``D``
query and key width, ``Dv`` value width. The attention functions read any strides and never repeat keys for grouped
heads. The native ops are ``torch.ops.attnrb.*``; ``docs/method.md`` derives the formulas.

All are differentiable, once, where an input is (`attnrb.ops.training`); outlier sets carry no gradient. Under autocast
the attention functions compute in its dtype, as PyTorch's own attention does. float64 inputs are computed with in plain
PyTorch (`attnrb.ops.dense`): slow, and good for ``torch.autograd.gradcheck``.
"""

from attnrb.ops import raw as _raw  # noqa: F401  (registers what the ops do under their own names)
from attnrb.ops.attention import attention, attention_weights
from attnrb.ops.paged import write_keys
from attnrb.ops.rebalancing import rebalanced_attention, source_attention
from attnrb.ops.received import received_attention
from attnrb.ops.weights_in_memory import outlier_mask, rebalance

__all__ = [
    "attention",
    "attention_weights",
    "outlier_mask",
    "rebalance",
    "rebalanced_attention",
    "received_attention",
    "source_attention",
    "write_keys",
]
