"""What the benchmarks share: equal threads, interleaved repetitions, a table, verdicts, a small JSON file.

A benchmark is a function ``main(report, args)``; `run` gives it a `Report` and the parsed arguments, holds every
library to the same number of threads while it works, and prints and stores what it reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

LIBRARIES = ("bayes_mpt", "numpy", "scipy", "scikit-learn", "torch", "pyro-ppl")


@dataclass
class Timing:
    """Repetitions of one call, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Any = None
    """What the last repetition returned."""

    @property
    def median(self) -> float:
        return float(np.median(self.wall))


def interleave(calls: dict[str, Callable[[], Any]], repeats: int, warm_up: bool = True) -> dict[str, Timing]:
    """Time several calls in turn, the order reversed at every other repetition, so that all meet the same load."""
    if warm_up:
        for call in calls.values():
            call()
    timings = {name: Timing() for name in calls}
    for i in range(repeats):
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            timings[name].result = calls[name]()
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
    return timings


def spread(values: list[float]) -> str:
    """``median [least - greatest]``."""
    return f"{np.median(values):.4g} [{min(values):.4g} - {max(values):.4g}]"


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Hold torch and every BLAS and OpenMP library to n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with threadpool_limits(limits=n):
            yield
    finally:
        torch.set_num_threads(before)


class Report:
    """Collects the rows of one table and the verdicts under it."""

    def __init__(self, name: str):
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.units: list[dict[str, Any]] = []
        """What was found of each unit of a study, kept in the JSON file so that a later run goes on from it."""

    def compare(
        self, case: str, peer: Timing, ours: Timing, at_least: bool = False, **more: Any
    ) -> list[float]:
        """Add a row; the ratios peer / ours, repetition by repetition. ``at_least``: the peer was cut off."""
        ratios = [p / o for p, o in zip(peer.wall, ours.wall, strict=True)]
        bound = ">= " if at_least else ""
        cells = {
            "case": case,
            "peer, s": bound + spread(peer.wall),
            "ours, s": spread(ours.wall),
            "peer / ours": bound + spread(ratios),
            "in CPU time": f"{bound}{np.median(peer.cpu) / np.median(ours.cpu):.4g}",
            **more,
        }
        print("   " + ",  ".join(f"{k} {v}" if k != "case" else str(v) for k, v in cells.items()), flush=True)
        cells |= {"peer_wall": peer.wall, "peer_cpu": peer.cpu, "ours_wall": ours.wall, "ours_cpu": ours.cpu}
        self.rows.append(cells)
        return ratios

    def row(self, **cells: Any) -> None:
        """Add a row of any other kind."""
        print("   " + ",  ".join(f"{k} {v}" for k, v in cells.items()), flush=True)
        self.rows.append(cells)

    def note(self, text: str) -> None:
        """Add a line that stands above the table."""
        self.notes.append(text)

    def target(self, text: str, passed: bool | None, figure: str) -> None:
        """Add a verdict; None where the run was too short to say."""
        verdict = {None: "UNDECIDED", True: "PASS", False: "FALLS SHORT"}[
            None if passed is None else bool(passed)
        ]
        self.targets.append({"target": text, "verdict": verdict, "figure": figure})

    def show(self, machine: dict[str, Any]) -> None:
        """Print notes, table and verdicts."""
        print(f"\n{self.name}: " + ", ".join(f"{k} {v}" for k, v in machine.items()))
        for note in self.notes:
            print("  " + note)
        # lists are kept for the JSON file; rows of one kind share a table
        tables: dict[tuple[str, ...], list[list[str]]] = {}
        for row in self.rows:
            cells = {k: _cell(v) for k, v in row.items() if not isinstance(v, list | dict)}
            tables.setdefault(tuple(cells), []).append(list(cells.values()))
        for names, lines in tables.items():
            widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
            print()
            for line in (names, ["-" * w for w in widths], *lines):
                print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        print()
        for t in self.targets:
            print(f"{t['verdict']}: {t['target']}: {t['figure']}")


def run(
    main: Callable[[Report, argparse.Namespace], None],
    file: str,
    description: str,
    arguments: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> None:
    """Parse the command line, run the benchmark, print it; unless quick, store it beside ``file``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, on less data; stores nothing")
    parser.add_argument("--threads", type=int, default=1, help="of every library (default 1)")
    parser.add_argument("--repeats", type=int, help="interleaved repetitions")
    if arguments is not None:
        arguments(parser)
    args = parser.parse_args()
    report = Report(Path(file).stem)
    begun, load = time.perf_counter(), os.getloadavg()[0]
    with threads(args.threads):
        main(report, args)
    machine = {
        "threads": args.threads,
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "load before": round(load, 1),
        "load after": round(os.getloadavg()[0], 1),
        "seconds": round(time.perf_counter() - begun),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }
    report.show(machine)
    if not args.quick:
        content = {
            "benchmark": report.name,
            "machine": machine,
            "notes": report.notes,
            "rows": report.rows,
            "targets": report.targets,
        }
        store(Path(file).with_name(f"{report.name}.json"), _rounded(content), _rounded(report.units))


def store(path: Path, content: dict[str, Any], units: Sequence[dict[str, Any]] = ()) -> None:
    """Write what a benchmark found as JSON; ``units``, those of a study, as a list with one line for each."""
    text = json.dumps(content, indent=1)
    if units:
        lines = ",\n".join("  " + json.dumps(unit, separators=(",", ":")) for unit in units)
        text = f'{text[:-2]},\n "units": [\n{lines}\n ]\n}}'
    path.write_text(text + "\n")


def stored(path: Path) -> list[dict[str, Any]]:
    """Units of a study that are done: those of the JSON file, and of the lines of a run that was stopped."""
    units = json.loads(path.read_text()).get("units", []) if path.exists() else []
    lines = path.with_suffix(".jsonl")
    if lines.exists():
        units += [json.loads(line) for line in lines.read_text().splitlines()]
    return units


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from a checkout"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """For a small file: six figures, plain types, null for what is not finite."""
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
