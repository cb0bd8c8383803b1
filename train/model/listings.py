"""What a hub has under the id of a model: its files at a commit, with sizes and hashes, over plain HTTP.

Two protocols: the model hub's (api/models/ID/revision/REVISION, and its mirrors'), and ModelScope's (api/v1/models/ID/
repo/files). Files in folders are left out: a model that this program reads has none there. It writes no file.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from train.common.download import TIMEOUT, UnreachableError
from train.common.errors import UserError
from train.common.hub import HubFile, Listing, hub_address, modelscope_address

COMMIT = 40  # characters
BRANCH = {"main": "master"}  # the hub's name of the usual branch -> ModelScope's


class NotThereError(UserError):
    """A hub that answers, but has no such model or revision, or shows it only after a login."""


def list_hub(model: str, revision: str) -> Listing:
    """The files of a model on the hub or its mirror, at the commit that `revision` means.

    Raises:
        UnreachableError: the hub does not answer, or is not to be asked. NotThereError: it has no such model.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[import-untyped]

    address, headers = hub_address(), build_hf_headers()
    answer = _get(f"{address}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true", headers, "siblings")
    try:
        commit, siblings = str(answer["sha"]), [(str(entry["rfilename"]), entry) for entry in answer["siblings"]]
        files = [
            _hub_file(name, entry, f"{address}/{model}/resolve/{commit}/{quote(name)}") for name, entry in siblings
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise UnreachableError(f"{address} answers with something else than a list of files") from error
    return Listing(address, commit, _in_root(files), headers)


def _hub_file(name: str, entry: Mapping[str, Any], url: str) -> HubFile:
    """A file as `blobs=true` describes it: the sha256 of a large one, git's hash of a small one."""
    lfs = entry.get("lfs") or {}
    blob = str(entry.get("blobId") or "")
    digest = lfs.get("sha256") or lfs.get("oid")
    return HubFile(name, entry.get("size"), digest, blob if not lfs and len(blob) == COMMIT else None, url)


def list_modelscope(model: str, revision: str) -> Listing:
    """The files of a model on ModelScope. Raises as `list_hub` does."""
    address, asked = modelscope_address(), BRANCH.get(revision, revision)
    token = os.environ.get("MODELSCOPE_API_TOKEN", "")
    headers = {"Cookie": f"m_session_id={token}"} if token else {}
    api = f"{address}/api/v1/models/{model}/repo"
    answer = _get(f"{api}/files?{urlencode({'Revision': asked, 'Recursive': 'False'})}", headers, "Data")
    try:
        entries = [entry for entry in answer["Data"]["Files"] or [] if entry["Type"] != "tree"]
        files = [_modelscope_file(entry, api, asked) for entry in entries]
        newest = max(
            ((str(e.get("CommittedDate", "")), str(e.get("Revision") or "")) for e in entries), default=("", "")
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise UnreachableError(f"{address} answers with something else than a list of files") from error
    commit = newest[1] if len(newest[1]) == COMMIT else _hash_of(files)
    return Listing(address, commit, _in_root(files), headers)


def _modelscope_file(entry: Mapping[str, Any], api: str, revision: str) -> HubFile:
    name = str(entry["Path"])
    url = f"{api}?{urlencode({'Revision': revision, 'FilePath': name})}"
    return HubFile(name, entry.get("Size"), entry.get("Sha256") or None, None, url)


def _hash_of(files: list[HubFile]) -> str:
    """A name for the content of all files, where ModelScope gives no commit."""
    lines = sorted(f"{file.name} {file.bytes} {file.sha256}" for file in files)
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()


def _in_root(files: list[HubFile]) -> dict[str, HubFile]:
    plain = (file for file in files if not set("/\\\0") & set(file.name) and file.name not in ("", ".", ".."))
    return {file.name: file for file in plain}


def _get(url: str, headers: Mapping[str, str], expected: str) -> Any:
    """The JSON object that a hub answers, with a value for the key `expected`.

    Raises:
        UnreachableError: no answer, or one that is not of this protocol. NotThereError: no such model, or a login.
    """
    import requests  # type: ignore[import-untyped]

    server = "/".join(url.split("/")[:3])
    try:
        with requests.get(url, headers=dict(headers), timeout=TIMEOUT) as response:
            if response.status_code in (401, 403, 404):
                raise _not_there(server, str(response.status_code))
            response.raise_for_status()
            answer = response.json()
    except requests.JSONDecodeError as error:
        raise UnreachableError(
            f"{server} answers with something else than JSON: does this network ask for a login?"
        ) from error
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", "")
        raise UnreachableError(f"{server} does not answer ({status or type(error).__name__})") from error
    if isinstance(answer, dict) and answer.get("Success") is False:
        raise _not_there(server, str(answer.get("Message", "no"))[:80])
    if not isinstance(answer, dict) or not answer.get(expected):
        raise UnreachableError(f"{server} answers with something else than a list of files: is it a hub?")
    return answer


def _not_there(server: str, answer: str) -> NotThereError:
    return NotThereError(
        f"{server} answers {answer}. Is the name spelt right (owner/name), and the revision? A model that needs a login "
        "also needs HF_TOKEN (ModelScope: MODELSCOPE_API_TOKEN)."
    )
