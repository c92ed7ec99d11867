"""Text and tokens: classes of tokens."""
