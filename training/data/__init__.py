"""Rows of a JSONL file on their way to batches: reading, frozen tower features on disk, tokens, batch plans."""
