"""Write one page about a run, for the browser: runs/NAME/report.html.

make report RUN=name

Loss and held-out loss, learning rate, gradient norms, tokens per second, memory, the data, the answers before and after
training (of `make compare`), what was decided, and what the run was made of; in English and Chinese. The page is one
file without a script, and opens without a network. A run that is under way, was stopped or was continued has one too:
the page is as of the last finished step, and the same command writes it again.
"""

from dataclasses import dataclass

from train.common.errors import UserError
from train.common.names import below
from train.config.options import option
from train.pages import run_page


@dataclass(frozen=True)
class Options:
    """Which run."""

    run: str = option("", "name of a run below runs/")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    if not options.run:
        raise UserError("which run? RUN= names a folder below runs/. Example: make report RUN=demo")
    path = run_page.write(below(options.runs, options.run, "run"))
    print(f"{path}: the page of this run, for a browser.")
