"""Metrics, held-out tasks, and the run that measures a checkpoint on them."""
