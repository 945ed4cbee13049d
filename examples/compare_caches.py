"""Which caches notice which edits? Run ordinary edits and look-alike arguments against each cache.

For each case, one process stores a result, and another one asks for it after the edit. A cache is
right if it gives the value that the function would give, and calls it only if this value differs.

    python examples/compare_caches.py              # all caches that are installed
    python examples/compare_caches.py dagkit joblib
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Result = tuple[str, int | None]  # what the function gave, and how often it was called

# A name, the module app.py, and the argument. «old→new» is the edit, ⏎ a new line. What follows
# ▸name is another file. Long rows go on below, with ⏎ or ::. The function step is cached.
TABLE = """
comment :: def step(x): return x + 1  # «one→1» :: 1
blank lines above :: «→⏎⏎»def step(x): return x + 1 :: 1
docstring :: def step(x):⏎    "«Add→Count»."⏎    return x + 1 :: 1
spacing :: def step(x): return x «+→ + » 1 :: 1
annotation :: def step(x: «int→float»): return x + 1 :: 1
unrelated function :: def other(): return «1→2»⏎def step(x): return x + 1 :: 1
unrelated constant :: OTHER = «1→2»⏎def step(x): return x + 1 :: 1
body :: def step(x): return x + «1→2» :: 1
operator :: def step(x): return x «+→-» 1 :: 1
helper :: def add(x): return x + «1→2»⏎def step(x): return add(x) :: 1
comment in a helper :: def add(x): return x + 1  # «one→1»⏎def step(x): return add(x) :: 1
helper of a helper :: def f(x): return x + «1→2»⏎def g(x): return f(x)⏎def step(x): return g(x)
:: 1
helper in another module :: import helpers⏎def step(x): return helpers.add(x)⏎▸helpers.py
⏎def add(x): return x + «1→2» :: 1
imported helper :: from helpers import add⏎def step(x): return add(x)⏎▸helpers.py
⏎def add(x): return x + «1→2» :: 1
other function of that module :: from helpers import add⏎def step(x): return add(x)⏎▸helpers.py
⏎def add(x): return x + 1⏎def other(): return «1→2» :: 1
helper's constant elsewhere :: from helpers import add⏎def step(x): return add(x)⏎▸helpers.py
⏎BY = «1→2»⏎def add(x): return x + BY :: 1
import in the body :: def step(x):⏎    from helpers import add⏎    return add(x)⏎▸helpers.py
⏎def add(x): return x + «1→2» :: 1
constant :: BY = «1→2»⏎def step(x): return x + BY :: 1
constant in a dict :: BY = {"a": [1, «1→2»]}⏎def step(x): return x + BY["a"][1] :: 1
default :: def step(x, by=«1→2»): return x + by :: 1
default of a helper :: def add(x, by=«1→2»): return x + by⏎def step(x): return add(x) :: 1
keyword default :: def step(x, *, by=«1→2»): return x + by :: 1
closure :: def make(by):⏎    def step(x): return x + by⏎    return step⏎step = make(«1→2») :: 1
lambda in a dict :: RULES = {"add": lambda x: x + «1→2»}⏎def step(x): return RULES["add"](x) :: 1
partial :: from functools import partial⏎def plus(x, by): return x + by
⏎add = partial(plus, by=«1→2»)⏎def step(x): return add(x) :: 1
decorator of a helper :: import functools⏎def twice(f):⏎    @functools.wraps(f)
⏎    def g(x): return «2→3» * f(x)⏎    return g⏎@twice⏎def add(x): return x + 1
⏎def step(x): return add(x) :: 1
method :: class Adder:⏎    def add(self, x): return x + «1→2»⏎def step(x): return Adder().add(x)
:: 1
method of a base class :: class Base:⏎    def add(self, x): return x + «1→2»
⏎class Adder(Base): pass⏎def step(x): return Adder().add(x) :: 1
class attribute :: class Config:⏎    by = «1→2»⏎def step(x): return x + Config.by :: 1
dataclass default :: from dataclasses import dataclass⏎@dataclass⏎class Config:
⏎    by: int = «1→2»⏎def step(x): return x + Config().by :: 1
property :: class Adder:⏎    @property⏎    def by(self): return «1→2»
⏎def step(x): return x + Adder().by :: 1
enum :: from enum import Enum⏎class By(Enum):⏎    A = «1→2»⏎def step(x): return x + By.A.value
:: 1
inner function :: def step(x):⏎    def add(x): return x + «1→2»⏎    return add(x) :: 1
comprehension :: def step(x): return sum([i * «1→2» for i in range(x)]) :: 3
regular expression :: import re⏎PATTERN = re.compile("«a→b»")
⏎def step(x): return PATTERN.sub("-", x) :: "ab"
name by getattr :: import helpers⏎def step(x): return getattr(helpers, "add")(x)⏎▸helpers.py
⏎def add(x): return x + «1→2» :: 1
callable object :: class Adder:⏎    def __init__(self, by): self.by = by
⏎    def __call__(self, x): return x + self.by⏎add = Adder(«1→2»)⏎def step(x): return add(x) :: 1
file that a constant names :: from pathlib import Path⏎FILE = Path(__file__).parent / "data.txt"
⏎def step(x): return FILE.read_text()⏎▸data.txt⏎«1→2» :: 1
file in the body :: import os⏎def step(x):
⏎    with open(os.path.join(os.path.dirname(__file__), "data.txt")) as file:
⏎        return file.read()⏎▸data.txt⏎«1→2» :: 1
environment variable :: import os⏎os.environ["MODE"] = "«a→b»"
⏎def step(x): return os.environ["MODE"] :: 1
equal argument :: def step(x): return repr(x) :: «{"a": 1, "b": [2]}→dict(a=1, b=[2])»
other number :: def step(x): return repr(x) :: «1→2»
number and bool :: def step(x): return repr(x) :: «1→True»
int and float :: def step(x): return repr(x) :: «1→1.0»
number and text :: def step(x): return repr(x) :: «1→"1"»
text and bytes :: def step(x): return repr(x) :: «"a"→b"a"»
list and tuple :: def step(x): return repr(x) :: «[1, 2]→(1, 2)»
zeros :: def step(x): return repr(x) :: «0.0→-0.0»
order of a dict :: def step(x): return repr(x) :: «{"a": 1, "b": 2}→{"b": 2, "a": 1}»
key types :: def step(x): return repr(x) :: «{1: 0}→{"1": 0}»
nested list :: def step(x): return repr(x) :: «[[1], [2]]→[[1, 2]]»
set of texts :: def step(x): return sorted(x)
:: «{"ab", "cd", "ef", "gh"}→{"gh", "ef", "cd", "ab"}»
named tuple and tuple :: from collections import namedtuple⏎P = namedtuple("P", "a b")
⏎def step(x): return repr(x) :: «app.P(1, 2)→(1, 2)»
object with other state :: class P:⏎    def __init__(self, a): self.a = a⏎def step(x): return x.a
:: app.P(«1→2»)
equal object :: class P:⏎    def __init__(self, a): self.a = a⏎def step(x): return x.a
:: app.P(«1→2 - 1»)
method of an argument :: class P:⏎    def get(self): return «1→2»⏎def step(x): return x.get()
:: app.P()
function as an argument :: def add(x): return x + «1→2»⏎def step(x): return x(1) :: app.add
lambda as an argument :: def step(x): return x(1) :: lambda y: y + «1→2»
content of a path :: def step(x): return x.read_text()⏎▸data.txt⏎«1→2» :: folder / "data.txt"
array :: def step(x): return float(x.sum()) :: np.array([1.0, «2→3»])
middle of a large array :: def step(x): return float(x[5000])
:: np.arange(10000.0) «→+ (np.arange(10000) == 5000)»
dtype of an array :: def step(x): return str(x.dtype) :: np.array([1, 2], «"i4"→"i8"»)
shape of an array :: def step(x): return str(x.shape) :: np.zeros(4).reshape(«2, 2→4, 1»)
equal array :: def step(x): return float(x.sum()) :: np.«arange(4.0)→array([0.0, 1.0, 2.0, 3.0])»
frame :: def step(x): return float(x["a"].sum()) :: pd.DataFrame({"a": [1.0, «2→3»]})
index of a frame :: def step(x): return str(x.index)
:: pd.DataFrame({"a": [1, 2]}, index=[«0, 1→1, 0»])
name of a column :: def step(x): return str(x.columns) :: pd.DataFrame({"«a→b»": [1]})
column type :: def step(x): return str(x.dtypes)
:: pd.DataFrame({"a": [1, 2]}, dtype="«int32→int64»")
equal frame :: def step(x): return float(x["a"].sum())
:: pd.DataFrame({"a": «[1, 2]→np.array([1, 2])»})
"""
CASES = TABLE.strip().replace("\n⏎", "⏎").replace("\n::", " ::").splitlines()


# The caches: each gets the module app with its function step, and a folder for its store.


def cache_with_dagkit(app: Any, folder: str) -> Any:
    from dagkit import Pipeline, Step

    pipeline = Pipeline(Step(app.step, name="step", cache=True), store=folder, progress=False)
    return lambda x: pipeline.run("step", x=x)["step"]


def cache_with_joblib(app: Any, folder: str) -> Any:
    import joblib

    return joblib.Memory(folder, verbose=0).cache(app.step)


def cache_with_checkpointer(app: Any, folder: str) -> Any:
    import checkpointer

    return checkpointer.checkpoint(app.step, directory=folder, verbosity=0)


def cache_with_checkpointer_capture(app: Any, folder: str) -> Any:
    import checkpointer

    return checkpointer.checkpoint(app.step, directory=folder, verbosity=0, capture=True)


def cache_with_cachau(app: Any, folder: str) -> Any:
    import cachau

    return cachau.cache(persist=folder)(app.step)


def cache_with_pipefunc(app: Any, folder: str) -> Any:
    import pipefunc

    step = pipefunc.PipeFunc(app.step, "result", cache=True)
    options = {"cache_dir": folder, "with_lru_cache": False}
    pipeline = pipefunc.Pipeline([step], cache_type="disk", cache_kwargs=options)
    return lambda x: pipeline.run("result", kwargs={"x": x})


def cache_with_hamilton(app: Any, folder: str) -> Any:
    from hamilton import ad_hoc_utils, driver

    app.step.__annotations__ = dict.fromkeys(["x", "return"], object)  # Hamilton needs them
    app.step.__module__ = "app"
    module = ad_hoc_utils.create_temporary_module(app.step)
    built = driver.Builder().with_modules(module).with_cache(path=folder).build()
    return lambda x: built.execute(["step"], inputs={"x": x})["step"]


def cache_with_marimo(app: Any, folder: str) -> Any:
    import marimo

    return marimo.persistent_cache(app.step, save_path=folder)


CACHES: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "dagkit": ("dagkit", cache_with_dagkit),
    "joblib": ("joblib", cache_with_joblib),
    "checkpointer": ("checkpointer", cache_with_checkpointer),
    "checkpointer, capture=True": ("checkpointer", cache_with_checkpointer_capture),
    "cachau": ("cachau", cache_with_cachau),
    "pipefunc": ("pipefunc", cache_with_pipefunc),
    "Hamilton": ("sf-hamilton", cache_with_hamilton),
    "marimo": ("marimo", cache_with_marimo),
}


def read_case(case: str, is_edited: bool) -> tuple[str, dict[str, str], str]:
    """Return the name, the files and the argument of a case, before or after its edit."""
    name, code, argument = case.replace("⏎", "\n").split(" :: ")
    head, _, rest = f"{code} :: {argument}".partition("«")
    edit, _, tail = rest.partition("»")
    old, _, new = edit.partition("→")
    code, _, argument = f"{head}{new if is_edited else old}{tail}".partition(" :: ")
    app, *others = code.split("▸")
    files = {"app.py": app}
    for other in others:
        file_name, _, content = other.partition("\n")
        files[file_name] = content
    return name, files, argument


def run_cases(cache_name: str, root: str, is_edited: bool) -> None:
    """Call the cached function of each case in this process; print values and calls as JSON."""
    import numpy as np
    import pandas as pd

    results: list[Result] = []
    for number, case in enumerate(CASES):
        _, files, argument = read_case(case, is_edited)
        folder = Path(root, str(number))
        folder.mkdir(exist_ok=True)
        for file_name, content in files.items():
            (folder / file_name).write_text(content)
        for module_name in ("app", "helpers"):
            sys.modules.pop(module_name, None)
        importlib.invalidate_caches()
        sys.path.insert(0, str(folder))
        calls: list[int] | None = []

        def count(frame: Any, event: str, _: Any, calls: Any = calls) -> None:
            code = frame.f_code
            if event == "call" and code.co_name == "step" and code.co_filename.endswith("app.py"):
                calls.append(1)

        try:
            app = importlib.import_module("app")
            x = eval(argument, {"app": app, "np": np, "pd": pd, "folder": folder})
            step = app.step
            if cache_name != "none":
                step = CACHES[cache_name][1](app, str(folder / "store"))
            sys.setprofile(count)
            value = repr(step(x))
        except Exception as error:
            value = f"{type(error).__name__}: {error}"
            calls = None
        finally:
            sys.setprofile(None)
            sys.path.remove(str(folder))
        results.append((value, None if calls is None else len(calls)))
    print("\n" + json.dumps(results))


def collect(cache_name: str, is_edited: bool, root: str) -> list[Result]:
    file = str(Path(__file__).resolve())
    command = [sys.executable, "-B", file, "--run", cache_name, root, str(is_edited)]
    # Some caches take the working folder for the project.
    process = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if process.returncode != 0:
        raise RuntimeError(process.stderr)
    results: list[Result] = json.loads(process.stdout.splitlines()[-1])
    return results


def judge(cache_name: str) -> list[str]:
    """Return for each case: right, stale, needless or error."""
    with tempfile.TemporaryDirectory() as root:
        before = collect("none", False, root)
        after = collect("none", True, root)
    with tempfile.TemporaryDirectory() as root:
        first = collect(cache_name, False, root)
        second = collect(cache_name, True, root)
    verdicts = []
    for (old, _), (new, _), (stored, _), (value, calls) in zip(before, after, first, second):
        if calls is None or stored != old:
            verdicts.append("error")
        elif value != new:
            verdicts.append("stale")
        elif old == new and calls:
            verdicts.append("needless")
        else:
            verdicts.append("right")
    return verdicts


def main() -> None:
    names = sys.argv[1:]
    verdicts: dict[str, list[str]] = {}
    for cache_name, (distribution, _) in CACHES.items():
        if names and cache_name not in names:
            continue
        try:
            title = f"{cache_name} {version(distribution)}"
        except PackageNotFoundError:
            print(f"{cache_name}: not installed")
            continue
        verdicts[title] = judge(cache_name)
    for number, case in enumerate(CASES):
        faults = [f"{title} {v[number]}" for title, v in verdicts.items() if v[number] != "right"]
        print(f"{read_case(case, True)[0]:30} {'; '.join(faults) or 'all right'}")
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"\n{len(CASES)} cases, Python {python}, {time.strftime('%Y-%m-%d')}")
    print(f"{'':38}{'right':>9}{'stale':>9}{'needless':>9}{'error':>9}")
    for title, results in verdicts.items():
        counts = Counter(results)
        numbers = [counts[word] for word in ("right", "stale", "needless", "error")]
        print(f"{title:38}" + "".join(f"{number:9}" for number in numbers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_cases(sys.argv[2], sys.argv[3], sys.argv[4] == "True")
    else:
        main()
