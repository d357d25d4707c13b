"""Render the sprite atlas that the package ships, from the Twemoji set.

``python -m fasttrace.zoo.emoji.atlas FOLDER`` reads ``FOLDER/{icons,chars,info,package}.json`` (the unpacked npm
package ``@iconify-json/twemoji``), renders each drawing at two sizes with resvg and writes ``atlas.png`` and
``atlas.json`` beside this file. Nothing else in the project needs the package: training and evaluation read the atlas.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
SIZES = (48, 32)

# Chosen for a distinct silhouette, for more than one hue, so that a tinted drawing differs from an untinted one, and
# for a look that changes with every quarter turn.
OBJECTS = {
    "mushroom": "1f344",
    "sunflower": "1f33b",
    "butterfly": "1f98b",
    "penguin": "1f427",
    "snowman": "26c4",
    "owl": "1f989",
    "sailboat": "26f5",
    "rocket": "1f680",
    "house": "1f3e0",
    "scissors": "2702",
    "tractor": "1f69c",
    "wine glass": "1f377",
    "ice cream": "1f366",
    "hamburger": "1f354",
    "robot": "1f916",
    "guitar": "1f3b8",
    "cactus": "1f335",
    "carrot": "1f955",
    "pineapple": "1f34d",
    "cherries": "1f352",
    "gift": "1f381",
    "pizza": "1f355",
    "airplane": "2708",
    "teddy bear": "1f9f8",
}


def drawing(folder: Path, codepoint: str) -> tuple[str, int, int]:
    """SVG body, width and height of one codepoint's picture in an unpacked icon set."""
    chars: dict[str, str] = json.loads((folder / "chars.json").read_text())
    icons: dict[str, Any] = json.loads((folder / "icons.json").read_text())
    name = chars.get(codepoint) or chars[f"{codepoint}-fe0f"]
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    return icon["body"], icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))


def sprite(body: str, width: int, height: int, size: int) -> Image.Image:
    """The drawing as a square RGBA picture, trimmed to its outline and centred, one pixel of margin."""
    import resvg_py

    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'{head} viewBox="0 0 {width} {height}" width="512" height="512">{body}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512)))).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox())
    scale = (size - 2) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def build(folder: Path, out: Path = HERE) -> None:
    """Write ``atlas.png`` (a row per object: the large, then the small sprite) and ``atlas.json``."""
    atlas = Image.new("RGBA", (sum(SIZES), SIZES[0] * len(OBJECTS)))
    for i, codepoint in enumerate(OBJECTS.values()):
        body, width, height = drawing(folder, codepoint)
        for x, size in zip((0, SIZES[0]), SIZES, strict=True):
            atlas.paste(sprite(body, width, height, size), (x, SIZES[0] * i))
    atlas.save(out / "atlas.png", optimize=True)
    info = json.loads((folder / "info.json").read_text())
    package = json.loads((folder / "package.json").read_text())
    source = {
        "package": package["name"],
        "version": package["version"],
        "title": info["name"],
        "author": info["author"]["name"],
        "author_url": info["author"]["url"],
        "license": info["license"]["spdx"],
        "license_url": info["license"]["url"],
    }
    table = {"objects": OBJECTS, "sizes": SIZES, "credit": source}
    (out / "atlas.json").write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the package, unpacked")
    build(parser.parse_args().folder)


if __name__ == "__main__":
    main()
