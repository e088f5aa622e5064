"""Draws the pictures of docs/concepts.md: `python docs/draw.py` writes docs/pictures/*.svg.

Each picture has a ground of its own and follows the system's light or dark, so that it can be read
on any page. Colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "pictures"
STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --faint: #6b7280; --line: #b6bcc4; --plain: #e8ebef; }
@media (prefers-color-scheme: dark) {
  svg { --ground: #161a1f; --ink: #e6e9ed; --faint: #9aa4b0; --line: #4a525c; --plain: #2a3038; }
}
.ground { fill: var(--ground); }
text { font: 14px system-ui, sans-serif; fill: var(--ink); }
.small { font-size: 12px; fill: var(--faint); }
.box { fill: var(--plain); stroke: var(--line); }
.gone { fill: none; stroke: var(--line); stroke-dasharray: 3 3; }
.arrow { fill: none; stroke: var(--ink); stroke-width: 1.5; marker-end: url(#head); }
.frame { fill: none; stroke: var(--faint); stroke-dasharray: 5 4; }
marker path { fill: var(--ink); }
.a { fill: #0072b2; } .b { fill: #e69f00; } .c { fill: #009e73; } .d { fill: #cc79a7; }
.on { fill: #ffffff; text-anchor: middle; font-size: 12px; } .on.b, .on.d { fill: #000000; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
"""
HEAD = """<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" \
markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>"""


