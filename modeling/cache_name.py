"""One cache, two names: transformers calls it `past_key_values` up to 5.23, and `cache` from 5.24 on.

Our methods take it by either name, whatever the release. What goes into transformers, or comes from there, has the
name that is in use: its layers, masks and outputs overlook the other one, or warn.
"""

from dataclasses import fields

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("past_key_values", "cache")
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in NAMES)
"""The name in use, as in `create_causal_mask(..., **{CACHE: cache})` and `getattr(outputs, CACHE)`."""


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given, by whichever name.

    Raises:
        ValueError: two caches were given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and two caches are given")
    return cache if past_key_values is None else past_key_values
