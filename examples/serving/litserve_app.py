"""A CIFAR-sized CNN behind HTTP on LitServe: optimised, batched, checked, with health and metrics.

    pip install "fastseq[serve]"
    python examples/serving/litserve_app.py --port 8000

The same from the command line, for any model: python -m fastseq serve package.module:function --shape 3,32,32
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from fastseq.serving.server import Options, serve
from fastseq.testing import MODELS

MODEL = MODELS["cifar_vgg_bn"]


def make_model() -> nn.Module:
    """The plain model; a worker optimises it. A real one would get its weights from `--weights`."""
    return MODEL.build()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--weights", help="a state_dict's file; replace it to roll out new weights without a restart")
    parser.add_argument("--plain", action="store_true", help="the model without fastseq, to compare")
    arguments = parser.parse_args()
    # The workers import this file by its name.
    options = Options(
        model=f"{Path(__file__).stem}:make_model",
        shape=MODEL.input_shape,
        weights=arguments.weights,
        optimize=not arguments.plain,
    )
    serve(options, port=arguments.port, workers=arguments.workers)


if __name__ == "__main__":
    main()
