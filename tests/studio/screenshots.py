"""Pictures of the studio's pages with the runs of this checkout, at desktop and phone width, in both languages.

    python -m tests.studio.screenshots OUT [key=value of studio …]

Nothing is started but the studio. The newest run is shown, and the first data file. It needs Chromium: CHROMIUM=, or on
the path.
"""

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

from tests.support.studio import opened
from train.config.options import pairs
from train.studio.folders import Folders

WIDTHS = {"desktop": 1200, "phone": 390}
LOCALES = {"en": "en-GB", "zh": "zh-CN"}
DRAWN = 3000  # ms for a page to fill


def addresses(folders: Folders) -> dict[str, str]:
    """Name of a picture -> address of its page."""
    found = {"data": "/data", "train": "/train", "runs": "/runs", "chat": "/chat"}
    if files := folders.data_files():
        found["data"] = f"/data?file={quote(files[0])}"
    if runs := folders.run_names():
        found |= {"run": f"/run?name={quote(runs[0])}", "runs": f"/runs?names={quote(','.join(runs[:3]))}"}
    return found


def main(out: Path, words: list[str]) -> None:
    """Write OUT/PAGE-LANGUAGE-WIDTH.png."""
    from playwright.sync_api import sync_playwright

    values = pairs(words)
    folders = Folders(*(Path(values.get(key, key)) for key in ("data", "models", "runs")))
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    out.mkdir(parents=True, exist_ok=True)
    with opened(Path.cwd(), out, *words) as studio, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for language, locale in LOCALES.items():
            for width, pixels in WIDTHS.items():
                page = browser.new_page(viewport={"width": pixels, "height": 844}, locale=locale)
                for name, address in addresses(folders).items():
                    page.goto(studio.url + address)
                    page.wait_for_timeout(DRAWN)
                    page.screenshot(path=out / f"{name}-{language}-{width}.png", full_page=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
