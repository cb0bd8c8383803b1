"""How a person may name a model: a hub id, the address of its page on a hub, either with a slash at the end."""

import re

from train.common.errors import UserError

HUBS = ("huggingface.co", "hf.co", "hf-mirror.com", "modelscope.cn", "www.modelscope.cn", "www.huggingface.co")
PAGE = re.compile(
    r"(?:models/)?(?P<id>[\w.-]+/[\w.-]+?)(?:\.git)?(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/]+).*|/files.*|/summary.*)?"
)
NO_MODELS = ("datasets", "spaces", "docs", "studios", "collections", "organization")


def hub_name(model: str) -> str:
    """`model` as owner/name where it is that or the address of that model's page; any other name without its last slash.

    Raises:
        UserError: an address of something else.
    """
    return _parts(model)[0]


def page_revision(model: str) -> str:
    """The branch, tag or commit in the address of a page (…/tree/REVISION); empty if there is none, or it is main."""
    revision = _parts(model)[1]
    return "" if revision in ("main", "master") else revision


def _parts(model: str) -> tuple[str, str]:
    scheme, _, rest = model.strip().rpartition("://")
    host, _, path = re.split(r"[?#]", rest)[0].partition("/")
    if scheme not in ("http", "https") and not (scheme == "" and host in HUBS):
        return model.strip().rstrip("/") or model, ""
    page = PAGE.fullmatch(path.strip("/"))
    if page is None or page["id"].partition("/")[0] in NO_MODELS:
        raise UserError(
            f"model {model!r}: not the page of a model. Give its id, owner/name, or the address "
            "https://huggingface.co/OWNER/NAME"
        )
    return page["id"], page["revision"] or ""
