"""Reading and writing checkpoints of other layouts, on disk."""
