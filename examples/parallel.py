"""Word count over Python's standard library: one map, on one thread, on threads and on processes.

``words`` is called once for each file, and ``common`` adds up the counts. All executors give equal
results. How much faster the processes are depends on the number of cores.
"""

import os
import re
import time
from collections import Counter
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from dagkit import Pipeline, step


@step
def paths(folder: Path, most: int = 400) -> list[Path]:
    return sorted(folder.glob("**/*.py"))[:most]


@step(map="paths")
def words(paths: Path) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", paths.read_text(errors="replace").lower()))


@step
def common(words: list[Counter[str]], top: int = 5) -> list[tuple[str, int]]:
    return sum(words, Counter()).most_common(top)


def main() -> None:
    results = []
    single_seconds = 0.0
    for title, pool in (
        ("one thread", nullcontext()),
        ("2 threads", ThreadPoolExecutor(2)),
        ("2 processes", ProcessPoolExecutor(2)),
    ):
        with pool as executor:
            assert executor is None or isinstance(executor, Executor)
            pipeline = Pipeline(__name__, executor=executor)
            start = time.perf_counter()
            run = pipeline.run("common", "words", folder=Path(os.__file__).parent)
            seconds = time.perf_counter() - start
        single_seconds = single_seconds or seconds
        results.append((run["common"], run["words"]))
        print(f"{title:12} {len(run['words'])} files, speed-up {single_seconds / seconds:.2f}")
    print("equal results:", all(result == results[0] for result in results))
    print(", ".join(f"{word} {count}" for word, count in results[0][0]))


if __name__ == "__main__":
    main()
