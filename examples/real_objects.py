"""Real objects and real files: a pipeline in three processes, with an edit before the third one.

Its values are a pydantic model, a polars frame, a scipy matrix and a scikit-learn classifier. Two
steps read files that they do not take as inputs: ``rows`` a CSV file, through a reader written in
Rust, and ``words`` a JSON file. In the second process everything is reused. Then we edit the JSON
file: the plan names it, and only ``words`` and what depends on its value run again.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = """
import json
from pathlib import Path
import numpy as np
import polars as pl
import scipy.sparse
from dagkit import Pipeline, step
from pydantic import BaseModel
from sklearn.linear_model import SGDClassifier

DATA = Path("data")

class Config(BaseModel):
    epochs: int = 5
    seed: int = 0

@step
def rows():
    return pl.read_csv(DATA / "reviews.csv")

@step
def words():
    return json.loads((DATA / "words.json").read_text())

@step
def features(rows, words):
    counts = [[text.split().count(word) for word in words] for text in rows["text"]]
    return scipy.sparse.csr_matrix(np.array(counts, dtype=float))

@step
def model(config):
    return SGDClassifier(random_state=config.seed)

@step
def fitted(model, features, rows, config):
    for _ in range(config.epochs):  # changes the model in place: the step has a copy of its own
        model.partial_fit(features, rows["good"].to_numpy(), classes=[0, 1])
    return model

@step
def accuracy(fitted, features, rows):
    return float(fitted.score(features, rows["good"].to_numpy()))

@step
def size(rows):
    return rows.height

if __name__ == "__main__":
    pipeline = Pipeline(__name__, cache=True, store="results")
    print(pipeline.plan(config=Config()))
    run = pipeline.run(config=Config())
    names = [name for name, state in run.steps.items() if state.status == "ran"]
    print("  ran:", ", ".join(names) or "nothing")
    print(f"  => {run['accuracy']:.0%} of {run['size']} reviews are classified correctly")
"""

REVIEWS = """text,good
a good film,1
a bad film,0
very good and not long,1
too long and bad,0
good music,1
a dull film,0
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "reviews.py").write_text(STEPS)
        (folder / "data" / "reviews.csv").write_text(REVIEWS)
        for title, words in (
            ("first process", ["long"]),
            ("second process", ["long"]),
            ("after an edit of data/words.json", ["good", "bad", "dull"]),
        ):
            (folder / "data" / "words.json").write_text(json.dumps(words))
            print(f"--- {title}", flush=True)
            subprocess.run([sys.executable, "-W", "error", "reviews.py"], cwd=folder, check=True)


if __name__ == "__main__":
    main()
