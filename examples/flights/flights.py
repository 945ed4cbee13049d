"""Real tables in, a model and reports out: how late flights from New York arrive.

Three CSV files (3,000 flights of 2013 with their planes and airlines, a sample of the public
``nycflights13`` data) become a model, a table and a sentence. The steps know of no file: the
catalog says what is loaded from where and kept where. Run twice with different parameters, what
does not depend on them is computed once, and the records of the runs are a table. The bridges in
``examples/bridges`` put this pipeline on Luigi, Kedro and Airflow as it is.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import train_test_split

from dagkit import Pipeline, step

KNOWN = ["month", "sched_dep_time", "dep_delay", "distance", "seats", "age"]


@step
def known_flights(flights: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    arrived = flights.dropna(subset=["dep_delay", "arr_delay"])
    joined = arrived.merge(planes, on="tailnum", how="left")
    return joined.assign(age=2013 - joined["year"])


@step(cache=True, outputs=("train", "test"))
def split(known_flights: pd.DataFrame, test_size: float = 0.25, seed: int = 0) -> Any:
    return train_test_split(known_flights, test_size=test_size, random_state=seed)


@step
def model(train: pd.DataFrame, depth: int = 3, seed: int = 0) -> HistGradientBoostingRegressor:
    made = HistGradientBoostingRegressor(max_depth=depth, random_state=seed)
    return made.fit(train[KNOWN], train["arr_delay"])


@step(outputs=("r2", "minutes_off"))
def scores(model: HistGradientBoostingRegressor, test: pd.DataFrame) -> tuple[float, float]:
    found = model.predict(test[KNOWN])
    truth = test["arr_delay"]
    return r2_score(truth, found), mean_absolute_error(truth, found)


@step
def by_airline(known_flights: pd.DataFrame, airlines: pd.DataFrame) -> pd.DataFrame:
    named = known_flights.merge(airlines, on="carrier")
    late = named.groupby("name")["arr_delay"].agg(["size", "mean"])
    return late.sort_values("mean", ascending=False).reset_index()


@step
def report(minutes_off: float, by_airline: pd.DataFrame) -> str:
    worst = by_airline[by_airline["size"] > 100].iloc[0]
    return f"{minutes_off:.1f} minutes off on average; latest: {worst['name']}\n"


HERE = Path(__file__).parent
pipeline = Pipeline(
    __name__,
    store=HERE / "out" / "store",
    catalog={
        "flights": HERE / "data" / "flights.csv",
        "planes": HERE / "data" / "planes.csv",
        "airlines": HERE / "data" / "airlines.csv",
        "known_flights": HERE / "out" / "known_flights.parquet",
        "model": HERE / "out" / "depth-{depth}" / "model.pkl",
        "by_airline": HERE / "out" / "by_airline.csv",
        "report": HERE / "out" / "depth-{depth}" / "report.txt",
    },
)


if __name__ == "__main__":
    for depth in (1, 4):
        run = pipeline.run("r2", "minutes_off", "report", depth=depth)
        print(run, run["report"], sep="\n")
    print(pipeline.history())
