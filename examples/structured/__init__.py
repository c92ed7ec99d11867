"""The parts of ``finetune_structured.py``: data, training, what it measures, the report."""
