"""Caching: the iris pipeline in three processes, with a real edit of a real file between them.

Cold, every step runs. Warm, nothing runs, and nothing but the report is loaded. After an edit of
one helper, only what it reaches runs, and the plan names the helper beforehand. Since the edit
changes no prediction, the report is reused all the same: an equal value stops there.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).parent.resolve() / "data" / "iris.csv"

STEPS = """
import csv, sys
from math import dist
from pathlib import Path
from statistics import fmean
from dagkit import Pipeline, Store, step

def centre(rows):
    return tuple(map(fmean, zip(*rows)))

@step(cache=True)
def load(path):
    return list(csv.reader(path.read_text().splitlines()))

@step(cache=True)
def clean(load):
    return [(tuple(map(float, row[:4])), row[4]) for row in load[1:] if len(row) == 5]

@step(cache=True, outputs=("train", "test"))
def split(clean, nth=3):
    return [flower for i, flower in enumerate(clean) if i % nth], clean[::nth]

@step(cache=True)
def fit(train):
    kinds = {kind for _, kind in train}
    return {kind: centre([x for x, k in train if k == kind]) for kind in sorted(kinds)}

@step(cache=True)
def evaluate(fit, test):
    return fmean(min(fit, key=lambda kind: dist(fit[kind], x)) == kind for x, kind in test)

@step(cache=True)
def report(evaluate, test):
    return f"{evaluate:.1%} of {len(test)} flowers are told apart"

class Loud(Store):
    def _load(self, head, part=""):
        print(f"  loads {part or head.step}")
        return super()._load(head, part)

if __name__ == "__main__":
    pipeline = Pipeline(__name__, store=Loud("results"))
    inputs = {"path": Path(sys.argv[1])}
    print(pipeline.plan("report", **inputs))
    run = pipeline.run("report", **inputs)
    print("  ran:", ", ".join(n for n, s in run.steps.items() if s.status == "ran") or "nothing")
    print("  =>", run["report"])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flowers.py"
        file.write_text(STEPS)
        for title, edit in (
            ("cold", ("", "")),
            ("warm", ("", "")),
            (
                "after an edit of the helper centre",
                ("map(fmean,", "map(lambda x: sum(x) / len(x),"),
            ),
        ):
            file.write_text(file.read_text().replace(*edit))
            print(f"--- {title}", flush=True)
            subprocess.run([sys.executable, "-W", "error", file.name, DATA], cwd=folder, check=True)


if __name__ == "__main__":
    main()
