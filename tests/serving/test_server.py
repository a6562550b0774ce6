"""The server: OpenAI's form, streamed and not, errors too, and nothing read or fetched that should not."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from starlette.testclient import TestClient

from mixlora.serving.batch import Batch
from mixlora.serving.engine import Engine, Limits
from mixlora.serving.media import MediaLimits
from mixlora.serving.sampling import Sampling
from mixlora.serving.server import Settings, create_app
from tests.serving.serving_fixtures import alone, clip, model_and_processor, picture, turn

MEDIA = MediaLimits(bytes=200_000, pixels=250_000, seconds=2.0, items=3, text=2000)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(*model_and_processor(), Limits(rows=4, chunk=64)) as running:
        yield running


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    settings = Settings(name="tiny", media=MEDIA, body_bytes=600_000, usual_tokens=8, most_tokens=64)
    with TestClient(create_app(engine, settings), raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, content: Any = "Hello", **fields: Any) -> Any:
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})


KINDS = {
    "text": ([], []),
    "vision": ([picture()], []),
    "speech": ([], [clip()]),
    "vision_speech": ([picture(1)], [clip(1)]),
}


@pytest.mark.parametrize("modality", KINDS)
def test_every_modality_is_answered_as_if_alone(client: TestClient, engine: Engine, modality: str) -> None:
    pictures, clips = KINDS[modality]
    content = [image_part(data_url(png(one))) for one in pictures] + [audio_part(wav(one)) for one in clips]
    content.append({"type": "text", "text": "What is it?"})
    body = ask(client, content, max_completion_tokens=12).json()
    tokens = alone(engine.model, engine.processor, [turn("What is it?", tuple(pictures), tuple(clips))], Sampling(12))
    text = engine.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": text.strip()}
    assert choice["finish_reason"] == "length" and body["object"] == "chat.completion" and body["model"] == "tiny"
    adapter = {"text": None, "speech": "speech"}.get(modality, "vision")
    assert body["mixlora"] == {"modality": modality, "adapter": adapter, "reason": "length"}
    assert body["usage"]["completion_tokens"] == 12


def test_streaming_gives_the_same_text(client: TestClient) -> None:
    whole = ask(client, "Tell me").json()["choices"][0]["message"]["content"]
    response = ask(client, "Tell me", stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *pieces, last, used = [json.loads(line) for line in lines[:-1]]
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces).rstrip() == whole
    assert last["choices"][0]["finish_reason"] == "length" and last["mixlora"]["modality"] == "text"
    assert used["choices"] == [] and used["usage"]["completion_tokens"] == 8
    assert len({piece["id"] for piece in [*pieces, last, used]}) == 1


def test_transcription(client: TestClient, engine: Engine) -> None:
    sent = {"file": ("x.wav", wav(clip(3)), "audio/wav")}
    body = client.post("/v1/audio/transcriptions", files=sent, data={"model": "tiny"}).json()
    tokens = alone(engine.model, engine.processor, [turn("Transcribe the audio.", (), (clip(3),))], Sampling(8))
    assert body["text"] == engine.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    text = client.post("/v1/audio/transcriptions", files=sent, data={"model": "tiny", "response_format": "text"})
    assert text.text == body["text"] + "\n"


def test_models_health_and_metrics(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok"}
    ask(client)
    figures = client.get("/metrics").text
    assert (
        'mixlora_ended_total{modality="text",reason="length"}' in figures
        and 'mixlora_running{modality="speech"} 0.0' in figures
    )


def test_settings_reach_the_engine(client: TestClient) -> None:
    texts = [
        ask(client, "Hi", temperature=1.5, seed=seed, max_tokens=20).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    whole = ask(client, "Hi", max_tokens=20).json()["choices"][0]["message"]["content"]
    cut = ask(client, "Hi", max_tokens=20, stop=[whole[3:5]]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[3:5])].rstrip() and cut["finish_reason"] == "stop"


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "other model": ({"model": "gpt"}, 404, "the model here is 'tiny'"),
    "two answers": ({"n": 2}, 400, "n: "),
    "tools": ({"tools": []}, 400, "tools: "),
    "penalty": ({"presence_penalty": 1}, 400, "presence_penalty: "),
    "hot": ({"temperature": 9}, 400, "temperature: "),
    "negative": ({"max_tokens": -1}, 400, "max_tokens: "),
    "long answer": ({"max_tokens": 65}, 400, "at most 64 tokens"),
    "both limits": ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "give one of them"),
    "empty stop": ({"stop": [""]}, 400, "stop must be without empty strings"),
    "options without stream": ({"stream_options": {"include_usage": True}}, 400, "go with stream"),
    "no messages": ({"messages": []}, 400, "messages: "),
    "other role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "unknown field": ({"best_of": 3}, 400, "best_of: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(client: TestClient, name: str) -> None:
    fields, status, words = REFUSED[name]
    response = ask(client, **fields)
    assert response.status_code == status and words in response.json()["error"]["message"], response.text


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert client.get("/nowhere").json()["error"]["message"] == "Not Found"
    assert client.delete("/v1/models").json()["error"]["message"] == "Method Not Allowed"


def test_the_key(engine: Engine) -> None:
    with TestClient(create_app(engine, Settings(name="tiny", key="secret"))) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_another_name_of_the_server_is_refused(engine: Engine) -> None:
    with TestClient(create_app(engine, Settings(names=("localhost",))), base_url="http://evil.example") as client:
        assert client.get("/health").status_code == 400


def test_a_full_queue_and_a_closed_engine() -> None:
    engine = Engine(*model_and_processor(), Limits(rows=1, waiting=0))
    with TestClient(create_app(engine, Settings(name="tiny"))) as client:
        response = ask(client)
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        engine.close()
        response = ask(client)
        assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]
        assert client.get("/health").status_code == 503


def test_a_failing_model_is_told_without_a_traceback(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Batch, "forward", fail)
    response = ask(client)
    assert response.status_code == 500 and "secret" not in response.text and response.json()["error"]["message"]
    streamed = ask(client, stream=True)
    assert "secret" not in streamed.text and '"code": "internal_error"' in streamed.text
    assert "[DONE]" not in streamed.text
