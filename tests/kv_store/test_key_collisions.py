"""Keys so short that different pages get the same one: every tier gives the page that is meant or none, and counts what it met."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from engine.prefix_index import KeyChain
from kv_store.page import Page, PageBytes, PageId
from kv_store.policies import POLICIES, policy_of
from kv_store.tier_index import TierIndex
from kv_transfer.keys import chain_hashes, fingerprint_seed
from tests.kv_store.chains import SMALL, bytes_of
from tests.kv_store.test_tier_contract import INDEXED, OPENERS, open_bench
from tests.kv_transfer.short_keys import WHOLE_FINGERPRINT, shortened_keys

BITS = 3  # as many keys as every tier has room for pages: nothing is evicted
Prompt = tuple[int, ...]


def pages_of(prompt: Prompt) -> list[Page]:
    """Of one token over and over each."""
    tokens = array("i", [number for number in prompt for _ in range(SMALL.page_tokens)])
    keys = chain_hashes(SMALL.identity, tokens.tobytes())
    chain = KeyChain(SMALL.page_tokens, keys, fingerprint_seed(SMALL.identity)).pages(tokens, len(prompt))
    return [Page(PageId(page.key, page.fingerprint, page.tokens), page.parent, page.unit_keys) for page in chain]


def contents_of(prompt: Prompt) -> list[PageBytes]:
    return [bytes_of(hash(prompt[: end + 1])) for end in range(len(prompt))]


def told_apart(prompt: Prompt) -> Prompt:
    """A prompt like that, none of whose pages has the tokens of a page behind other ones: numbers that name all pages so far."""
    return tuple(sum((page + 1) * 5**at for at, page in enumerate(prompt[: end + 1])) for end in range(len(prompt)))


@pytest.mark.parametrize("fingerprint_bits", [WHOLE_FINGERPRINT, 0])
@pytest.mark.parametrize("name", OPENERS)
def test_a_tier_agrees_with_a_model_that_knows_every_token(name: str, fingerprint_bits: int, tmp_path: Path) -> None:
    """The model: whoever comes first has the key. Without fingerprints, the tokens alone tell pages apart."""
    rng = random.Random(5)
    prompts = [tuple(rng.choices(range(4), k=rng.randint(1, 4))) for _ in range(60)]
    if not fingerprint_bits:
        prompts = [told_apart(prompt) for prompt in prompts]
    with shortened_keys(BITS, fingerprint_bits), open_bench(name, tmp_path) as bench:
        tier, model = bench.tier, dict[bytes, PageId]()
        for prompt in prompts:
            pages = pages_of(prompt)
            for page in pages:
                model.setdefault(page.id.key, page.id)
            kept = sum(model[page.id.key] == page.id for page in pages)
            assert tier.write(pages, contents_of(prompt)) == kept
            asked = rng.choice(prompts)
            wanted = [page.id for page in pages_of(asked)]
            there = next((at for at, page_id in enumerate(wanted) if model.get(page_id.key) != page_id), len(wanted))
            assert tier.present(wanted) == there
            into = [SMALL.empty() for _ in wanted]
            assert tier.read(wanted, into) == there
            assert all((got == right).all() for got, right in zip(into[:there], contents_of(asked), strict=False))
        assert set(tier.counters.verify_failures) == {"fingerprint"}
        assert tier.counters.stored == len(model) == 2**BITS
        if name in INDEXED:
            assert bench.known() == set(model)
            assert tier.used_bytes() % len(model) == 0
            assert tier.remove(list(model)) == len(model)
            assert tier.used_bytes() == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_pages_that_stand_below_themselves_can_all_be_evicted(policy: str) -> None:
    """Chains longer than there are keys, of which pages are dropped now and then: others come in below what stands below them."""
    rng = random.Random(7)
    circles = 0
    with shortened_keys(BITS):
        for _ in range(40):
            index = TierIndex(2**BITS, policy_of(policy)(), ttl_s=1e9)
            for page in pages_of(tuple(rng.choices(range(4), k=3 * 2**BITS))):
                granted, _ = index.make_room(page, 1, 0.0)
                if granted:
                    entry = index.begin(page, 1, 0, 0.0)
                    index.commit(entry)
                    circles += entry.parent != page.parent
                if rng.random() < 0.3:
                    index.drop(rng.choice(list(index)).key)
            index.capacity_bytes = 0
            index.trim(0.0)
            assert not index.used_bytes
    assert circles


def test_a_page_that_names_itself_as_its_parent_is_kept_and_leaves_when_room_is_needed() -> None:
    index = TierIndex(1, policy_of("lru")(), ttl_s=1e9)
    key = b"k" * 32
    for page in (Page(PageId(key, 1, b""), parent=key), Page(PageId(b"o" * 32, 2, b""))):
        granted, _ = index.make_room(page, 1, 0.0)
        assert granted
        index.commit(index.begin(page, 1, 0, 0.0))
    assert index.get(key) is None