class Picture:
    """An SVG that is put together piece by piece; lengths are in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, []

    def box(
        self, x: float, y: float, width: float, height: float, kind: str = "box", label: str = ""
    ) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>'
        )
        if label:
            style = f"on {kind}" if len(kind) == 1 else "middle"
            self.text(x + width / 2, y + height / 2 + 4.5, label, style)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def arrow(self, path: str) -> None:
        self.parts.append(f'<path class="arrow" d="{path}"/>')

    def save(self, name: str) -> None:
        width, height = self.size
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>{HEAD}",
            f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
            *self.parts,
            "</svg>\n",
        ]
        (FOLDER / name).write_text("\n".join(lines), encoding="utf-8")


def units() -> None:
    """One layer of four query heads, under MHA and under GQA."""
    picture = Picture(680, 290, "What a unit is, under MHA and under GQA")
    for left, title, keys in ((20, "MHA: 4 units, each a head", 4), (360, "GQA: 2 units", 2)):
        picture.text(left + 55, 30, title)
        per, colours = 4 // keys, "abcd"[:keys]
        for row, projection in enumerate("qkvo"):
            y = 50 + 52 * row
            picture.text(left + 30, y + 24, projection, "middle")
            for at in range(4 if projection in "qo" else keys):
                wide = projection in "qo"
                width = 56 if wide else 56 * per + 8 * (per - 1)
                colour = colours[at // per] if wide else colours[at]
                label = f"head {at}" if wide else f"KV head {at}" if per > 1 else f"head {at}"
                picture.box(left + 55 + at * (width + 8), y, width, 36, colour, label)
        for at in range(keys):
            width = 56 * per + 8 * (per - 1) + 6
            picture.box(left + 52 + at * (width + 2), 44, width, 204, "frame")
    picture.text(
        20, 274, "A dashed frame is one unit: what a tie moves, and a budget counts.", "small"
    )
    picture.save("units.svg")


def ties() -> None:
    """Five layers of six units: two sources, one of them of two targets, and a removed unit."""
    picture = Picture(680, 330, "Ties, root sources and removed units")

    def place(layer: int, unit: int) -> tuple[float, float]:
        return 90 + 62 * unit, 250 - 50 * layer

    coloured = {(0, 2): "a", (2, 2): "a", (4, 3): "a", (1, 4): "b", (3, 4): "b"}
    for layer in range(5):
        picture.text(76, place(layer, 0)[1] + 23, f"layer {layer}", "end")
        for unit in range(6):
            gone = (layer, unit) == (3, 0)
            kind = "gone" if gone else coloured.get((layer, unit), "box")
            picture.box(*place(layer, unit), 54, 36, kind)
    for unit in range(6):
        picture.text(place(0, unit)[0] + 27, 304, f"unit {unit}", "small middle")
    picture.arrow("M241 250 L241 188")  # source (0, 2) -> target (2, 2)
    picture.arrow("M252 250 C310 220 330 140 306 88")  # root (0, 2) -> target (4, 3)
    picture.arrow("M365 200 L365 138")  # source (1, 4) -> target (3, 4)
    legend = (
        (
            "a",
            (
                "one slice for three units: the",
                "source (0, 2), and its targets",
                "(2, 2) and (4, 3)",
            ),
        ),
        ("b", ("source (1, 4), target (3, 4)",)),
        ("gone", ("(3, 0) is removed: it computes", "and caches nothing")),
        ("box", ("keeps its own weights",)),
    )
    y = 72
    for kind, lines in legend:
        picture.box(466, y - 11, 14, 14, kind)
        for at, line in enumerate(lines):
            picture.text(488, y + 17 * at, line, "small")
        y += 17 * len(lines) + 12
    picture.save("ties.svg")


def spans() -> None:
    """A span that shares attention beside one that shares keys and values."""
    picture = Picture(680, 360, "Spans: what followers reuse of their leader")
    for left, share, kept, sent in (
        (20, "share: attention (SA)", "v o", "Attention weights"),
        (350, "share: kv (CLA)", "q o", "Keys and values"),
    ):
        picture.text(left, 32, share)
        for row, layer in enumerate((25, 24, 23, 22, 21)):
            y = 50 + 56 * row
            leader, follower = layer == 22, layer > 22
            picture.box(left, y, 120, 42, "box", f"layer {layer}")
            for at, projection in enumerate("qkvo"):
                x = left + 130 + 30 * at
                if follower and projection not in kept:
                    picture.box(x, y + 8, 26, 26, "gone")
                    continue
                mine = leader and projection not in kept
                picture.box(x, y + 8, 26, 26, "b" if mine else "box", projection)
            if leader:
                picture.text(left + 254, y + 26, "leader", "small")
            elif follower:
                picture.text(left + 254, y + 26, "follower", "small")
        picture.arrow(f"M{left + 60} 218 L{left + 60} 207")
        picture.arrow(f"M{left + 60} 162 L{left + 60} 151")
        picture.arrow(f"M{left + 60} 106 L{left + 60} 95")
        picture.text(left, 348, f"{sent} go up; dashed: not there.", "small")
    picture.save("spans.svg")


def stages() -> None:
    """From the base model to what is shipped, and the control beside it."""
    picture = Picture(680, 250, "The stages of a run")
    row = (("base", 20), ("plan", 116), ("post-train", 212), ("materialize", 318), ("heal", 438))
    for (name, x), width in zip(row, (76, 76, 86, 100, 66), strict=True):
        picture.box(x, 60, width, 44, "a" if name == "base" else "box", name)
        picture.arrow(f"M{x + width} 82 L{x + width + 18} 82")
    picture.box(526, 36, 134, 40, "c", "compact export")
    picture.box(526, 90, 134, 40, "c", "dense export")
    for x, words in ((116, "what to share"), (212, "penalty pulls"), (318, "make them one")):
        picture.text(x, 122, words, "small")
    picture.text(438, 122, "train, tied", "small")
    picture.box(212, 170, 292, 44, "d", "continued: as many steps, nothing shared")
    picture.arrow("M58 104 L58 192 L210 192")
    picture.arrow("M504 192 L524 192")
    picture.text(530, 197, "the honest control", "small")
    picture.text(20, 30, "Each stage reads and writes files in the run folder.", "small")
    picture.save("stages.svg")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (units, ties, spans, stages):
        draw()
