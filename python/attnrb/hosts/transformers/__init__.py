"""Hugging Face transformers as a host: one model patched in place."""
