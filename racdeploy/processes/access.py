"""API keys in the environment, and addresses of this machine."""

from __future__ import annotations

import ipaddress
import os

from racdeploy.errors import UsageError


def read_key(name: str) -> str:
    """Return the API key in an environment variable, empty for an empty name."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UsageError(
            "api-key-not-set",
            f"{name} is not set, so there is no API key",
            remedy=f"export {name}=…, or name no variable where no key is needed",
        )

    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            "api-key-malformed",
            f"the key in {name} contains white space or letters outside ASCII",
            remedy=f"export {name}=… again",
        )

    return key


def is_loopback(host: str) -> bool:
    """Return True for localhost and loopback addresses."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
