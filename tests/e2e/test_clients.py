"""Unmodified clients of the ecosystem against the running cluster."""

from __future__ import annotations

import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.slow

PROMPT = "def read_file(path):\n"


def _client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.api_url}/v1", api_key="none", max_retries=0, timeout=60)


def test_openai_completion_streams_the_text_that_it_returns_whole(pair_cluster: Cluster) -> None:
    client = _client(pair_cluster)
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_openai_chat_with_three_choices_and_logprobs(pair_cluster: Cluster) -> None:
    client = _client(pair_cluster)
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What does json.loads do?"}],
        n=3, seed=7, max_tokens=12, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(entry.logprob <= 0 for entry in choice.logprobs.content)


def test_openai_seeded_sampling_repeats(pair_cluster: Cluster) -> None:
    client = _client(pair_cluster)
    model = client.models.list().data[0].id
    texts = {
        client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=1, seed=11).choices[0].text
        for _ in range(2)
    }
    assert len(texts) == 1


def test_openai_error_is_typed_and_says_what_to_do(pair_cluster: Cluster) -> None:
    client = _client(pair_cluster)
    with pytest.raises(openai.NotFoundError, match="model"):
        client.completions.create(model="absent", prompt=PROMPT, max_tokens=1)
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=model, prompt="x " * 50_000, max_tokens=1)


def test_litellm_completes(pair_cluster: Cluster) -> None:
    model = _client(pair_cluster).models.list().data[0].id
    answer = litellm.completion(
        model=f"openai/{model}",
        api_base=f"{pair_cluster.api_url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": "What does os.path.join do?"}],
        max_tokens=16,
        temperature=0,
    )
    assert answer.choices[0].message.content


def test_langchain_invokes_and_streams(pair_cluster: Cluster) -> None:
    model = _client(pair_cluster).models.list().data[0].id
    base_url, key = f"{pair_cluster.api_url}/v1", SecretStr("none")
    chat = ChatOpenAI(model=model, base_url=base_url, api_key=key, max_completion_tokens=16, temperature=0)
    assert chat.invoke("What does str.split do?").content
    assert "".join(str(chunk.content) for chunk in chat.stream("What does str.split do?"))
    completion = OpenAI(model=model, base_url=base_url, api_key=key, max_tokens=16, temperature=0)
    assert completion.invoke(PROMPT)
