"""Fetch data sets of a hub to data/, checked against the hub's own hashes; the other commands then need no network.

make fetch DATA=hub:OWNER/NAME[:SUBSET][@REVISION][#SPLIT]     the model hub, or HF_ENDPOINT's mirror of it
make fetch DATA=ms:OWNER/NAME                                  ModelScope
make fetch DATA=data:alpaca_zh                                 what data/dataset_info.json says is on a hub

Without a split it is `train`, without a revision the newest. The files stay as they were published, in data/hub/ and
data/ms/, and the same command has nothing to do; UPDATE=1 asks the hub for a newer revision. A run records the commit
and the hash of its data. Code of a data set is never run. HF_TOKEN is used where a set needs a login, HF_HUB_OFFLINE=1
takes what is in the hub's own cache.

This is a command of its own because it has a network: what reads your data (data, train, doctor, compare) has none, so
no row can leave the machine, and this command reads none.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common import commands
from train.common.errors import UserError
from train.config.options import option
from train.data.origins import hub_data
from train.data.origins.hub_data import FetchedSplit
from train.data.origins.sources import hub_sets


@dataclass(frozen=True)
class Options:
    """Fetch data sets of a hub."""

    data: str = option("", f"{hub_data.FORM}, or a set of a dataset_info.json; several with commas between")
    update: bool = option(False, "ask the hub again what a branch means today, and fetch that")


def run(options: Options) -> None:
    if not options.data:
        raise UserError("fetch: which data set? Example: make fetch DATA=hub:owner/name")
    wanted = hub_sets(options.data)
    if not wanted:
        raise UserError(
            f"data {options.data}: nothing of it is on a hub: nothing to fetch. The form is {hub_data.FORM}"
        )
    for one in wanted:
        from train.data.origins.hub_fetch import fetch_split

        _report(fetch_split(one, options.update))
    print(f"Next: {commands.make('data', data=options.data)}")


def _report(fetched: FetchedSplit) -> None:
    size = sum(path.stat().st_size for path in fetched.files)
    noun = "file" if len(fetched.files) == 1 else "files"
    folder = Path(fetched.pinned.home) / fetched.commit
    print(f"{fetched.pinned}: {len(fetched.files)} {noun}, {size:,} bytes, in {folder}.")
