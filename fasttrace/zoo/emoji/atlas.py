"""Render the sprite atlas that the package ships, from the three emoji sets.

``python -m fasttrace.zoo.emoji.atlas FOLDER`` reads ``FOLDER/<set>/package/{icons,chars,info}.json`` (the unpacked npm
packages ``@iconify-json/<set>``), renders each drawing at two sizes with resvg and writes ``atlas.png`` and
``atlas.json`` beside this file. Nothing else in the project needs the packages: training and evaluation read the atlas.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
SETS = {"noto style": "noto", "twemoji style": "twemoji", "fluent style": "fluent-emoji-flat"}
SIZES = (48, 32)

# Chosen for a distinct silhouette that is much the same in the three sets, for more than one hue, so that a tinted
# drawing differs from an untinted one, and for a look that changes when it is turned upside down.
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
    "traffic light": "1f6a6",
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
    """Write ``atlas.png`` (a row per object; per set the large, then the small sprite) and ``atlas.json``."""
    column = sum(SIZES)
    atlas = Image.new("RGBA", (column * len(SETS), SIZES[0] * len(OBJECTS)))
    credits_: list[dict[str, str]] = []
    for j, (style, name) in enumerate(SETS.items()):
        package = folder / name / "package"
        info = json.loads((package / "info.json").read_text())
        version = json.loads((package / "package.json").read_text())["version"]
        credits_.append(
            {
                "style": style,
                "package": f"@iconify-json/{name}",
                "version": version,
                "title": info["name"],
                "author": info["author"]["name"],
                "author_url": info["author"]["url"],
                "license": info["license"]["spdx"],
                "license_url": info["license"]["url"],
            }
        )
        for i, codepoint in enumerate(OBJECTS.values()):
            body, width, height = drawing(package, codepoint)
            x = column * j
            for size in SIZES:
                atlas.paste(sprite(body, width, height, size), (x, SIZES[0] * i))
                x += size
    atlas.save(out / "atlas.png", optimize=True)
    table = {"objects": OBJECTS, "styles": SETS, "sizes": SIZES, "credits": credits_}
    (out / "atlas.json").write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="holds noto/, twemoji/ and fluent-emoji-flat/, unpacked")
    build(parser.parse_args().folder)


if __name__ == "__main__":
    main()
