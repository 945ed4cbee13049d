"""When a step fails: retries, skipped steps, and errors that say where.

``download`` fails twice and succeeds on the third try. ``extra`` is skipped, and ``parsed`` fails.
With ``on_error="continue"`` all steps that do not depend on a failure still run.
"""

from collections.abc import Iterator

from dagkit import DagkitError, Pipeline, Skip, step

answers: Iterator[bool] = iter([False, False, True])


@step(retries=3, retry_delay=0.01, retry_backoff=2.0)
def download(url: str) -> str:
    if not next(answers):
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


@step(after="parsed")
def notify() -> str:
    return "all is well"


pipeline = Pipeline(__name__, on_error="continue")

if __name__ == "__main__":
    run = pipeline.run(url="example.org")
    for state in run.steps.values():
        print(f"{state.name:10}{state.status:9}{state.attempts} tries  {state.reason}")
    print(run["report"])
    print(f"{run.errors['parsed']!r}\n  {run.errors['parsed'].__notes__[0]}")
    try:
        pipeline.run("reprot", url="example.org")
    except DagkitError as error:
        print(f"{type(error).__name__}: {error}")
