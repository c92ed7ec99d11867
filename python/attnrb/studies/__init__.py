"""Small studies of a patched model: comparisons and generation."""
