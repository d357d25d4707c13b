"""How numbers, counts, kinds and metrics are put into words, in figures, reports and on the terminal alike."""

from __future__ import annotations

KIND_NAMES = {
    "resnet": "resnet",
    "self_attn": "self-attention",
    "cross_attn": "cross-attention",
    "mlp": "MLP",
    "hidden": "whole layer",
}
_UNITS = {
    "clip_score": "100 × cosine of picture and prompt in CLIP's space",
    "x0_clip_score": "100 × cosine of predicted picture and prompt in CLIP's space",
    "latent_cosine": "cosine with the clean run's latents",
    "latent_l2": "minus relative distance to the clean run's latents",
    "text_cosine": "cosine with the clean text states",
    "text_l2": "minus relative distance to the clean text states",
    "noise_cosine": "cosine with the clean run's model output",
    "noise_l2": "minus relative distance to the clean run's model output",
    "x0_l2": "minus relative distance to the clean predicted latents",
}


def unit(metric: str) -> str:
    """What a metric's numbers are, for an axis."""
    return _UNITS.get(metric.partition(":")[0], metric)


def number(value: float) -> str:
    """A score in about four characters."""
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.2g}"


def counted(count: float, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{int(count)} {noun}" if count == 1 else f"{int(count)} {noun}s"


def steps_label(start: int, stop: int) -> str:
    """``step 3``, ``steps 0 to 4``: denoising steps from ``start`` up to, without, ``stop``."""
    return f"step {start}" if stop == start + 1 else f"steps {start} to {stop - 1}"


def block(site: str) -> str:
    """The UNet block that a site stands in, as a label: ``down 0``, ``mid``, ``up 2``."""
    side, index = site.split(".")[1:3]
    return "mid" if side == "mid_block" else f"{side.removesuffix('_blocks')} {index}"


def unet_place(site: str) -> str:
    """Where a site of a known kind stands, in few characters: ``down 0 / 1`` for the second of its kind there."""
    numbers = [piece for piece in site.split(".")[2 if block(site) == "mid" else 3 :] if piece.isdigit()]
    if len(numbers) > 1 and numbers[-1] == "0":
        numbers.pop()
    return f"{block(site)} / {'.'.join(numbers)}"


def site_label(site: str, kind: str, layer: int, role: str = "") -> str:
    """A site in words that fit under a picture, on two lines: kind, then place."""
    name = KIND_NAMES.get(kind, kind)
    if " + " in site or ".." in site:
        return f"{name}\nfrom layer {layer}"
    if site.startswith("unet."):
        return f"{name}\n{unet_place(site)}"
    where = "" if role in ("", "all") else f", {role.replace('_', ' ')}"
    return f"{name}\nlayer {layer}{where}"
