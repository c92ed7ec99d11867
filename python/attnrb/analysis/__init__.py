"""Where does a model's attention go? In every layer and head, before and after re-balancing.

    from attnrb.analysis import analyze
    report = analyze(model, tokenizer, text, compare=attnrb.RebalanceConfig())
    report.to_html("attention.html")

Pictures need the extra ``analysis``; everything else needs transformers only (the extra ``hf``).
"""

from attnrb.analysis.outlier_tokens import Sink, expected_attention, outlier_scores, robust_z_scores
from attnrb.analysis.report import METRICS, AttentionReport, AttentionRun, TextReport
from attnrb.analysis.rows import Detail
from attnrb.analysis.run import Progress, analyze
from attnrb.text.classes import NON_SEMANTIC, TOKEN_CLASSES, Token, TokenClass, describe_tokens, token_texts

__all__ = [
    "METRICS",
    "NON_SEMANTIC",
    "TOKEN_CLASSES",
    "AttentionReport",
    "AttentionRun",
    "Detail",
    "Progress",
    "Sink",
    "TextReport",
    "Token",
    "TokenClass",
    "analyze",
    "describe_tokens",
    "expected_attention",
    "outlier_scores",
    "robust_z_scores",
    "token_texts",
]
