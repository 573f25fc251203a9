"""Owns attention over disjoint sets of keys: each set gives a Partial (output, log-sum-exp), and partials merge exactly.

This is the seam where shared prefixes (Hydragen), offloaded attention (Lamina) and blended chunks (CacheBlend) plug in.
Formulas: algorithm card 2, after Hydragen (arXiv 2402.05099, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdserve.errors import InternalError

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention of queries over one set of keys. output: [n, heads, dim]; lse: [n, heads], natural log, float32."""

    output: torch.Tensor
    lse: torch.Tensor


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys, in float32. Associative. A side that saw no key (lse -inf)
    changes no bit, whatever its output holds; of two such sides the output is 0 and the lse -inf."""
    highest = torch.maximum(first.lse, second.lse)
    base = highest.masked_fill(highest.isneginf(), 0.0)  # -inf less -inf is NaN
    one, two = (first.lse - base).exp(), (second.lse - base).exp()
    total = one + two
    weighed = _weighed(first.output, one) + _weighed(second.output, two)
    return Partial(weighed / total.masked_fill(total == 0.0, 1.0).unsqueeze(-1), base + total.log())


def _weighed(output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float32. What has no weight is 0, NaN too; a weight of NaN stays one."""
    weight = weight.unsqueeze(-1)
    return torch.where(weight == 0.0, 0.0, weight * output.float())


def attend_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Partial:
    """Every query over every key. query: [n, heads, dim]; key, value: [t, kv_heads, dim], t > 0 (else InternalError).

    The query heads that share a KV head are folded into the query length, so that each key is read once.
    """
    length, heads, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.view(length, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
    output, lse = _attend(folded, _heads_first(key), _heads_first(value), causal=False)
    group = heads // kv_heads
    output = output.view(kv_heads, group, length, dim).permute(2, 0, 1, 3).reshape(length, heads, dim)
    return Partial(output, lse.view(kv_heads, group, length).permute(2, 0, 1).reshape(length, heads))


def attend_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Partial:
    """Query i over keys 0 .. i. query: [n, heads, dim]; key, value: [n, kv_heads, dim]."""
    length, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    grouped = query.view(length, kv_heads, group, dim).permute(1, 2, 0, 3)
    shape = (kv_heads, group, length, dim)
    keys, values = (x.transpose(0, 1).unsqueeze(1).expand(shape) for x in (key, value))
    output, lse = _attend(grouped, keys, values, causal=True)
    return Partial(output.permute(2, 0, 1, 3).reshape(length, heads, dim), lse.permute(2, 0, 1).reshape(length, heads))


def attend_masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Partial:
    """query: [n, heads, dim]; key, value: [t, kv_heads, dim]; mask: [n, t] of the query's dtype, 0 or -inf."""
    length, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    grouped = query.view(length, kv_heads, group, dim).permute(1, 2, 0, 3)
    keys, values = (x.transpose(0, 1).unsqueeze(1).expand(kv_heads, group, len(key), dim) for x in (key, value))
    output, lse = _attend(grouped, keys, values, causal=False, mask=mask)
    return Partial(output.permute(2, 0, 1, 3).reshape(length, heads, dim), lse.permute(2, 0, 1).reshape(length, heads))


def attend_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Partial:
    """One query per sequence over the keys of that sequence. query: [b, heads, dim]; key, value: [b, t, kv_heads, dim].

    mask: [b, 1, 1, t] of the query's dtype, 0 or -inf.
    """
    batch, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.view(batch, kv_heads, heads // kv_heads, dim)
    output, lse = _attend(grouped, key.transpose(1, 2), value.transpose(1, 2), causal=False, mask=mask)
    return Partial(output.reshape(batch, heads, dim), lse.reshape(batch, heads))


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[t, kv_heads, dim] -> [1, kv_heads, t, dim], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, h, n, d] over [b, h, t, d] -> output [b, h, n, d], log-sum-exp [b, h, n] in float32.

    A row that the mask hides from every key has output 0 and -inf: the operator says 0, which merges wrongly.
    """
    if not key.shape[2]:
        raise InternalError("Attention over no keys at all: the CPU operator would end the process (SIGFPE).")
    if query.device.type == "cpu":
        output, lse = _flash_cpu(query, key, value, 0.0, causal, attn_mask=mask)
    else:
        output, lse = _attend_plain(query, key, value, causal=causal, mask=mask)
    if mask is None:
        return output, lse
    blind = mask.isneginf().all(-1)
    return output.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))


def _attend_plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix products with a float32 softmax: for devices without an operator that gives the log-sum-exp for every dtype."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse
