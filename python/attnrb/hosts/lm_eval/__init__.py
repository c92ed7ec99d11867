"""lm-evaluation-harness as a host: its model ``attnrb``."""
