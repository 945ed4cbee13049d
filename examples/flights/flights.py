"""How late do flights from New York arrive? Real tables in, a model and reports out.

The data are 3,000 flights of 2013 with their planes and airlines, a sample of the public
``nycflights13`` tables. The functions do not open files: the catalog says what is loaded from
where, and what is saved where. The second parameter changes only the model, so the other results
are reused, and the records of the runs are a table. The bridges in ``examples/bridges`` run this
pipeline unchanged on Luigi, Kedro and Airflow.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import train_test_split

from dagkit import Pipeline, step

FEATURES = ["month", "sched_dep_time", "dep_delay", "distance", "seats", "age"]


@step
def known_flights(flights: pd.DataFrame, planes: pd.DataFrame) -> pd.DataFrame:
    arrivals = flights.dropna(subset=["dep_delay", "arr_delay"])
    table = arrivals.merge(planes, on="tailnum", how="left")
    return table.assign(age=2013 - table["year"])


@step(cache=True, outputs=("train", "test"))
def split(known_flights: pd.DataFrame, test_size: float = 0.25, seed: int = 0) -> Any:
    return train_test_split(known_flights, test_size=test_size, random_state=seed)


@step
def model(train: pd.DataFrame, depth: int = 3, seed: int = 0) -> HistGradientBoostingRegressor:
    regressor = HistGradientBoostingRegressor(max_depth=depth, random_state=seed)
    return regressor.fit(train[FEATURES], train["arr_delay"])


@step(outputs=("r2", "minutes_off"))
def scores(model: HistGradientBoostingRegressor, test: pd.DataFrame) -> tuple[float, float]:
    prediction = model.predict(test[FEATURES])
    truth = test["arr_delay"]
    return r2_score(truth, prediction), mean_absolute_error(truth, prediction)


@step
def by_airline(known_flights: pd.DataFrame, airlines: pd.DataFrame) -> pd.DataFrame:
    table = known_flights.merge(airlines, on="carrier")
    delays = table.groupby("name")["arr_delay"].agg(["size", "mean"])
    return delays.sort_values("mean", ascending=False).reset_index()


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
