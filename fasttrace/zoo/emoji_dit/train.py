"""Train the packaged transformer: ``python -m fasttrace.zoo.emoji_dit.train --minutes M [--work DIR] [--resume]``.

It goes on from the work folder's checkpoint with ``--resume``, else starts from random weights. ``--export`` writes the
work folder's moving average to the weights folder, at once with ``--minutes 0``. Training may be ended by SIGTERM and
taken up again. Progress is in ``DIR/transformer.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .. import emoji
from ..emoji.training import strip
from . import architecture, model, train_transformer

WORK = Path.home() / ".cache" / "fasttrace" / "emoji-dit"


def latest(work: Path) -> Any:
    """The moving average of the work folder's checkpoint, of a training still under way too."""
    transformer = architecture.transformer()
    transformer.load_state_dict(strip(load_file(work / "transformer.safetensors"), "average."))
    return transformer.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=100.0, help="of training in all, the resumed ones included")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--weights", type=Path, default=model.WEIGHTS, help="folder to export to")
    parser.add_argument("--resume", action="store_true", help="go on from the work folder's checkpoint")
    parser.add_argument("--export", action="store_true", help="write the moving average to the weights folder")
    parser.add_argument("--compile", action="store_true", help="run the transformer through torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.minutes:
        base = emoji.load("cpu")
        train_transformer.train(
            train_transformer.build_material(base.vae, base.text_encoder, base.tokenizer),
            arguments.work,
            arguments.minutes,
            resume=arguments.resume,
            compiled=arguments.compile,
        )
    if arguments.export:
        model.export(latest(arguments.work), arguments.weights)


if __name__ == "__main__":
    main()
