"""Real handwritten digits, end to end: train a small network, optimise it, compare every answer, compare the times.

The data are the 1797 scans of 8x8 pixels that come with scikit-learn. Times are medians of blocks that eager,
torch.compile and fastseq run in turn, so that a change of clock speed meets all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastseq
from fastseq.testing import MODELS

Model = Callable[[Tensor], Tensor]
BACKENDS = ("eager", "torch.compile", "fastseq")
BLOCK_SECONDS = 0.01
OTHERS = {"seed1": "two convolutions", "seed2": "MLP 128-64-10", "seed3": "conv-pool twice, Linear"}


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


# Part 1: a trained network gives the same answers -----------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in 0..1 and labels (n,): train images, train labels, test images, test labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def compare_answers(model: nn.Module, fast: nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        expected, actual = model(images), fast(images)
    same = int((expected.argmax(1) == actual.argmax(1)).sum())
    for name, logits in (("eager", expected), ("fastseq", actual)):
        print(f"accuracy, {name:<8} {(logits.argmax(1) == labels).float().mean():.2%} of {len(labels)} test images")
    print(f"same prediction    {same} of {len(labels)}")
    print(f"logits             differ by at most {(expected - actual).abs().max():.1e}")
    if same != len(labels):
        raise SystemExit("FAILED: fastseq predicts something else than eager")


# Part 2: the times ------------------------------------------------------------------------------------------------


def prepare(backend: str, model: nn.Module, x: Tensor) -> tuple[Model, float]:
    """The model as `backend` runs it, and the seconds until its first answer."""
    start = time.perf_counter()
    if backend == "fastseq":
        ready: Model = fastseq.optimize(model)
    elif backend == "torch.compile":
        torch.compiler.reset()  # compile for this shape alone, as its best case
        ready = torch.compile(model)
    else:
        ready = model
    ready(x)
    return ready, time.perf_counter() - start


def block(model: Model, x: Tensor, calls: int) -> float:
    """Seconds per call over one block of calls."""
    start = time.perf_counter()
    for _ in range(calls):
        model(x)
    return (time.perf_counter() - start) / calls


def time_case(model: nn.Module, x: Tensor, rounds: int, skipped: set[str], bar: tqdm) -> dict[str, tuple[float, float]]:
    """By backend, median seconds per call and seconds until the first answer.

    torch.compile is left out once `skipped` holds a reason; when it fails, the reason is added.
    """
    ready: dict[str, Model] = {}
    first: dict[str, float] = {}
    for backend in BACKENDS:
        if backend == "torch.compile" and skipped:
            continue
        bar.set_postfix_str(f"preparing {backend}")
        try:
            ready[backend], first[backend] = prepare(backend, model, x)
        except Exception as error:
            if backend != "torch.compile":
                raise
            skipped.add(str(error).strip().splitlines()[0])  # most often there is no C++ compiler
    calls = {name: max(1, round(BLOCK_SECONDS / block(run, x, 3))) for name, run in ready.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    bar.set_postfix_str("timing")
    for i in range(rounds):
        names = list(ready)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(block(ready[name], x, calls[name]))
        bar.update()
    return {name: (statistics.median(times[name]), first[name]) for name in ready}


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare_times(trained: nn.Module, images: Tensor, rounds: int, skipped: set[str]) -> None:
    cases: list[tuple[str, nn.Module, Tensor]] = []
    for batch in (1, 32):
        cases.append(("digits", trained, images[:batch]))
        cases += [(f"{n}: {text}", MODELS[n].build(), MODELS[n].example(batch)) for n, text in OTHERS.items()]
    rows = [["network", "batch", *(f"{name} us" for name in BACKENDS), "vs eager", "vs compile"]]
    speedups: dict[str, list[float]] = {"eager": [], "torch.compile": []}
    first_answers: dict[str, list[float]] = {name: [] for name in BACKENDS}
    with torch.no_grad(), tqdm(total=len(cases) * rounds, desc="timing", unit="block") as bar:
        for name, model, x in cases:
            results = time_case(model, x, rounds, skipped, bar)
            row = [name, str(len(x))]
            row += [f"{results[backend][0] * 1e6:.1f}" if backend in results else "-" for backend in BACKENDS]
            for peer in speedups:
                if peer in results:
                    speedups[peer].append(results[peer][0] / results["fastseq"][0])
                row.append(f"{speedups[peer][-1]:.2f}x" if peer in results else "-")
            for backend, (_, seconds) in results.items():
                first_answers[backend].append(seconds)
            rows.append(row)
    say(table(rows))
    say("Medians per call; speed-ups are those of fastseq.")
    if skipped:
        print(f"torch.compile was not timed: {'; '.join(skipped)}")
    for peer, values in speedups.items():
        if values:
            print(f"fastseq is faster than {peer} in {sum(v > 1 for v in values)} of {len(values)} cases")
    for backend in ("torch.compile", "fastseq"):
        seconds = first_answers[backend]
        if seconds:
            print(f"first answer with {backend:<13} after {min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads for every backend (default 1)")
    parser.add_argument("--quick", action="store_true", help="less training and fewer timings, for a first look")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    say("1. Train on handwritten digits, optimise, compare the answers")
    train_images, train_labels, images, labels = digits()
    model = network()
    train(model, train_images, train_labels, epochs=5 if arguments.quick else 30)
    fast = fastseq.optimize(model)
    say(str(fastseq.explain(fast, images)))
    print()
    compare_answers(model, fast, images, labels)

    say(f"2. Time this network and three more: {arguments.threads} thread(s), torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as cache:  # or torch.compile would be timed on what an earlier run left
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        skipped = {"--no-compile"} if arguments.no_compile else set()
        compare_times(model, images, rounds=5 if arguments.quick else 40, skipped=skipped)


if __name__ == "__main__":
    main()
