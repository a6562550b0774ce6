"""What a decoder's config may say about long rows. Without torch, so that a config loads lightly."""

from typing import Any

METHODS = ("dual_chunk",)
LONG_CONTEXT = {"method": "dual_chunk", "chunk_size": None, "local_size": None, "temperature": False}
SPARSE_PREFILL = {"min_length": 32768, "block_size": 64, "segment": 4096, "sinks": 16, "budgets": None}


def _full(name: str, spec: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """`spec` with its defaults. Raises ValueError where it is no dict or has unknown fields."""
    if not isinstance(spec, dict):
        raise ValueError(f"{name} must be a dict with {sorted(defaults)}, got {spec!r}")
    if wrong := set(spec) - set(defaults):
        raise ValueError(f"{name}: unknown {sorted(wrong)}, expected {sorted(defaults)}")
    return defaults | spec


def _whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_long_context(spec: Any, rope_type: str | None, sliding_window: int | None) -> dict[str, Any]:
    """A decoder's `long_context` with its defaults.

    Raises:
        ValueError: a field is unknown or wrong, or does not go with the decoder's attention.
    """
    spec = _full("long_context", spec, LONG_CONTEXT)
    if spec["method"] not in METHODS:
        raise ValueError(f"long_context: method {spec['method']!r} is not one of {METHODS}")
    for field, least in (("chunk_size", 2), ("local_size", 1)):
        _whole(f"long_context: {field}", spec[field], least)
    if 2 * spec["local_size"] > spec["chunk_size"]:
        raise ValueError(
            f"long_context: local_size ({spec['local_size']}) must be at most half of chunk_size "
            f"({spec['chunk_size']})"
        )
    if not isinstance(spec["temperature"], bool):
        raise ValueError(f"long_context: temperature must be true or false, got {spec['temperature']!r}")
    if sliding_window is not None:
        raise ValueError(f"long_context: dual_chunk with sliding_window ({sliding_window}) is not supported")
    if rope_type == "dynamic":
        raise ValueError(
            "long_context: dual_chunk with rope_type 'dynamic' is not supported: both act beyond the trained length"
        )
    return spec


def check_sparse_prefill(spec: Any, layers: int, heads: int, sliding_window: int | None) -> dict[str, Any]:
    """A decoder's `sparse_prefill` with its defaults.

    Raises:
        ValueError: a field is unknown or wrong, or the budgets are not those of `layers` layers of `heads` heads.
    """
    spec = _full("sparse_prefill", spec, SPARSE_PREFILL)
    for field, least in (("min_length", 1), ("block_size", 1), ("segment", 1), ("sinks", 0)):
        _whole(f"sparse_prefill: {field}", spec[field], least)
    if spec["segment"] % spec["block_size"]:
        raise ValueError(
            f"sparse_prefill: segment ({spec['segment']}) is not a multiple of block_size ({spec['block_size']})"
        )
    if sliding_window is not None:
        raise ValueError(f"sparse_prefill with sliding_window ({sliding_window}) is not supported")
    budgets = spec["budgets"]
    if not isinstance(budgets, list | tuple) or [len(layer) for layer in budgets] != [heads] * layers:
        raise ValueError(
            f"sparse_prefill: budgets must be a list of {layers} layers, each a list of {heads} heads; "
            "`calibrate` of sparse_budgets makes them"
        )
    for layer, row in enumerate(budgets):
        for head, budget in enumerate(row):
            if budget is not None:
                where = f"sparse_prefill: budgets[{layer}][{head}]"
                if not isinstance(budget, list | tuple) or len(budget) != 2:
                    raise ValueError(f"{where} must be [columns, diagonals] or null for a dense head, got {budget!r}")
                _whole(f"{where}[0]", budget[0], 0)
                _whole(f"{where}[1]", budget[1], 1)
    return spec
