"""The unmodified openai client, synchronous and asynchronous."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from pdserve.errors import NoDecodeWorkers, Overloaded, WorkerLost
from tests.controller.http_api.server import ApiServer
from tests.controller.http_api.twins import OUTPUT


@pytest.fixture
def sdk(api: ApiServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_models_are_listed_and_found(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "pdserve"


def test_a_completion_with_choices_echo_and_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="tiny", prompt="def f", max_tokens=6, n=2, echo=True, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.text.startswith("def f")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == choice.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_a_streamed_completion_gives_the_same_text(sdk: openai.OpenAI) -> None:
    stream = sdk.completions.create(
        model="tiny", prompt="x", max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert OUTPUT.startswith(text)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_with_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert (
        bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or []).decode()
        == choice.message.content
    )


def test_a_stop_string_ends_a_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stop=[" quick"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == OUTPUT[: OUTPUT.index(" quick")]


async def test_the_asynchronous_client_streams_a_chat(api: ApiServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=12, n=2, stream=True
        )
        texts = {0: "", 1: ""}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts[0] == texts[1]
    assert OUTPUT.startswith(texts[0])


def test_errors_become_the_clients_own_exceptions(api: ApiServer, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        sdk.completions.create(model="gpt-7", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.completions.create(model="tiny", prompt="x", n=77)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="embedding"):
        sdk.embeddings.create(model="tiny", input="x")
    api.generator.script.fail_first = Overloaded("full")
    with pytest.raises(openai.RateLimitError):
        sdk.completions.create(model="tiny", prompt="x")
    api.generator.script.fail_first = NoDecodeWorkers("none")
    with pytest.raises(openai.InternalServerError) as unavailable:
        sdk.completions.create(model="tiny", prompt="x")
    assert unavailable.value.status_code == 503


def test_an_error_in_the_stream_is_raised_by_the_client(api: ApiServer, sdk: openai.OpenAI) -> None:
    api.generator.script.fail_after = (2, WorkerLost("the worker is gone"))
    with pytest.raises(openai.APIError, match="the worker is gone"):
        list(sdk.completions.create(model="tiny", prompt="x", stream=True))


def test_overload_is_retried_by_the_client(api: ApiServer) -> None:
    api.generator.script.fail_first = Overloaded("full", retry_after_s=0.01)
    with (
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=2, timeout=20) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="tiny", prompt="x")
    assert len(api.generator.requests) == 3
