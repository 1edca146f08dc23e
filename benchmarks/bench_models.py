"""Whole networks on fastseq and its peers: checks every answer against float64, then times all engines interleaved.

    python benchmarks/bench_models.py --threads 1 --cases seed1 seed2 --json rows.json --markdown table.md
    python benchmarks/bench_models.py --threads 1 --steps --json rows.json --markdown table.md

README.md beside this file says how to install the peers and how to read the rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from cases import CASES, STEPS
from limits import Limits
from peers import DTYPES, PEERS
from report import Report, Row, count, describe_machine, save, to_markdown
from workers import Measurement, Worker, WorkerError, measure

from fastseq.testing import MODELS, Reference, relative_error

NETWORKS = [name for name in MODELS if name != "seed1_named"]  # which differs from seed1 in names only
NO_LIMIT: Row = {"limit_us": None, "limited_by": None}
QUICK = {"cases": ["seed1", "seed2", "seed3", "lenet5", "mlp"], "rounds": 7, "min_time": 0.005}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = arguments.dtype
    report: Report = {"machine": describe_machine(), "dtype": dtype, "ceilings": [], "skipped": {}, "rows": []}
    backends = []
    for name in arguments.backends or [name for name, peer in PEERS.items() if dtype in peer.prepare]:
        reason = PEERS[name].missing(dtype)
        if reason:
            report["skipped"][name] = reason
            progress(f"skipping {name}: {reason}", last=True)
        else:
            backends.append(name)

    todo = [(case, batch) for case in arguments.cases for batch in arguments.batches or CASES[case].batches]
    references: dict[tuple[str, int], Reference] = {}
    for threads in arguments.threads:
        cores = choose_cores(threads, arguments.pin)
        workers = {name: Worker(name, threads, cores, dtype) for name in backends}
        ceiling = {"threads": threads, "cores": sorted(cores), **measure_ceiling(threads, cores)}
        report["ceilings"].append(ceiling)
        for number, (case, batch) in enumerate(todo, 1):
            progress(f"[{count(threads, 'thread')}, {number}/{len(todo)}] {case}, batch {batch}")
            if (case, batch) not in references:
                references[case, batch] = Reference.of(CASES[case].build(), CASES[case].example(batch))
            reference = references[case, batch]
            results = measure(
                workers, case, batch, reference.exact, arguments.rounds, arguments.min_time, arguments.budget
            )
            common = {
                "case": case,
                "batch": batch,
                "threads": threads,
                "cores": sorted(cores),
                "eager_err_rel_max": eager_error(case, batch, dtype, reference),
                # The limits are those of float32.
                **(describe_limit(case, batch, ceiling) if dtype == "float32" else NO_LIMIT),
            }
            for name, result in results.items():
                report["rows"].append({**common, **describe_result(workers[name], result, common), **report["machine"]})
            if (case, batch) == todo[-1] or todo[number][0] != case:
                for worker in workers.values():
                    release(worker)
            save(report, arguments.json, arguments.markdown)
        for worker in workers.values():
            worker.close()
    progress("", last=True)
    print(to_markdown(report))


def parse_arguments() -> argparse.Namespace:
    all_threads = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", action="store_true", help="single steps instead of networks")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="instead of each case's own")
    parser.add_argument("--backends", nargs="+", choices=list(PEERS), metavar="NAME", help="instead of all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the engines compute in")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, all_threads}), metavar="N")
    parser.add_argument("--rounds", type=int, help="blocks per engine and case (25)")
    parser.add_argument("--min-time", type=float, help="seconds of calls per block (0.01)")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which a case ends early (120)")
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="let the scheduler place the workers")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="small networks and few rounds")
    arguments = parser.parse_args()
    defaults = (
        QUICK
        if arguments.quick
        else {"cases": list(STEPS) if arguments.steps else NETWORKS, "rounds": 25, "min_time": 0.01}
    )
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def choose_cores(threads: int, pin: bool) -> set[int]:
    """The same `threads` cores for every engine; the last ones, since interrupts tend to go to the first."""
    available = sorted(os.sched_getaffinity(0))
    return set(available[-threads:] if pin else available)


def measure_ceiling(threads: int, cores: set[int]) -> Row:
    worker = Worker("eager", threads, cores)
    try:
        return worker.ask("ceiling")
    finally:
        worker.close()


def eager_error(case: str, batch: int, dtype: str, reference: Reference) -> float:
    eager = reference.eager
    if dtype != "float32":
        to = getattr(torch, dtype)
        with torch.no_grad():
            eager = CASES[case].build().to(to)(CASES[case].example(batch).to(to))
    return relative_error(eager, reference.exact)["rel_max"]


def describe_limit(case: str, batch: int, ceiling: Row) -> Row:
    """The time that the machine's limits allow for this case, and which of them."""
    limits = Limits.from_dict(ceiling)
    floor = limits.floor(CASES[case].layer_costs, batch) if limits else None
    return {"limit_us": floor[0] * 1e6 if floor else None, "limited_by": floor[1] if floor else None}


def release(worker: Worker) -> None:
    try:
        worker.ask("release")
    except WorkerError:
        worker.close()


def describe_result(worker: Worker, result: Measurement, common: Row) -> Row:
    """The engine's part of a row; without samples, the numbers are None and `problem` says why."""
    row: Row = {
        "backend": worker.peer_name,
        "backend_version": backend_version(worker),
        "median_us": None,
        "p20_us": None,
        "p80_us": None,
        "gflops": None,
        "cores_used": None,
        "of_limit": None,
        "err_rel_max": result.error,
        "first_result_s": result.first_result_s,
        "blocks": len(result.samples),
        "problem": result.problem,
    }
    if result.samples and result.problem is None:
        p20, median, p80 = percentiles(result.samples)
        flops = CASES[common["case"]].flops_per_image * common["batch"]
        row.update(median_us=median * 1e6, p20_us=p20 * 1e6, p80_us=p80 * 1e6, gflops=flops / median / 1e9)
        row["cores_used"] = statistics.median(result.cores_used)
        row["of_limit"] = common["limit_us"] / row["median_us"] if common["limit_us"] else None
    return row


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def backend_version(worker: Worker) -> str:
    try:
        return worker.ask("version")
    except WorkerError as error:
        return f"unknown: {error}"


def progress(text: str, last: bool = False) -> None:
    """One line on stderr that overwrites itself on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if last and text else "", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
