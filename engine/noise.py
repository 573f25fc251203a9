"""Owns the noise of sampling: a pure function of (seed, choice, output index, token id). Pure.

A token's 32 random bits are an element of a SplitMix64 stream (Steele, Lea and Flood, OOPSLA'14): the stream's key is
mixed from seed, choice and output index, its counter is the token id. So a token drawn again on another worker, in another
batch or on another device meets the same noise, and the noise of a few tokens costs only those tokens.

The bits become Gumbel noise by sums, products and quotients of float64 alone. IEEE 754 rounds those alike everywhere, which
no device promises for its logarithm.
"""

from __future__ import annotations

import math

import torch

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_BITS_LIMIT = 1 << 32
MAX_NOISE = 22.88  # -ln(-ln(1 - 2**-33)) = 22.874, of the highest bits
MIN_NOISE = -3.13  # -ln(-ln(2**-33)) = -3.12999, of the lowest

_SQRT_HALF = 0x3FE6A09E667F3BCD  # the bits of the float64 sqrt(1/2)
_LN_TERMS = [
    2.0 / (2 * power + 1) for power in range(11)
]  # ln m = sum of term * z**(2 power + 1), z = (m - 1) / (m + 1)


def stream_key(seed: int, choice: int, output_index: int) -> int:
    """Key of the stream that one draw uses, as a signed 64-bit integer. `seed` counts modulo 2**64."""
    key = _mix(seed & _WORD)
    key = _mix((key + choice * _GOLDEN) & _WORD)
    return _signed(_mix((key + output_index * _GOLDEN) & _WORD))


def uniform_bits(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """int64 keys and token ids, broadcast against each other -> int64 in [0, 2**32)."""
    word = keys + (token_ids + 1) * _signed(_GOLDEN)  # element token_id of the stream, counted from 0
    word = word.bitwise_xor_(_shifted(word, 30)).mul_(_signed(_MIX_1))
    word = word.bitwise_xor_(_shifted(word, 27)).mul_(_signed(_MIX_2))
    return _shifted(word.bitwise_xor_(_shifted(word, 31)), 32)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """-ln(-ln u), u = (bits + 1/2) / 2**32, float64."""
    return -_ln(-_ln(_uniform(bits)))


def rough_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """`gumbel` within 1e-12, by the device's own logarithm: at a fifth of the cost, with bits of its own."""
    return _uniform(bits).log_().neg_().log_().neg_()


def bits_for(noise: torch.Tensor) -> torch.Tensor:
    """Bits below these give less than `noise` (float64). Errs by a few bits, always downwards."""
    return (torch.exp(-torch.exp(-noise)) * _BITS_LIMIT).floor().long() - 2


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    return bits.double().add_(0.5).mul_(1.0 / _BITS_LIMIT)


def _ln(value: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal float64, to about 1e-15 relative."""
    bits = value.view(torch.int64)
    exponent = (bits - _SQRT_HALF) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)  # in [sqrt(1/2), sqrt(2))
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = torch.full_like(square, _LN_TERMS[-1])
    for term in reversed(_LN_TERMS[:-1]):
        series.mul_(square).add_(term)
    return series.mul_(ratio).add_(exponent.double().mul_(math.log(2)))


def _shifted(word: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift right: torch's own keeps the sign."""
    return (word >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(word: int) -> int:
    """One step of SplitMix64 from state `word`."""
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
