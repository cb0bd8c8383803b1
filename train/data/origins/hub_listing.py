"""What a hub has under the name of a data set: its files at a commit, over plain HTTP.

Two protocols: the model hub's (api/datasets/NAME/revision/REVISION, and its mirrors'), and ModelScope's (repo/tree and
repo of its API). This module writes no file.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from train.common.download import TIMEOUT, UnreachableError
from train.common.errors import UserError
from train.common.hub import HubFile, Listing, hub_address, modelscope_address
from train.data.origins.hub_data import HubSet

PAGE = 200  # files that ModelScope lists at once
COMMIT = 40  # characters
SCRIPTS_REASON = (
    "its rows are made by a script ({script}), and the code of a data set is never run here (no trust_remote_code)"
)


def list_files(wanted: HubSet) -> Listing:
    """The files of the set's repository, at the commit that its revision means.

    Raises:
        UnreachableError: the hub does not answer, or is not to be asked.
        UserError: no such set or revision, a set that needs a login, one that is made by a script, or odd file names.
    """
    listing = _of_hub(wanted) if wanted.hub == "hub" else _of_modelscope(wanted)
    for name in listing.files:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise UserError(
                f"data {wanted}: the hub lists a file {name!r}, which leads out of the folder. Not fetched."
            )
    script = f"{Path(wanted.id).name}.py"
    if script in listing.files:
        remedy = ""
        if wanted.hub == "hub":
            remedy = (
                " The hub keeps a copy of many such sets as Parquet files, without the script: "
                f"DATA=hub:{wanted.id}@refs/convert/parquet"
            )
        raise UserError(f"data {wanted}: {SCRIPTS_REASON.format(script=script)}.{remedy}")
    return listing


# The model hub


def _of_hub(wanted: HubSet) -> Listing:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[import-untyped]

    address, headers = hub_address(), build_hf_headers()
    url = f"{address}/api/datasets/{wanted.id}/revision/{quote(wanted.asked, safe='')}?blobs=true"
    answer = _get(url, wanted, headers)
    commit = answer["sha"]
    files = {}
    for sibling in answer["siblings"]:
        name, lfs = sibling["rfilename"], sibling.get("lfs") or {}
        place = f"{address}/datasets/{wanted.id}/resolve/{commit}/{quote(name)}"
        sha256 = lfs.get("sha256") or lfs.get("oid")
        files[name] = HubFile(name, sibling.get("size"), sha256, None if lfs else sibling.get("blobId"), place)
    return Listing(address, commit, files, headers)


# ModelScope


def _of_modelscope(wanted: HubSet) -> Listing:
    address = modelscope_address()
    token = os.environ.get("MODELSCOPE_API_TOKEN", "")
    headers = {"Cookie": f"m_session_id={token}"} if token else {}
    api = f"{address}/api/v1/datasets/{wanted.id}"
    files, newest = {}, ("", "")
    for entry in _walk(api, wanted, headers):
        name = entry["Path"]
        place = f"{api}/repo?{urlencode({'Revision': wanted.asked, 'FilePath': name})}"
        files[name] = HubFile(name, entry.get("Size"), entry.get("Sha256") or None, None, place)
        newest = max(newest, (str(entry.get("CommittedDate", "")), str(entry.get("Revision") or "")))
    return Listing(address, newest[1] if len(newest[1]) == COMMIT else _hash_of(files), files, headers)


def _walk(api: str, wanted: HubSet, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Every file of the repository: folder by folder, page by page (not every server lists folders recursively)."""
    folders = [""]
    while folders:
        root, page = folders.pop(), 1
        while True:
            keys = {"Revision": wanted.asked, "Root": root, "PageNumber": page, "PageSize": PAGE}
            entries = _get(f"{api}/repo/tree?{urlencode(keys)}", wanted, headers)["Data"]["Files"] or []
            folders += [entry["Path"] for entry in entries if entry["Type"] == "tree"]
            yield from (entry for entry in entries if entry["Type"] != "tree")
            if len(entries) < PAGE:
                break
            page += 1


def _hash_of(files: Mapping[str, HubFile]) -> str:
    """A name for the content of all files, where ModelScope gives no commit."""
    import hashlib

    text = "\n".join(f"{file.name} {file.bytes} {file.sha256}" for _, file in sorted(files.items()))
    return hashlib.sha1(text.encode()).hexdigest()


# HTTP


def _get(url: str, wanted: HubSet, headers: Mapping[str, str]) -> Any:
    """The JSON that the hub answers.

    Raises:
        UnreachableError: no answer, or one that is not JSON of this protocol.
        UserError: no such set, or one that needs a login.
    """
    import requests  # type: ignore[import-untyped]

    server = url.split("/")[2]
    try:
        with requests.get(url, headers=dict(headers), timeout=TIMEOUT) as response:
            if response.status_code in (401, 403):
                raise UserError(needs_login(wanted))
            if response.status_code == 404:
                raise UserError(_unknown(wanted, response.headers.get("X-Error-Code", "")))
            response.raise_for_status()
            answer = response.json()
    except requests.JSONDecodeError as error:
        raise UnreachableError(f"{server} answers with something else than JSON: is it a hub?") from error
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", "")
        raise UnreachableError(f"{server} does not answer ({status or type(error).__name__})") from error
    if isinstance(answer, dict) and answer.get("Success") is False:
        raise UserError(_unknown(wanted, str(answer.get("Message", ""))))
    expected = "siblings" if wanted.hub == "hub" else "Data"
    if not isinstance(answer, dict) or not answer.get(expected):
        raise UnreachableError(f"{server} answers with something else than a list of files: is it a hub?")
    return answer


def needs_login(wanted: HubSet) -> str:
    """The error for a set whose files the hub gives to people who are logged in only."""
    key = "HF_TOKEN" if wanted.hub == "hub" else "MODELSCOPE_API_TOKEN"
    return (
        f"data {wanted}: the hub asks for a login: the name is misspelt, or the set is private or gated. Is it gated, "
        f"accept its terms on its page, then give your token: {key}=… make fetch DATA={wanted}"
    )


def _unknown(wanted: HubSet, detail: str) -> str:
    revision = f", or no revision {wanted.revision!r}" if wanted.revision else ""
    return (
        f"data {wanted}: the hub has no data set {wanted.id!r}{revision}{f' ({detail})' if detail else ''}. Is it spelt "
        "right (owner/name)?"
    )
