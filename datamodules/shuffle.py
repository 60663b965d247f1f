"""A permutation of ``range(size)`` that needs no memory: any position is computed from a key alone.

A balanced Feistel network over the smallest even number of bits that holds ``size``, with cycle walking
(J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3). A prompt
stream can therefore jump to any position of any epoch, and no random number generator's state is read or
moved.
"""

from __future__ import annotations

import hashlib

ROUNDS = 6
_MASK64 = (1 << 64) - 1


class Permutation:
    """A pseudo-random bijection of ``range(size)``, chosen by ``key``.

    Args:
        size: Number of items, at least 1.
        key: Integers that choose the permutation, e.g. ``(seed, epoch)``.

    Example:
        >>> order = Permutation(10, key=(0, 0))
        >>> sorted(order(i) for i in range(10)) == list(range(10))
        True
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one item, got size={size}.")
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "big") for r in range(ROUNDS)]

    def __call__(self, position: int) -> int:
        """The item at ``position``; both in ``range(size)``.

        Raises:
            IndexError: If ``position`` is outside.
        """
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside range({self.size}).")
        value = self._network(position)
        while value >= self.size:  # walk the cycle back into the domain: fewer than 4 steps on average
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        low_mask = (1 << self._half) - 1
        left, right = value >> self._half, value & low_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & low_mask)
        return left << self._half | right


def _mix(x: int) -> int:
    """64-bit finaliser of MurmurHash3 (public domain constants): every input bit moves every output bit."""
    x &= _MASK64
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & _MASK64
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & _MASK64
    return x ^ x >> 33
