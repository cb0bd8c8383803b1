"""Addresses of the hubs that files come from, and whether the environment lets us ask them."""

import os

from train.common.download import UnreachableError

MODELSCOPE = "https://www.modelscope.cn"


def hub_address() -> str:
    """The model hub's address: HF_ENDPOINT, or else the one that huggingface_hub has.

    Raises:
        UnreachableError: the environment has HF_HUB_OFFLINE set.
    """
    from huggingface_hub import constants  # type: ignore[import-untyped]

    if is_offline():
        raise UnreachableError("not asked, HF_HUB_OFFLINE is set")
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def modelscope_address() -> str:
    """ModelScope's address: MODELSCOPE_ENDPOINT, or else its own.

    Raises:
        UnreachableError: the environment has HF_HUB_OFFLINE set: no hub is to be asked.
    """
    if is_offline():
        raise UnreachableError("not asked, HF_HUB_OFFLINE is set")
    return (os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE).rstrip("/")


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true")
