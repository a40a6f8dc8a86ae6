"""What secure sums are made of: shares of a secret, keys that two agree on, masks from a key.

Agreement is X25519 through HKDF with SHA-256, encryption is ChaCha20-Poly1305, a mask is the stream of AES-256 in
counter mode, shares are Shamir's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedsim.core.fields import refuse


try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise ImportError("secure sums need the package cryptography: pip install 'fedsim[privacy]'") from error

PRIME = 2**256 + 297  # the smallest above all secrets, which have 32 bytes
SECRET = 32  # bytes
PIECE = 2**16  # numbers of a mask that are made at once, and stay in the cache


def split(secret: int, coefficients: Sequence[int], points: Iterable[int], prime: int = PRIME) -> dict[int, int]:
    """Shares of a secret by point, f(point) of f(x) = secret + sum_i coefficients[i] x**(i + 1) modulo `prime`: any
    `len(coefficients) + 1` of them give it back, fewer say nothing (Shamir 1979). Points are not 0."""
    shares = {}
    for point in points:
        value = 0
        for coefficient in [*reversed(coefficients), secret]:
            value = (value * point + coefficient) % prime
        shares[point] = value
    return shares


def joined(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """f(0) of the polynomial through these shares, by point (Lagrange)."""
    total = 0
    for point, share in shares.items():
        above = math.prod(other for other in shares if other != point)
        below = math.prod(other - point for other in shares if other != point)
        total += share * above * pow(below, -1, prime)
    return total % prime


def bytes_from(key: bytes, size: int) -> bytes:
    """The first `size` bytes of a generator's stream, each key having its own."""
    return Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(size))


def add_mask(numbers: np.ndarray, key: bytes, sign: int) -> None:
    """Add or subtract (`sign` 1 or -1) a generator's stream, in place, modulo the words' size."""
    stream, zeros = Cipher(AES256(key), CTR(bytes(16))).encryptor(), memoryview(bytes(PIECE * numbers.itemsize))
    piece = bytearray(len(zeros) + 16)
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(numbers), PIECE):
        into = numbers[start : start + PIECE]
        stream.update_into(zeros[: into.nbytes], piece)
        combine(into, np.frombuffer(piece, numbers.dtype, len(into)), out=into)


def agreed(private: bytes, public: bytes, purpose: str, other: int) -> bytes:
    """The key that two have in common. **Raises:** `ValueError` for what is no public key of `other`."""
    try:
        common = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        refuse(f"the public key of client {other}", public.hex(), "a point of X25519 that agrees on a key")
    return derived(common, purpose.encode())


def derived(key: bytes, purpose: bytes) -> bytes:
    """A key of another, for one purpose."""
    return HKDF(SHA256(), SECRET, None, b"fedsim secure sum: " + purpose).derive(key)


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign_of(client: int, other: int) -> int:
    """With which a client's mask enters that it has in common with another."""
    return 1 if client < other else -1


def encrypted(key: bytes, sender: int, receiver: int, text: bytes) -> bytes:
    """One text of a key that two have in common, which they use once in each direction."""
    return ChaCha20Poly1305(key).encrypt(_nonce(sender, receiver), text, None)


def decrypted(key: bytes, sender: int, receiver: int, text: bytes) -> bytes:
    """**Raises:** `ValueError` for a text that was changed, of another key, sender or receiver."""
    try:
        return ChaCha20Poly1305(key).decrypt(_nonce(sender, receiver), text, None)
    except InvalidTag:
        refuse("sealed", (sender, receiver), f"what client {sender} had encrypted for client {receiver}")


def _nonce(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(6, "big") + receiver.to_bytes(6, "big")
