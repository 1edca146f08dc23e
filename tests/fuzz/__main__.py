"""`python -m tests.fuzz`: random models, plain and optimised, compared for as many cases as wanted."""

from __future__ import annotations

import argparse
import sys

import torch

from . import campaign, plants


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="how many cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this one case here, and reduce it if it fails")
    parser.add_argument("--replay", metavar="LIST", help="run the case of a failure's --replay line here")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to reduce a failure (default: %(default)s)")
    parser.add_argument(
        "--plant", default="", choices=("", *plants.PLANTS), help="break fastseq first, to see it found"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.work:
        seed, start, stop, step, seconds = arguments.work.split(",")
        campaign.work(int(seed), range(int(start), int(stop), int(step)), arguments.plant, float(seconds))
        return 0
    if arguments.case is not None or arguments.replay is not None:
        torch.set_num_threads(1)
        case, choices = (
            campaign.replayed(arguments.replay)
            if arguments.replay is not None
            else campaign.seeded(arguments.seed, arguments.case)
        )
        with plants.planted(arguments.plant):
            return 0 if campaign.show(case, choices, arguments.seconds) else 1
    indices = range(arguments.first, arguments.first + arguments.cases)
    summary = campaign.run(arguments.seed, indices, arguments.jobs, arguments.plant, arguments.seconds)
    print("\n".join(campaign.report(summary)))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
