"""When a step fails: retries, skips, going on, and an error that says where.

A flaky download is tried again, a missing report is skipped, and with ``on_error="continue"`` all
that does not depend on a failure still runs.
"""

from collections.abc import Iterator

from dagkit import DagkitError, Pipeline, Skip, step

weather: Iterator[bool] = iter([False, False, True])


@step(retries=3, retry_delay=0.01, retry_backoff=2.0)
def download(url: str) -> str:
    if not next(weather):
        raise ConnectionError("no answer")
    return f"content of {url}"


@step
def parsed(download: str) -> int:
    return int(download)


@step
def archive(download: str) -> str:
    return download.upper()


@step
def extra(archive: str) -> str:
    raise Skip("nothing extra today")


@step
def report(archive: str, extra: str = "no extra", parsed: int = -1) -> str:
    return f"{archive}; {extra}; {parsed}"


pipeline = Pipeline(__name__, on_error="continue")

if __name__ == "__main__":
    run = pipeline.run(url="example.org")
    for name, step_run in run.steps.items():
        print(f"{name:10}{step_run.status:9}{step_run.attempts} tries {step_run.reason}")
    print(run["report"])
    print(f"{run.errors['parsed']!r}\n  {run.errors['parsed'].__notes__[0]}")
    try:
        pipeline.run("reprot", url="example.org")
    except DagkitError as error:
        print(f"{type(error).__name__}: {error}")
