"""Caching: the iris pipeline in three processes, with a real edit of a file before the third one.

In the first process every step runs. In the second one no step runs, and only the report is loaded.
Then we edit the helper ``centre``: the plan names it, and the steps that reach it run. The edit
does not change a prediction, so ``evaluate`` gives an equal value and the report is reused.
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
from dagkit import Pipeline, step

def centre(rows):
    return tuple(map(fmean, zip(*rows)))

@step
def load(path):
    return list(csv.reader(path.read_text().splitlines()))

@step
def clean(load):
    return [(tuple(map(float, row[:4])), row[4]) for row in load[1:] if len(row) == 5]

@step(outputs=("train", "test"))
def split(clean, nth=3):
    return [flower for i, flower in enumerate(clean) if i % nth], clean[::nth]

@step
def fit(train):
    kinds = {kind for _, kind in train}
    return {kind: centre([x for x, k in train if k == kind]) for kind in sorted(kinds)}

@step
def evaluate(fit, test):
    return fmean(min(fit, key=lambda kind: dist(fit[kind], x)) == kind for x, kind in test)

@step
def report(evaluate, test):
    return f"{evaluate:.1%} of {len(test)} flowers are classified correctly"

if __name__ == "__main__":
    pipeline = Pipeline(__name__, cache=True, store="results")
    inputs = {"path": Path(sys.argv[1])}
    print(pipeline.plan("report", **inputs))
    run = pipeline.run("report", **inputs)
    names = [name for name, state in run.steps.items() if state.status == "ran"]
    print("  ran:", ", ".join(names) or "nothing")
    print("  =>", run["report"])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flowers.py"
        for title, old, new in (
            ("first process", "", ""),
            ("second process", "", ""),
            ("after an edit of centre", "map(fmean,", "map(lambda x: sum(x) / len(x),"),
        ):
            file.write_text(STEPS.replace(old, new))
            print(f"--- {title}", flush=True)
            subprocess.run([sys.executable, "-W", "error", file.name, DATA], cwd=folder, check=True)


if __name__ == "__main__":
    main()
