"""Iris: a whole pipeline, from a CSV file to an accuracy, in twenty lines.

The steps load 150 flowers of Fisher's data set, remove incomplete rows, split the flowers and
classify them by the nearest centroid. This needs dagkit and the standard library only. Run it from
the folder that contains ``examples``.
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
    return f"{evaluate:.1%} of {len(test)} flowers are classified correctly"


pipeline = Pipeline(__name__, cache=True)
print(pipeline.run("report", path=Path("examples/data/iris.csv"))["report"])
