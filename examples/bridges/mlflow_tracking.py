"""MLflow: a run of any pipeline as a run of MLflow, with parameters, metrics and step statuses.

A listener writes the status and the seconds of a step when it ends, so a run that is going on or
has failed shows how far it came. Inputs that are numbers or texts are parameters, and the record of
the run is an artifact.
"""

import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import mlflow

from dagkit import Event, Pipeline, Run


def listen(event: Event) -> None:
    state = event.state
    if event.kind == "step finished" and state is not None:
        status = state.status
        if state.error is not None:
            status = f"{type(state.error).__name__}: {state.error}"
        mlflow.set_tag(f"status.{event.step}", status)
        mlflow.log_metric(f"seconds.{event.step}", state.seconds)


def find_numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find_numbers(f"{name}.{key}", item)


def track(pipeline: Pipeline, *targets: str, **inputs: Any) -> Run:
    params = {**pipeline.inputs, **inputs}
    with mlflow.start_run():
        mlflow.log_params({n: v for n, v in params.items() if isinstance(v, str | int | float)})
        run = pipeline.replace(on_event=listen).run(*targets, **inputs)
        for name in run:
            mlflow.log_metrics(dict(find_numbers(name, run[name])))
        mlflow.log_dict(run.record, "record.json")
    return run


if __name__ == "__main__":
    sys.path.append(f"{sys.path[0]}/..")
    from ml import pipeline

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/runs.db")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("cancer", folder))
        for strength in (0.001, 0.1):
            track(pipeline, "accuracies", weak_strength=strength, strong_strength=1.0)
        columns = ["status", "params.weak_strength", "metrics.accuracies.weak"]
        print(mlflow.search_runs()[columns].to_string(index=False))
