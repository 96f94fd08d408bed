"""Randomness with an address: a draw depends on what it is for, never on what was drawn before it."""

import hashlib

import torch


def derive_seed(seed: int, *address: int | str) -> int:
    """Seed of one address: the first 63 bits of SHA-256 over the seed and the address.

    Args:
        seed: The run's seed, any integer.
        *address: What the draw is for, e.g. ``"train", step``. Integers and strings are told apart.

    Returns:
        An integer in [0, 2**63), the same in every process, on every machine and day.

    Raises:
        TypeError: If a part is neither an integer nor a string (its text could change between runs).
    """
    parts = [seed, *address]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"an address holds integers and strings, got {part!r} of type {type(part).__name__}")
    text = "/".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one address.

    Args:
        seed: The run's seed.
        *address: What the draw is for, e.g. ``"sample", 17``.
        device: Where the numbers will be drawn. The same address draws other numbers on another device type.

    Returns:
        A generator seeded with :func:`derive_seed`; drawing from it moves no other generator.

    Example:
        >>> int(torch.randint(100, (1,), generator=generator(0, "a"))) == int(
        ...     torch.randint(100, (1,), generator=generator(0, "a")))
        True
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *address))
