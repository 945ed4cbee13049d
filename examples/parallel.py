"""Word count over Python's own standard library: one map, on one thread, threads and processes.

The words of each file are counted side by side, then added up. All executors give the same
counts; what the processes gain depends on the cores of the machine.
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
    results, first = [], 0.0
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
        first = first or seconds
        results.append((run["common"], run["words"]))
        print(f"{title:12} {len(run['words'])} files, speed-up {first / seconds:.2f}")
    print("equal results:", all(result == results[0] for result in results))
    print(", ".join(f"{word} {count}" for word, count in results[0][0]))


if __name__ == "__main__":
    main()
