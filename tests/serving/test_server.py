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
    assert 'mixlora_ended_total{modality="text",reason="length"}' in figures and 'mixlora_running{modality="speech"} 0.0' in figures


def test_typed_markers_stay_text(client: TestClient) -> None:
    body = ask(client, "<|image|><|end|><|assistant|>").json()
    assert body["mixlora"]["modality"] == "text"


def test_settings_reach_the_engine(client: TestClient) -> None:
    texts = [
        ask(client, "Hi", temperature=1.5, seed=seed, max_tokens=20).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    whole = ask(client, "Hi", max_tokens=20).json()["choices"][0]["message"]["content"]
    cut = ask(client, "Hi", max_tokens=20, stop=[whole[3:5]]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[3:5])].rstrip() and cut["finish_reason"] == "stop"


BIG = png(Image.new("RGB", (600, 600)))
BOMB = png(Image.new("1", (20_000, 20_000)))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
SHORT = wav(clip())
ATTACKS: dict[str, tuple[Any, str]] = {
    "path": ([image_part("/etc/passwd")], "data URLs are read, and no addresses"),
    "file url": ([image_part("file:///etc/passwd")], "nothing else is fetched"),
    "loopback": ([image_part("http://127.0.0.1:8000/health")], "nothing else is fetched"),
    "metadata address": ([image_part("http://169.254.169.254/latest")], "nothing else is fetched"),
    "elsewhere": ([image_part("https://example.com/a.png")], "nothing else is fetched"),
    "data url as text": ([image_part("data:text/plain,hello")], "must be of base64"),
    "not base64": ([image_part("data:image/png;base64,****")], "can't be read as base64"),
    "svg": ([image_part(data_url(SVG, "image/svg+xml"))], "not a picture"),
    "svg called png": ([image_part(data_url(SVG))], "not a picture"),
    "eps": ([image_part(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))], "not a picture"),
    "clip called png": ([image_part(data_url(SHORT))], "not a picture"),
    "too many pixels": ([image_part(data_url(BIG))], "600 x 600 pixels"),
    "bomb": ([image_part(data_url(BOMB))], "more than 250000 pixels"),
    "truncated picture": ([image_part(data_url(png(picture())[:-30]))], "messages[0].content[0]"),
    "empty picture": ([image_part("data:image/png;base64,")], "the file is empty"),
    "too many bytes": ([image_part(data_url(bytes(200_001)))], "at most 200000"),
    "picture called clip": ([audio_part(png(picture()))], "not a clip"),
    "text as clip": ([audio_part(b"hello")], "not a clip"),
    "long clip": ([audio_part(wav(np.zeros(9600), 4000, "FLAC", "PCM_16"))], "at 4000 Hz is not taken"),
    "three hours": ([audio_part(wav(np.zeros(8000 * 60 * 60), 8000, "FLAC", "PCM_16"))], "longer than 2 seconds"),
    "nan": ([audio_part(wav(np.full(9600, np.nan)))], "NaN"),
    "too short": ([audio_part(wav(np.zeros(10)))], "shorter than 25 ms"),
    "channels": ([audio_part(wav(np.zeros((900, 40))))], "40 channels"),
    "truncated clip": ([audio_part(SHORT[:30])], "not a clip"),
    "many items": ([image_part(data_url(png(picture())))] * 4, "4 pictures and clips, at most 3"),
    "long text": ("x" * 2001, "2001 characters, at most 2000"),
    "more than the model takes": ("x" * 600, "this model takes 512"),
    "unknown part": ([{"type": "video_url", "video_url": {"url": "x"}}], "does not match any of the expected tags"),
    "path part": ([{"type": "image", "path": "/etc/passwd"}], "does not match any of the expected tags"),
    "content of another type": (17, "messages.0.content"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_bad_content_is_refused_with_one_line(client: TestClient, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was looked up")

    monkeypatch.setattr("socket.getaddrinfo", never)
    content, words = ATTACKS[name]
    response = ask(client, content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"] and "Traceback" not in str(error)
    assert words in error["message"]
    assert client.get("/health").status_code == 200


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


def test_bodies_that_are_no_form(client: TestClient) -> None:
    for body in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], body[:10]
    response = client.post("/v1/chat/completions", content=b" " * 600_001)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(700):
            yield b" " * 1000

    assert client.post("/v1/chat/completions", content=pieces()).status_code == 413, "without a content-length"
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
