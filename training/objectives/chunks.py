"""How many tokens' logits are made at once."""

CHUNK_BYTES = 48 * 2**20
"""Size of one tensor of logits: a handful of them is all that exists, however many tokens there are.
For each chunk the whole head is read, so small ones are slow."""


def chunk_length(vocabulary: int, element_size: int) -> int:
    """Tokens in a chunk whose logits, `[tokens, vocabulary]`, take about `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // (vocabulary * element_size))
