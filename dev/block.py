#!/usr/bin/env python3
"""Draws the Megalodon block for README.md: plain SVG, written as text. Needs nothing but Python.

    dev/block.py [-o dev/pictures/block.svg]

The picture is read from top to bottom. The names beside its arrows are those of the equations in README.md and in
train_megalodon.c.
"""
import os, sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
from base import Parser, main_of

WIDTH, HEIGHT = 516, 856
LEFT, CENTER, RIGHT, OUTER = 52, 194, 324, 410 # columns: v; the main path; the gate r; Wh1
FIRST_HOP, SECOND_HOP = 472, 496               # columns of the two lines that bring x past the layers

LINE, TEXT, NAME = "#333333", "#1a1a1a", "#b0281e"
PLAIN, STATE, ATTENTION = ("#f3f3f3", "#666666"), ("#d9e8f8", "#1f5fa8"), ("#fbeccb", "#b07a12") # fill, border

shapes, labels = [], [] # labels come last in the file: no line covers them


def text(x, y, content, size=15, color=TEXT, anchor="middle", style=""):
    labels.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{style}>'
                  f'{content}</text>')


def name(x, y, content, anchor="start"):
    """A name of the equations, beside the arrow that carries it."""
    text(x, y, content, 17, NAME, anchor, ' font-style="italic" font-weight="bold"')


def box(left, top, right, bottom, colors, *lines):
    """A layer. The first line is its name; the second, if there is one, says what it does or carries."""
    shapes.append(f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="6" '
                  f'fill="{colors[0]}" stroke="{colors[1]}" stroke-width="1.5"/>')
    middle = (top + bottom) / 2
    if len(lines) == 1:
        text((left + right) / 2, middle + 5, lines[0])
    else:
        text((left + right) / 2, middle - 3, lines[0])
        text((left + right) / 2, middle + 14, lines[1], 12.5)


def path(*points, arrow=True):
    """A line through the points, by default with an arrowhead at its end."""
    d = "M" + " L".join(f"{x},{y}" for x, y in points)
    shapes.append(f'<path d="{d}" fill="none" stroke="{LINE}" stroke-width="1.6"'
                  + (' marker-end="url(#arrow)"' if arrow else "") + "/>")


def dot(x, y):
    """The place where a value goes two ways."""
    shapes.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{LINE}"/>')


def operation(x, y, sign):
    """A sum or a product, entry by entry."""
    shapes.append(f'<circle cx="{x}" cy="{y}" r="12" fill="#ffffff" stroke="{LINE}" stroke-width="1.6"/>')
    a = 6 if sign == "+" else 4.5
    strokes = [(-a, 0, a, 0), (0, -a, 0, a)] if sign == "+" else [(-a, -a, a, a), (-a, a, a, -a)]
    for x0, y0, x1, y1 in strokes:
        shapes.append(f'<path d="M{x + x0},{y + y0} L{x + x1},{y + y1}" stroke="{LINE}" stroke-width="1.8"/>')


