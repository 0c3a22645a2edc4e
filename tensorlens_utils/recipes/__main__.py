"""Train, measure and ship models of the zoo: one process per core, each model after the one that it starts from."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from ..models import ZOO
from . import RECIPES
from .training import begin_worker, ship


def main(arguments: list[str] | None = None) -> int:
    """`python -m tensorlens_utils.recipes`: train, measure and ship models of the zoo."""
    parser = argparse.ArgumentParser(prog="python -m tensorlens_utils.recipes", description="Retrain the zoo.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all if none is given")
    parser.add_argument("--steps", type=int, help="a trial of so many steps, written to build/zoo/trial")
    parser.add_argument("--out", type=Path, help="where the models go; by default the package's own zoo")
    asked = parser.parse_args(arguments)
    waiting = asked.names or [*RECIPES]
    if unknown := [name for name in waiting if name not in RECIPES]:
        parser.error(f"the zoo has recipes for {', '.join(RECIPES)}, not for {', '.join(unknown)}")
    work = Path("build/zoo") if asked.steps is None else Path("build/zoo/trial")
    out = asked.out or (ZOO if asked.steps is None else work)
    short = {} if asked.steps is None else {"steps": asked.steps}
    recipes = {name: dataclasses.replace(RECIPES[name], **short) for name in waiting}
    running = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(waiting), os.cpu_count()), spawn, begin_worker) as pool:
        while waiting or running:
            for name in [n for n in waiting if recipes[n].start not in (*waiting, *running.values())]:
                waiting.remove(name)
                running[pool.submit(ship, recipes[name], out, work)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, measured = running.pop(future), future.result()
                key, first = next((key, m) for key, m in measured.items() if isinstance(m, dict))
                print(f"{name}: {key} {first['value']:.3f}, {measured['parameters']:,} parameters, "
                      f"{measured['cpu_minutes']} CPU minutes, in {out / name}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
