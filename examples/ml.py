"""Breast cancer: pandas and scikit-learn in steps, and one function as two models.

The function ``fit`` makes two steps, a strongly and a weakly regularised model. The second run is
given one model and the split, so it fits only the other model. This needs ``pip install
dagkit[examples]``.
"""

from typing import Any

import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dagkit import Pipeline, Step, step


@step
def frame() -> pd.DataFrame:
    table: pd.DataFrame = load_breast_cancer(as_frame=True).frame
    return table


@step
def clean(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.dropna().drop_duplicates()


@step(outputs=("train", "test"))
def split(clean: pd.DataFrame, seed: int = 0) -> list[pd.DataFrame]:
    parts: list[pd.DataFrame] = train_test_split(clean, test_size=0.25, random_state=seed)
    return parts


def fit(train: pd.DataFrame, strength: float) -> Any:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength))
    return model.fit(train.drop(columns="target"), train["target"])


weak = Step(fit, name="weak", args={"strength": "weak_strength"})
strong = Step(fit, name="strong", args={"strength": "strong_strength"})


@step
def accuracies(weak: Any, strong: Any, test: pd.DataFrame) -> dict[str, float]:
    features = test.drop(columns="target")
    scores = {}
    for name, model in (("weak", weak), ("strong", strong)):
        scores[name] = round(float(accuracy_score(test["target"], model.predict(features))), 3)
    return scores


pipeline = Pipeline(__name__)

if __name__ == "__main__":
    run = pipeline.run(weak_strength=0.001, strong_strength=1.0)
    print(f"{len(run['train'])} rows to train, {len(run['test'])} to test: {run['accuracies']}")
    again = pipeline.run("accuracies", weak_strength=0.1, strong=run["strong"], split=run["split"])
    print(f"another weak one, nothing else refitted: {again['accuracies']}, ran {[*again.steps]}")
