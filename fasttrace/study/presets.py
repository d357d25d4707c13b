"""Presets: named settings of a study, each with what it fixes and why. Anything can be overridden.

``paper`` is causal tracing as in Basu et al., "Localizing and Editing Knowledge in Text-to-Image Generative Models"
(arXiv 2310.13730), as far as it is known. What the paper leaves open is a parameter like any other, with the default
that is stated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..corruption import GaussianNoise
from ..errors import StudyError
from .study import Study


@dataclass(frozen=True)
class Setting:
    """One setting of a preset: its value, and where it comes from."""

    value: Any
    why: str


@dataclass(frozen=True)
class Preset:
    """Named settings.

    Attributes:
        name: of the preset.
        about: one sentence.
        settings: arguments of `Study`, by name.
    """

    name: str
    about: str
    settings: dict[str, Setting] = field(default_factory=dict)

    def describe(self) -> str:
        """What the preset fixes, one setting a line."""
        lines = [f"preset {self.name}: {self.about}"]
        lines += [f"  {name} = {setting.value!r}: {setting.why}" for name, setting in self.settings.items()]
        return "\n".join(lines)


_TEXT_KINDS = ["text_encoder*.self_attn", "text_encoder*.mlp"]

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            "causal tracing as in arXiv 2310.13730, every site of the UNet and of the text encoder",
            {
                "sites": Setting(["unet", *_TEXT_KINDS], "each UNet site, each text layer's self_attn and mlp"),
                "positions": Setting("tokens", "text sites: each token in turn, up to the end of text"),
                "steps": Setting(None, "a site is restored at every denoising step"),
                "protocol": Setting("free", "each restored run goes on with its own latents"),
                "base": Setting("corrupted", "sites are restored in the corrupted run"),
                "branch": Setting("cond", "the unconditional branch is neither corrupted nor restored"),
                "scheduler": Setting("pndm", "as Stable Diffusion 1.4 ships it"),
                "num_inference_steps": Setting(50, "of the paper; PNDM calls the UNet 51 times"),
                "guidance_scale": Setting(7.5, "of the paper"),
                "metrics": Setting(
                    ["clip_score"],
                    "of the paper; its CLIP is not known: clip_score:<folder or hub id> for models of one's own",
                ),
                "corruption": Setting(
                    GaussianNoise("3x", samples=1),
                    "left open: 3 x the subjects' embedding spread, one draw, as in ROME",
                ),
                "seeds": Setting((0, 1, 2, 3), "left open: four"),
            },
        ),
        Preset(
            "quick",
            "a first look in minutes: every UNet site, few steps, one seed",
            {
                "sites": Setting("unet", "each UNet site"),
                "num_inference_steps": Setting(10, "enough for the kinds of sites to part"),
                "guidance_scale": Setting(7.5, "as usual"),
                "metrics": Setting(["clip_score"], "as the paper"),
                "corruption": Setting(GaussianNoise("3x", samples=1), "as the paper preset"),
                "seeds": Setting((0,), "one picture a prompt; no statement about seeds"),
            },
        ),
    )
}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        StudyError: no such preset.
    """
    if name not in PRESETS:
        raise StudyError(f"no preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_study(name: str, pipe: Any, prompts: Any, **overrides: Any) -> Study:
    """A study with a preset's settings.

    Args:
        name: ``"paper"`` or ``"quick"``.
        pipe: the pipeline.
        prompts: as for `Study`.
        overrides: arguments of `Study` that take the place of the preset's.

    Raises:
        StudyError: no such preset; and whatever `Study` raises.
    """
    settings = {key: setting.value for key, setting in find_preset(name).settings.items()}
    return Study(pipe, prompts, **{**settings, "preset": name, **overrides})


def default_metrics(model: str, protocol: str) -> list[str]:
    """Metrics where none are named: those that need no judge from elsewhere."""
    if protocol == "teacher_forced":
        return ["noise_cosine", "noise_l2"]
    return ["clip_score", "latent_cosine"] if model == "emoji" else ["latent_cosine", "latent_l2"]
