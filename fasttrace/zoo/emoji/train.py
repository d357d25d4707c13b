"""Train the packaged model: ``python -m fasttrace.zoo.emoji.train [--stage ...] [--work DIR] [--resume]``.

The stages, each of which goes on from what the ones before it left in the work folder, or else from the committed
weights, or with ``--fresh`` from random ones:

========  ==============================================================================================
vae       the autoencoder
scorer    both CLIP towers; the text tower is the pipeline's text encoder from then on
unet      the denoiser, on the frozen autoencoder and text encoder
decoder   the autoencoder's decoder alone, latents frozen
image     the scorer's image tower alone, text tower frozen
judge     the judge, on renderings
export    no training: write the moving averages of whatever the work folder holds to the weights folder
all       vae, scorer, unet, decoder, image, judge, export
========  ==============================================================================================

Each stage may be ended by SIGTERM or Ctrl-C and taken up again with ``--resume``. Progress is in ``DIR/<stage>.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...errors import ModelError
from . import architecture, judge, model, train_scorer, train_unet, train_vae
from .tokenizer import build_tokenizer
from .training import save_tensors, strip

MINUTES = {"vae": 20.0, "scorer": 15.0, "unet": 100.0, "decoder": 20.0, "image": 20.0, "judge": 8.0}


class Workshop:
    """The components as they stand: the work folder's where it has them, else the committed ones."""

    def __init__(self, work: Path, weights: Path, *, resume: bool = False, fresh: bool = False) -> None:
        self.work, self.weights, self.resume, self.fresh = work, weights, resume, fresh
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(work / "tokenizer")
        self._pipe: Any = None

    @property
    def committed(self) -> Any:
        if self._pipe is None:
            self._pipe = model.load("cpu", folder=self.weights)
        return self._pipe

    def _done(self, name: str) -> dict[str, torch.Tensor] | None:
        path = self.work / f"{name}.done.safetensors"
        return load_file(path) if path.exists() else None

    def keep(self, name: str, module: Any) -> None:
        save_tensors(module.state_dict(), self.work / f"{name}.done.safetensors")

    def vae(self) -> Any:
        state = self._done("vae")
        if state is None:
            return self.committed.vae
        vae = architecture.vae()
        vae.register_to_config(scaling_factor=float(state.pop("scaling_factor")))
        vae.load_state_dict(state)
        return vae.eval()

    def keep_vae(self, vae: Any) -> None:
        scale = torch.tensor(vae.config.scaling_factor, dtype=torch.float64)
        save_tensors(vae.state_dict() | {"scaling_factor": scale}, self.work / "vae.done.safetensors")

    def clip(self) -> Any:
        state = self._done("clip")
        if state is None:
            clip = model.load_scorer("cpu", folder=self.weights).clip
            if (known := clip.config.text_config.vocab_size) != len(self.tokenizer):
                raise ModelError(
                    f"the committed text encoder knows {known} tokens and the captions have {len(self.tokenizer)}; "
                    "train the scorer from random weights: --stage scorer --fresh"
                )
            return clip
        clip = architecture.clip(len(self.tokenizer), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        clip.load_state_dict(state)
        return clip.eval()

    def unet(self) -> Any:
        """The latest moving average, of a stage still under way too."""
        for path, prefix in ((self.work / "unet.safetensors", "average."), (self.work / "unet.done.safetensors", "")):
            if path.exists():
                unet = architecture.unet()
                unet.load_state_dict(strip(load_file(path), prefix))
                return unet.eval()
        return self.committed.unet

    def run(self, stage: str, minutes: float, **options: Any) -> None:
        """One stage; its result goes to the work folder."""
        options = {"resume": self.resume, **options}
        if stage == "vae":
            start = None if self.fresh else self.vae()
            self.keep_vae(train_vae.train(self.work, minutes, start=start, **options))
        elif stage == "decoder":
            folder = self.work / "decoder"
            self.keep_vae(train_vae.train(folder, minutes, start=self.vae(), decoder_only=True, **options))
        elif stage == "scorer":
            start = None if self.fresh else self.clip()
            self.keep("clip", train_scorer.train(self.tokenizer, self.work, minutes, start=start, **options))
        elif stage == "image":
            folder = self.work / "image"
            start = self.clip()
            self.keep(
                "clip", train_scorer.train(self.tokenizer, folder, minutes, start=start, image_only=True, **options)
            )
        elif stage == "unet":
            cache = train_unet.build_cache(self.vae(), model.text_encoder_of(self.clip()), self.tokenizer)
            start = None if self.fresh else self.unet()
            self.keep("unet", train_unet.train(cache, self.work, minutes, start=start, **options))
        elif stage == "judge":
            self.keep("judge", judge.train(self.work, minutes, **options))
        else:
            self.export()

    def export(self) -> None:
        model.export(self.clip(), self.vae(), self.unet(), self.tokenizer, self.weights)
        state = self._done("judge")
        if state is not None:
            reader = judge.Judge()
            reader.load_state_dict(state)
            judge.save_judge(reader, self.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="all", choices=[*MINUTES, "export", "all"])
    parser.add_argument("--minutes", type=float, help="of training; each stage has its own default")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "fasttrace" / "emoji")
    parser.add_argument("--weights", type=Path, default=model.WEIGHTS, help="folder to start from and to export to")
    parser.add_argument("--resume", action="store_true", help="go on from the work folder's checkpoint")
    parser.add_argument("--fresh", action="store_true", help="start from random weights")
    parser.add_argument("--compile", action="store_true", help="run the denoiser through torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workshop = Workshop(arguments.work, arguments.weights, resume=arguments.resume, fresh=arguments.fresh)
    for stage in [*MINUTES, "export"] if arguments.stage == "all" else [arguments.stage]:
        options = {"compiled": True} if stage == "unet" and arguments.compile else {}
        workshop.run(stage, arguments.minutes or MINUTES.get(stage, 0.0), **options)


if __name__ == "__main__":
    main()
