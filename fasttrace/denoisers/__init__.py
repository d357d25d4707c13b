"""A pipeline's denoiser as the pipeline itself calls it: what differs between architectures, an adapter each.

An adapter knows what its pipeline knows: how latents are drawn and laid out, what the model is called with, how its
schedule is set and its guidance formed. It calls the model that it is given, the user's own or one that shares its
weights, and knows of neither sites nor patches.
"""

from .denoiser import Denoiser, Flow, Size
from .flux import image_ids
from .pixart import PixArt
from .registry import denoiser_of

__all__ = ["Denoiser", "Flow", "PixArt", "Size", "denoiser_of", "image_ids"]