def draw():
    half = 86 # half of the width of a box on the main path

    # x, and its two hops
    name(CENTER + 10, 24, "x")
    path((CENTER, 10), (CENTER, 56))
    dot(CENTER, 36)
    path((CENTER, 36), (SECOND_HOP, 36), (SECOND_HOP, 778), (CENTER + 14, 778))
    dot(FIRST_HOP, 36)
    path((FIRST_HOP, 36), (FIRST_HOP, 632), (CENTER + 14, 632))
    text(FIRST_HOP - 10, 625, "x: the first hop", 13, anchor="end")
    text(FIRST_HOP - 10, 771, "x: the second hop", 13, anchor="end")

    # the memory of the past: timestep norm, CEMA
    box(CENTER - half, 58, CENTER + half, 102, STATE, "timestep norm", "count, mean, variance")
    path((CENTER, 102), (CENTER, 138))
    name(CENTER + 10, 118, "n")
    dot(CENTER, 122)
    path((CENTER, 122), (LEFT, 122), (LEFT, 286))
    box(CENTER - half, 140, CENTER + half, 184, STATE, "CEMA", "complex states h")
    path((CENTER, 184), (CENTER, 212))
    name(CENTER + 10, 202, "e")
    box(CENTER - half, 214, CENTER + half, 244, PLAIN, "RMS norm")

    # m goes three ways; v is made of n
    path((CENTER, 244), (CENTER, 286))
    name(CENTER + 10, 260, "m")
    dot(CENTER, 266)
    path((CENTER, 266), (OUTER, 266), (OUTER, 286))
    dot(RIGHT, 266)
    path((RIGHT, 266), (RIGHT, 286))
    box(LEFT - 40, 288, LEFT + 40, 318, PLAIN, "Wv, SiLU")
    box(CENTER - half, 288, CENTER + half, 318, PLAIN, "Wz")
    path((CENTER, 318), (CENTER, 344))
    name(CENTER + 10, 336, "z")
    box(CENTER - half, 346, CENTER + half, 376, PLAIN, "RMS norm, affine, rotary")
    box(RIGHT - 38, 288, RIGHT + 38, 318, PLAIN, "Wr, SiLU")
    box(OUTER - 38, 288, OUTER + 38, 318, PLAIN, "Wh1")

    # attention
    path((LEFT, 318), (LEFT, 414))
    name(LEFT + 8, 394, "v")
    for x, label in (CENTER - 34, "q"), (CENTER + 34, "k"):
        path((x, 376), (x, 414))
        name(x + 8, 398, label)
    box(LEFT - 40, 416, CENTER + half, 460, ATTENTION, "chunk attention", "softmax inside one chunk, causal")
    path((CENTER, 460), (CENTER, 490))
    name(CENTER + 10, 480, "o")

    # the gate, the two products, the sum y
    operation(CENTER, 504, "x")
    path((RIGHT, 318), (RIGHT, 504), (CENTER + 14, 504))
    name(RIGHT + 8, 394, "r")
    path((CENTER, 516), (CENTER, 534))
    box(CENTER - 38, 536, CENTER + 38, 564, PLAIN, "Wh2")
    path((CENTER, 564), (CENTER, 578))
    operation(CENTER, 592, "+")
    path((OUTER, 318), (OUTER, 592), (CENTER + 14, 592))
    path((CENTER, 604), (CENTER, 618))
    operation(CENTER, 632, "+")
    path((CENTER, 644), (CENTER, 664))
    name(CENTER + 10, 659, "y")

    # the feed-forward
    box(CENTER - half, 666, CENTER + half, 694, PLAIN, "layer norm")
    path((CENTER, 694), (CENTER, 716))
    name(CENTER + 10, 710, "u")
    box(CENTER - half, 718, CENTER + half, 746, PLAIN, "feed-forward")
    path((CENTER, 746), (CENTER, 764))
    operation(CENTER, 778, "+")
    path((CENTER, 790), (CENTER, 816))
    name(CENTER + 10, 808, "out")

    # what the colors mean
    for x, colors, meaning in ((12, STATE, "carries a state to the next chunk"),
                               (262, ATTENTION, "sees the present chunk only")):
        shapes.append(f'<rect x="{x}" y="834" width="14" height="12" rx="3" fill="{colors[0]}" stroke="{colors[1]}"/>')
        text(x + 20, 845, meaning, 13, anchor="start")


def main():
    parser = Parser(__doc__)
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pictures", "block.svg")
    parser.add_argument("-o", "--out", default=default, help="file to write (block.svg in the folder pictures here)")
    options = parser.parse_args()
    draw()
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="Helvetica, Arial, sans-serif">',
            "<title>The Megalodon block</title>",
            '<defs><marker id="arrow" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0,0 L9,4 L0,8 z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>']
    with open(options.out, "w", encoding="utf-8") as f:
        f.write("\n".join(head + shapes + labels + ["</svg>"]) + "\n")


if __name__ == "__main__":
    main_of(main)
