"""Iris: a whole pipeline, from a CSV file to an accuracy, in twenty lines.

Fisher's 150 flowers are loaded, cleaned, split, and told apart by the nearest centroid. Only the
standard library and dagkit are needed. Run it from the folder that holds ``examples``.
"""

import csv
from math import dist
from pathlib import Path
from statistics import fmean

from dagkit import Pipeline, step


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
    return {kind: tuple(map(fmean, zip(*[x for x, k in train if k == kind]))) for _, kind in train}


@step
def evaluate(fit, test):
    return fmean(min(fit, key=lambda kind: dist(fit[kind], x)) == kind for x, kind in test)


@step
def report(evaluate, test):
    return f"{evaluate:.1%} of {len(test)} flowers are told apart"


pipeline = Pipeline(__name__)
print(pipeline.run("report", path=Path("examples/data/iris.csv"))["report"])
