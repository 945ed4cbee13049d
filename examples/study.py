"""A parameter study is a list of runs, and the records of the runs are its table.

We call ``run`` with five strengths of regularisation. The first two steps do not depend on the
strength, so they run once. ``history()`` returns the table, and matplotlib draws the curve.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from dagkit import Pipeline, step


@step(cache=True)
def tumours() -> Any:
    return load_breast_cancer(as_frame=True).frame


@step(cache=True, outputs=("features", "truth"))
def scaled(tumours: pd.DataFrame) -> tuple[np.ndarray, pd.Series]:
    features = tumours.drop(columns="target")
    return StandardScaler().fit_transform(features), tumours["target"]


@step(cache=True)
def accuracy(features: np.ndarray, truth: pd.Series, strength: float = 1.0) -> float:
    model = LogisticRegression(C=1 / strength, max_iter=1000)
    return float(cross_val_score(model, features, truth, cv=5).mean())


folder = Path(tempfile.mkdtemp())
pipeline = Pipeline(__name__, store=folder / "store")

runs = [pipeline.run("accuracy", strength=strength) for strength in (0.001, 0.1, 1.0, 10.0, 1000.0)]
print("scaled:", ", ".join(run.steps["scaled"].status for run in runs))

history = pipeline.history()
print(history)

figure = Figure()
axes = figure.subplots()
pd.DataFrame(history).plot(
    x="inputs.strength", y="metrics.accuracy", logx=True, marker="o", ax=axes
)
figure.savefig(folder / "study.png")

best = max(history, key=lambda row: row["metrics.accuracy"])
accuracy_again = pipeline.run(**best.inputs)["accuracy"]
print(f"best: strength {best['inputs.strength']}, once more: {accuracy_again:.3f}")
