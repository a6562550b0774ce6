"""A decoding step compiles as one graph, whatever its rows hold, and gives what it gives uncompiled."""

from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import DynamicCache

from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_rope_switch import long_model, text_row

GRAPHS: list[Any] = []


def counting(graph: Any, inputs: list[torch.Tensor]) -> Any:
    """A backend that runs a graph as it is: what the graph holds is tested, not what a compiler makes of it."""
    GRAPHS.append(graph)
    return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> None:
    GRAPHS.clear()
    torch.compiler.reset()


def on_the_cpu_too() -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=counting, mode=None)
    config._compile_all_devices = True
    return config


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoding_step_is_one_graph(kind: str, attention: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    batch = batch_inputs([row_inputs(each) for each in ROWS])
    route = model.router(batch["input_ids"])
    token = torch.tensor([[20 + row] for row in range(len(ROWS))])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], -1)

    def step(call: Any) -> torch.Tensor:
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=40)
        model(**batch, past_key_values=cache)
        return call(token, attention_mask=mask, past_key_values=cache, adapter_ids=route).logits

    found = step(torch.compile(model, fullgraph=True, backend=counting))
    assert len(GRAPHS) == 1
    torch.testing.assert_close(found, step(model), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_generate_with_a_static_cache_compiles_its_steps(long: bool, padded: bool) -> None:
    """With LongRoPE the rows pass the switch on the way: what rebuilds the cache stays outside the graph."""
    model = long_model() if long else tiny_model()
    rows = [text_row(20), text_row(20, 1)] if long else [row_inputs("image"), row_inputs("image", 1)]
    rows += [row_inputs("two_clips")] if padded else []
    batch = batch_inputs(rows)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **options, cache_implementation="static", compile_config=on_the_cpu_too())
    assert 1 <= len(GRAPHS) <= 2  # the shape of one input may turn dynamic
    assert torch.equal(found, model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
def test_a_compiled_step_refuses_placeholders_without_media() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs("image")])
    route = model.router(batch["input_ids"])
    call = torch.compile(model, fullgraph=True, backend=counting)
    with pytest.raises(RuntimeError, match="placeholders"):
        call(batch["input_ids"], adapter_ids=route, use_cache=False)
    text = batch_inputs([row_inputs("text")])["input_ids"]
    torch.testing.assert_close(
        call(text, adapter_ids=route, use_cache=False).logits, model(text, adapter_ids=route).logits
    )
