"""The engine: each answer equals its alone-run; rows join, leave, end and fail by themselves."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mixlora.serving.batch import Batch
from mixlora.serving.engine import Engine, EngineClosedError, Limits, QueueFullError
from mixlora.serving.reading import Reading
from mixlora.serving.sampling import Sampling
from tests.modeling.test_rope_switch import DYNAMIC, LONGROPE
from tests.serving.serving_fixtures import alone, conversations, model_and_processor, picture, turn

SMALL = Limits(rows=3, chunk=24)
LONG = "A long question. " * 20


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return model_and_processor()


@pytest.fixture
def engine(parts: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(*parts, SMALL) as running:
        yield running
        running.close(finish=False)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 80}},
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 80},
        {"sliding_window": 16},
    ],
    ids=["plain", "longrope", "dynamic", "sliding"],
)
@pytest.mark.parametrize("kept", [0, 1000])
def test_each_answer_equals_its_alone_run(text: dict[str, Any], kept: int) -> None:
    """Rows of every kind join and leave; under LongRoPE some pass the switch while they answer."""
    model, processor = model_and_processor(text=text)
    chats = conversations() * 2
    samplings = [Sampling(max_new_tokens=5 + 9 * (i % 4)) for i in range(len(chats))]
    if "max_position_embeddings" in text:  # dynamic scaling goes beyond it
        model.config.text_config.max_position_embeddings = 512
    with Engine(model, processor, Limits(rows=4, chunk=24, kept_tokens=kept)) as engine:
        requests = [engine.submit(chat, how) for chat, how in zip(chats, samplings, strict=True)]
        for request in requests:
            request.wait()
    assert any(request.reused for request in requests) == bool(kept)
    for chat, how, request in zip(chats, samplings, requests, strict=True):
        assert request.tokens == alone(model, processor, chat, how), chat
        assert request.reason == "length"
        assert request.text == processor.tokenizer.decode(request.tokens, skip_special_tokens=True)


def test_what_ctc_hears_shares_in_an_answer_as_in_generate() -> None:
    model, processor = model_and_processor(speech_blank_token_id=0, speech_ctc_weight=0.9)
    how = Sampling(max_new_tokens=6)
    with Engine(model, processor, SMALL) as engine:
        requests = [engine.submit(chat, how) for chat in conversations()]
        answers = [request.wait() or request.tokens for request in requests]
    assert answers == [alone(model, processor, chat, how) for chat in conversations()]
    model.config.speech_ctc_weight = 0.0
    assert answers != [alone(model, processor, chat, how) for chat in conversations()]


def test_what_is_told_of_a_picture_shares_in_an_answer_as_in_generate() -> None:
    """Also where its tokens lie in the kept cache."""
    model, processor = model_and_processor(
        vision_names={"count": 2, "longest": 3, "hidden_size": 5}, vision_told_weight=0.49
    )
    processor.image_seq_length = model.model.picture_tokens
    model.model.vision_names.learn_names([[11, 12, 13], [14, 15]])
    model.model.vision_names.head.bias.data[1] = 9
    chats = [conversations()[1]] * 2 + conversations()
    with Engine(model, processor, Limits(rows=1, chunk=24, kept_tokens=1000)) as engine:
        for number, chat in enumerate(chats):
            request = engine.submit(chat, Sampling(6))
            request.wait()
            assert request.tokens == alone(model, processor, chat, Sampling(6))
            assert bool(request.reused) or number != 1
    told = alone(model, processor, chats[0], Sampling(6))
    model.config.vision_told_weight = 0.0
    assert told != alone(model, processor, chats[0], Sampling(6))


def test_a_clip_that_is_asked_about_again_is_heard_again() -> None:
    """Its tokens lie in the kept cache; what CTC hears in it shares in the answer all the same."""
    model, processor = model_and_processor(speech_blank_token_id=0, speech_ctc_weight=0.9)
    chat = conversations()[2]
    wanted = alone(model, processor, chat, Sampling(6))
    with Engine(model, processor, SMALL) as engine:
        for turn_number in range(2):
            request = engine.submit(chat, Sampling(6), user="anna")
            request.wait()
            assert request.tokens == wanted and bool(request.reused) == bool(turn_number)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12, temperature=0.9, seed=5),
        Sampling(12, temperature=1.4, top_k=20, top_p=0.8, repetition_penalty=1.3, seed=6),
        Sampling(12, repetition_penalty=1.5),
    ],
)
def test_sampled_answers_equal_generate_with_the_seed(engine: Engine, sampling: Sampling) -> None:
    chats = conversations()
    requests = [engine.submit(chat, sampling) for chat in chats]
    for chat, request in zip(chats, requests, strict=True):
        request.wait()
        assert request.tokens == alone(engine.model, engine.processor, chat, sampling)


def test_without_a_seed_answers_differ(engine: Engine) -> None:
    requests = [engine.submit(conversations()[0], Sampling(16, temperature=2.0)) for _ in range(2)]
    assert requests[0].result() != requests[1].result()


def test_an_end_token_ends(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    tokens = alone(model, processor, conversations()[1], Sampling(20))
    model.generation_config.eos_token_id = tokens[7]
    try:
        with Engine(model, processor) as engine:
            request = engine.submit(conversations()[1], Sampling(20))
            request.wait()
    finally:
        model.generation_config.eos_token_id = None
    assert request.tokens == tokens[: tokens.index(tokens[7]) + 1] and request.reason == "stop"


def test_a_stop_string_is_not_shown(engine: Engine) -> None:
    """Not even its beginning, while it streams."""
    whole = engine.submit(conversations()[3], Sampling(40)).result()
    stop = whole[9:12]
    request = engine.submit(conversations()[3], Sampling(40, stop=("never said", stop)))
    pieces = list(request)
    assert "".join(pieces) == whole[: whole.index(stop)] and request.reason == "stop"
    assert len(request.tokens) < 40
    other = engine.submit(conversations()[3], Sampling(40, stop=(whole[-2:] + "never",)))
    assert other.result() == whole, "what was held back is told at the end"


def chat_of(first: str, answer: str, then: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn(first, (picture(),)), {"role": "assistant", "content": answer}, then]


def test_the_next_turn_uses_the_kept_cache(engine: Engine) -> None:
    how = Sampling(12)
    first = engine.submit([turn("Look at this", (picture(),))], how, user="anna")
    chat = chat_of("Look at this", first.result(), turn("And now?"))
    request = engine.submit(chat, how, user="anna")
    request.wait()
    assert request.reused >= first.prompt.length
    assert request.timing.encoded < 0.5 and request.items == first.items
    assert request.tokens == alone(engine.model, engine.processor, chat, how)


@pytest.mark.parametrize("what", ["user", "picture", "route", "text"])
def test_the_kept_cache_is_not_used_where_it_would_be_wrong(engine: Engine, what: str) -> None:
    how = Sampling(12)
    text = engine.submit([turn("Look at this, please")], how, user="anna").result()
    engine.submit([turn("Look at this", (picture(),))], how, user="anna").wait()
    chats = {
        "user": [turn("Look at this", (picture(),))],
        "picture": [turn("Look at this", (picture(7),))],
        "route": [turn("Look at this, please"), {"role": "assistant", "content": text}, turn("?", (picture(),))],
        "text": [turn("Another", (picture(5),))],
    }
    request = engine.submit(chats[what], how, user="bob" if what == "user" else "anna")
    request.wait()
    assert request.reused == 0
    assert request.tokens == alone(engine.model, engine.processor, chats[what], how)


def test_a_long_prompt_does_not_stall_the_others(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read in chunks, a running row gets a token between two of them."""
    events: list[str] = []
    step, read = Batch.step, Reading.read

    def seen_step(self: Batch, model: Any) -> Any:
        events.append("step")
        return step(self, model)

    def seen_read(self: Reading, model: Any, most: int) -> Any:
        events.append("read" if self.requests[0].prompt.length > 100 else "short")
        return read(self, model, most)

    monkeypatch.setattr(Batch, "step", seen_step)
    monkeypatch.setattr(Reading, "read", seen_read)
    with Engine(*parts, SMALL) as engine:
        running = engine.submit(conversations()[0], Sampling(400))
        next(iter(running))
        engine.submit([turn(LONG)], Sampling(2)).wait()
        running.cancel()
    reads = [i for i, event in enumerate(events) if event == "read"]
    assert len(reads) == -(-engine.prepare([turn(LONG)]).length // SMALL.chunk) > 10
    assert all("step" in events[a:b] for a, b in zip(reads, reads[1:], strict=False))


def test_cancelling_frees_the_row_and_leaves_the_others(engine: Engine) -> None:
    keep = [engine.submit(conversations()[i], Sampling(60)) for i in (0, 1)]
    gone = engine.submit(conversations()[2], Sampling(400))
    next(iter(gone))
    steps = len(gone.tokens)
    gone.cancel()
    gone.wait()
    assert gone.reason == "cancelled" and 0 < len(gone.tokens) <= steps + 2
    after = engine.submit(conversations()[3], Sampling(3))  # its row is free: three may run
    after.wait()
    for i, request in enumerate(keep):
        request.wait()
        assert request.tokens == alone(engine.model, engine.processor, conversations()[i], Sampling(60))


def test_a_cancelled_row_is_in_no_further_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while a step runs, it is gone before the next one."""
    gone, step, seen = engine.submit(conversations()[2], Sampling(400)), Batch.step, []

    def cancels(self: Batch, model: Any) -> Any:
        seen.append(gone in self.requests)
        if len(gone.tokens) == 5:
            gone.cancel()
        return step(self, model)

    monkeypatch.setattr(Batch, "step", cancels)
    stays = engine.submit(conversations()[0], Sampling(60))
    stays.wait()
    assert gone.reason == "cancelled" and len(gone.tokens) == 6
    assert True not in seen[seen.index(False, seen.index(True)) :] and engine.snapshot()["running"] == 0


def test_a_request_that_waits_can_be_cancelled(engine: Engine) -> None:
    running = [engine.submit(conversations()[0], Sampling(400)) for _ in range(3)]
    waiting = engine.submit(conversations()[1], Sampling(5))
    waiting.cancel()
    waiting.wait(10)
    assert waiting.tokens == [] and waiting.reason == "cancelled"
    for request in running:
        request.cancel()


def test_time_limits(engine: Engine) -> None:
    request = engine.submit(conversations()[1], Sampling(480), timeout=0.3)
    begun = time.monotonic()
    text = request.result()
    assert request.reason == "timeout" and 0 < len(request.tokens) < 480 and text == request.text
    assert time.monotonic() - begun < 5


def test_the_queue_is_bounded_and_users_take_turns(parts: tuple[Any, Any]) -> None:
    with Engine(*parts, Limits(rows=1, waiting=4)) as engine:
        prompts = [engine.prepare(chat) for chat in conversations()[:2]]
        blocker = engine.submit(prompts[0], Sampling(480), user="anna")
        next(iter(blocker))
        requests = [engine.submit(prompts[0], Sampling(1), user="anna") for _ in range(3)]
        requests.append(engine.submit(prompts[1], Sampling(1), user="bob"))
        with pytest.raises(QueueFullError, match="4 requests wait already, at most 4 may"):
            engine.submit(prompts[0])
        blocker.cancel()
        for request in requests:
            request.wait()
        answered = sorted(requests, key=lambda one: one.arrived + one.timing.queued)
        assert [one.user for one in answered] == ["anna", "bob", "anna", "anna"]
        assert engine.snapshot()["refused"] == 1


def test_a_forward_that_raises_fails_its_row_only(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that breaks any batch it is in; the others start anew and give the same answers."""
    forward = Batch.forward

    def breaks(self: Batch, *args: Any) -> torch.Tensor:
        if any(request.user == "bad" and len(request.tokens) >= 3 for request in self.requests):
            raise MemoryError("too much")
        return forward(self, *args)

    monkeypatch.setattr(Batch, "forward", breaks)
    with Engine(*parts) as engine:
        chats = conversations()
        good = [engine.submit(chat, Sampling(20)) for chat in chats]
        bad = engine.submit(chats[0], Sampling(20), user="bad")
        with pytest.raises(MemoryError, match="too much"):
            bad.wait()
        assert len(bad.tokens) == 3
        for chat, request in zip(chats, good, strict=True):
            request.wait()
            assert request.tokens == alone(*parts, chat, Sampling(20))
        assert engine.snapshot()["ended"]["text"] == {"error": 1, "length": 1}


def test_closing_finishes_what_runs_and_takes_no_more(parts: tuple[Any, Any]) -> None:
    engine = Engine(*parts, SMALL)
    requests = [engine.submit(chat, Sampling(30)) for chat in conversations()]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        time.sleep(0.001)
    with pytest.raises(EngineClosedError, match="shutting down"):
        engine.submit(conversations()[0])
    closing.join()
    assert [len(request.tokens) for request in requests] == [30] * len(requests)
    assert engine.snapshot()["running"] == 0 and not engine._thread.is_alive()


def test_closing_at_once_leaves_nobody_waiting(parts: tuple[Any, Any]) -> None:
    engine = Engine(*parts, SMALL)
    requests = [engine.submit(chat, Sampling(400)) for chat in conversations()]
    next(iter(requests[0]))
    engine.close(timeout=0.1)
    assert {request.reason for request in requests} == {"cancelled"}
    assert all(request.ended for request in requests)


def test_too_long_a_conversation_is_refused_and_an_answer_ends_with_the_context(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens, pictures and clips included; this model takes 512"):
        engine.submit([turn("x" * 600)])
    request = engine.submit([turn("x" * 490)], Sampling(400))
    request.wait()
    assert request.prompt.length + len(request.tokens) == 512 and request.reason == "length"


def test_metrics_tell_modalities_and_load(engine: Engine) -> None:
    requests = [engine.submit(chat, Sampling(10)) for chat in conversations()]
    for request in requests:
        request.wait()
    figures = engine.snapshot()
    assert figures["ended"] == {
        "text": {"length": 1}, "vision": {"length": 2}, "speech": {"length": 1}, "vision_speech": {"length": 2}
    }  # fmt: skip
    assert figures["tokens"]["speech"]["answer"] == 10
    assert figures["tokens"]["vision"]["prompt"] == sum(requests[i].prompt.length for i in (1, 5))
    assert 1 < figures["batch_size"] <= 3 and figures["tokens_per_second"] > 0
    for modality in ("text", "vision", "speech", "vision_speech"):
        assert 0 < figures["first_token_seconds"][modality]["median"] <= max(r.timing.first_token for r in requests)
    assert (figures["waiting"], figures["reading"], figures["running"]) == (0, 0, 0)
    shares = figures["modalities"]
    for name in ("tokens_per_second", "batch_size"):
        assert sum(shares[kind][name] for kind in shares) == pytest.approx(figures[name], rel=1e-6)
        assert all(shares[kind][name] > 0 for kind in shares)
    assert 0 < figures["kept_tokens"] <= engine.limits.kept_tokens
