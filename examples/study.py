"""A parameter study is a list of runs: shared steps run once, and the records are the table.

Five strengths of regularisation, one call of ``run`` each. The store sees to it that loading and
scaling happen once; ``history()`` is the table that compares the runs, and a frame for pandas. The
curve is drawn by matplotlib into the folder of the store.
"""

import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from dagkit import Pipeline, step

plt.switch_backend("agg")


@step(cache=True)
def tumours() -> Any:
    return load_breast_cancer(as_frame=True).frame


@step(cache=True, outputs=("features", "truth"))
def scaled(tumours: pd.DataFrame) -> tuple[np.ndarray, pd.Series]:
    wanted = tumours.drop(columns="target")
    return StandardScaler().fit_transform(wanted), tumours["target"]


@step(cache=True)
def accuracy(features: np.ndarray, truth: pd.Series, strength: float = 1.0) -> float:
    model = LogisticRegression(C=1 / strength, max_iter=1000)
    return float(cross_val_score(model, features, truth, cv=5).mean())


folder = Path(tempfile.mkdtemp())
pipeline = Pipeline(__name__, store=folder / "store")

runs = [pipeline.run("accuracy", strength=s) for s in (0.001, 0.1, 1.0, 10.0, 1000.0)]
print("scaled:", ", ".join(run.steps["scaled"].status for run in runs))

history = pipeline.history()
print(history)

pd.DataFrame(history).plot(x="inputs.strength", y="metrics.accuracy", logx=True, marker="o")
plt.savefig(folder / "study.png")
best = max(history, key=lambda row: row["metrics.accuracy"])
again = pipeline.run(**best.inputs)["accuracy"]
print(f"best: strength {best['inputs.strength']}, once more: {again:.3f}")
