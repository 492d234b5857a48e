"""The fonts of the glyphs task, from packages on PyPI: families to train on, families to test on, and how a character is drawn."""
from __future__ import annotations

import importlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

TILE, EM, BASELINE = 96, 60, 68  # pixels: of a rendered character

# Family -> (package, files). A name without a suffix is a module of pymupdf_fonts, which keeps fonts as Python bytes.
STYLES = ("Regular", "Bold", "Italic", "BoldItalic")
DEJAVU = ("", "-Bold", "-Oblique", "-BoldOblique")


def _rendercv(folder: str, name: str, suffix: str = "ttf") -> tuple[str, list[str]]:
    return "rendercv_fonts", [f"{folder}/{name}-{style}.{suffix}" for style in STYLES]


TRAIN = {
    "DejaVu Sans": ("matplotlib", [f"mpl-data/fonts/ttf/DejaVuSans{s}.ttf" for s in DEJAVU]),
    "DejaVu Sans Mono": ("matplotlib", [f"mpl-data/fonts/ttf/DejaVuSansMono{s}.ttf" for s in DEJAVU]),
    "DejaVu Serif": ("matplotlib", [f"mpl-data/fonts/ttf/DejaVuSerif{s}.ttf" for s in ("", "-Bold", "-Italic", "-BoldItalic")]),
    "STIX": ("matplotlib", [f"mpl-data/fonts/ttf/STIXGeneral{s}.ttf" for s in ("", "Bol", "Italic", "BolIta")]),
    "Gentium Book Plus": _rendercv("Gentium Book Plus", "GentiumBookPlus"),
    "Noto Sans": _rendercv("Noto Sans", "NotoSans"),
    "Open Sans": _rendercv("Open Sans", "OpenSans"),
    "Raleway": _rendercv("Raleway", "Raleway"),
    "FiraGO": ("pymupdf_fonts", [f"FiraGO_{s}" for s in STYLES]),
    "Fira Mono": ("pymupdf_fonts", ["FiraMono_Regular", "FiraMono_Bold"]),
    "Source Serif Pro": ("font_source_serif_pro", [f"files/SourceSerifPro-{s}.ttf" for s in ("Regular", "Bold", "It", "BoldIt")]),
    "Manrope": ("font_manrope", [f"files/Manrope-{s}.ttf" for s in ("Light", "Regular", "Bold")]),
}
TEST = {
    "EB Garamond": _rendercv("EB Garamond", "EBGaramond"),
    "Roboto": _rendercv("Roboto", "Roboto"),
    "Ubuntu": _rendercv("Ubuntu", "Ubuntu"),
    "XCharter": _rendercv("XCharter", "XCharter", "otf"),
    "Source Sans 3": _rendercv("Source Sans 3", "SourceSans3"),
    "Cascadia Mono": ("pymupdf_fonts", [f"CascadiaMono_{s}" for s in STYLES]),
    "Ubuntu Mono": ("pymupdf_fonts", [f"UbuntuMono_{s}" for s in STYLES]),
}


def font_bytes(package: str, file: str) -> bytes:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the glyphs task needs the fonts of the package {package.replace('_', '-')}: pip install '.[glyphs]'")
    if "." not in file:
        return importlib.import_module(f"{package}.{file}").fontbuffer
    return (Path(spec.submodule_search_locations[0]) / file).read_bytes()


class Family:
    """The styles of a family and the characters that all of them have."""

    def __init__(self, package: str, files: list[str]):
        data = [font_bytes(package, file) for file in files]
        self.fonts = [ImageFont.truetype(io.BytesIO(d), EM, layout_engine=ImageFont.Layout.BASIC) for d in data]
        self.has = set.intersection(*(set(TTFont(io.BytesIO(d), lazy=True).getBestCmap()) for d in data))

    def draw(self, code: int, style: int = 0) -> np.ndarray:
        """uint8 [TILE, TILE]: ink, on the base line, centred across."""
        font, image = self.fonts[style], Image.new("L", (TILE, TILE))
        left, _, right, _ = font.getbbox(chr(code), anchor="ls")
        ImageDraw.Draw(image).text((TILE / 2 - (left + right) / 2, BASELINE), chr(code), 255, font=font, anchor="ls")
        return np.asarray(image)
