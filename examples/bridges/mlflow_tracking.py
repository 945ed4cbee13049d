"""MLflow: a run of any pipeline as a run of MLflow: parameters, numbers as metrics, steps live.

A listener writes status and seconds of a step when it ends, so a run that is under way, or that
failed, shows how far it came. Scalar inputs are parameters; dagkit's own record is an artifact.
"""

import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import mlflow

from dagkit import Event, Pipeline, Run


def listen(event: Event) -> None:
    if event.kind == "step finished":
        mlflow.set_tag(f"status.{event.step}", event.error or event.status)
        mlflow.log_metric(f"seconds.{event.step}", event.seconds)


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from numbers(f"{name}.{key}", inner)


def track(pipeline: Pipeline, *targets: str, **inputs: Any) -> Run:
    watched, known = pipeline.replace(on_event=listen), {**pipeline.inputs, **inputs}
    with mlflow.start_run():
        shown = {n: v for n, v in known.items() if n not in pipeline.secret}
        mlflow.log_params({n: v for n, v in shown.items() if isinstance(v, str | int | float)})
        run = watched.run(*targets, **inputs)
        mlflow.log_metrics(dict(pair for name in run for pair in numbers(name, run[name])))
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
