"""How long training waits for its checkpoints: written at once, and in the background.

    python -m tests.faults.blocking [key=value of the recipe …]

The same short run twice; timings.saving_seconds of run.json is what training waited, whatever was written meanwhile.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.faults import kills
from train.files import read_json

KEYS = {
    "rank": "512",
    "alpha": "512",
    "steps": "60",
    "save_every": "20",
    "accumulation": "16",
    "batch": "2",
    "learning_rate": "1e-4",
}


def main(words: list[str]) -> int:
    more = dict(word.split("=", 1) for word in words if "=" in word)
    life = kills.commanded if "command" in words else kills.forked
    if life is kills.forked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        kills.warm()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        kills.house(Path(made))
        for how in ("off", "on"):
            keys = {**kills.KEYS, **KEYS, **more, "run": how, "background": how}
            assert set(kills.wait(life(keys, 1))) == {0}, Path(f"{how}.log").read_text()
            times = read_json(Path("runs") / how / "run.json")["timings"]
            size = sum(path.stat().st_size for path in next(Path("runs", how, "checkpoints").iterdir()).iterdir())
            share = times["saving_seconds"] / (times["steps_seconds"] + times["saving_seconds"])
            print(
                f"background={how}: {times['saves']} saves of {size / 1e6:.1f} MB, training waited {times['saving_seconds']:.2f} s "
                f"of {times['steps_seconds'] + times['saving_seconds']:.1f} s ({share:.2%})",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
