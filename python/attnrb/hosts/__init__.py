"""Hosts: libraries that run a model and let a policy edit its attention."""
