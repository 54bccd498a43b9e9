"""Draw docs/pictures/blocks.svg: the blocks of T5 and LLaMA, with (IA)^3 in its places.

    python docs/draw_blocks.py

Everything is grey but the vectors, which are the only thing that trains. Each column is a block,
read from top to bottom. The line at its left is the running sum; each card reads the sum through a
norm, and adds to it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

TITLE = "A T5 block and a LLaMA block, with the vectors of (IA)^3 in their places"
TARGET = Path(__file__).resolve().parent / "pictures" / "blocks.svg"

ACCENT = "#d9480f"
INK = "#343a40"
LINE = "#868e96"
BORDER = "#ced4da"
FROZEN = "#e9ecef"
CARD = "#f8f9fa"
PAPER = "#ffffff"

# All lengths are in pixels of a picture that is WIDTH wide.
WIDTH = 960
HEIGHT = 882
MARGIN = 26
GUTTER = 34
COLUMN = 280  # the width of a column
RAIL = 16  # from a column's left side to its running sum
CARD_LEFT = 46
CARD_WIDTH = COLUMN - CARD_LEFT
PADDING = 14
LANE = 62  # the width of the lanes of queries, keys and values
LANE_STEP = 72  # from one lane to the next
INNER = 2 * LANE_STEP + LANE  # the width of all lanes
ROW = 24  # the height of a box
BASELINE = 16.5  # of the text in a box
ROW_STEP = 38  # from one row to the next
FIRST_ROW = 34  # below the heading of a card
CARD_GAP = 38
FIRST_CARD = 100

MATH = re.compile(r"\b([WlqkK])(?:_([a-z]+))?\b")  # W, l_ff ...


@dataclass
class Picture:
    """Collects the elements of an SVG file, in three layers: cards, lines, and boxes on them."""

    cards: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    shapes: list = field(default_factory=list)

    def card(self, x, y, height):
        self.cards.append(
            f'<rect x="{x:g}" y="{y:g}" width="{CARD_WIDTH}" height="{height:g}" rx="10" '
            f'fill="{CARD}" stroke="{BORDER}"/>'
        )

    def box(self, x, y, width, text):
        """Draw something frozen. x: its middle."""
        self.shapes.append(
            f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{ROW}" rx="5" '
            f'fill="{FROZEN}" stroke="{BORDER}"/>'
        )
        self.text(x, y + BASELINE, text)

    def pill(self, x, y, width, text, fill=LINE):
        """Draw a box with round ends and white letters. x: its middle."""
        self.shapes.append(
            f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{ROW}" '
            f'rx="{ROW / 2:g}" fill="{fill}"/>'
        )
        self.text(x, y + BASELINE, text, fill=PAPER, weight="bold")

    def vector(self, x, y, width, name):
        """Draw a vector of (IA)^3, which trains."""
        self.pill(x, y, width, f"\u00d7 {name}", ACCENT)

    def text(self, x, y, text, **style):
        """Write a line of text. style: fill, size, anchor ("middle" or "start") and weight."""
        size = style.get("size", 12.5)
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" fill="{style.get("fill", INK)}" font-size="{size:g}" '
            f'text-anchor="{style.get("anchor", "middle")}" '
            f'font-weight="{style.get("weight", "normal")}">{mathematics(text, size)}</text>'
        )

    def operator(self, x, y, sign):
        """Draw a small circle with a plus or a multiplication sign. x, y: its middle."""
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{PAPER}" stroke="{INK}" '
            'stroke-width="1.4"/>'
        )
        arms = {"+": ((5, 0), (0, 5)), "x": ((3.6, 3.6), (3.6, -3.6))}
        for dx, dy in arms[sign]:
            self.shapes.append(
                f'<path d="M{x - dx:g} {y - dy:g}L{x + dx:g} {y + dy:g}" '
                f'stroke="{INK}" stroke-width="1.4"/>'
            )

    def line(self, *points, is_dashed=False):
        """Draw a line through points, with an arrow at its end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        style = ' marker-end="url(#arrow)"'
        if is_dashed:
            style += ' stroke-dasharray="5 4"'
        self.lines.append(f'<path d="M{path}"{style}/>')

    def interrupt(self, x, y):
        """Leave a gap in the vertical line at x, so that another line crosses it visibly."""
        self.lines.append(
            f'<path d="M{x:g} {y - 6:g}V{y + 6:g}" stroke="{PAPER}" stroke-width="4"/>'
        )

    def svg(self):
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
                f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" '
                f'role="img" aria-label="{TITLE}">',
                '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                'markerHeight="7" orient="auto">'
                f'<path d="M0 0.8L7.5 4L0 7.2z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}"/>',
                *self.cards,
                f'<g fill="none" stroke="{LINE}" stroke-width="1.4">',
                *self.lines,
                "</g>",
                *self.shapes,
                "</svg>",
                "",
            ]
        )


def mathematics(text, size):
    """Set names such as W_q and l_ff in italics, with a subscript."""

    def markup(match):
        letter, subscript = match.groups()
        font = 'font-family="Georgia, Times, serif" font-style="italic"'
        parts = f"<tspan {font}>{letter}</tspan>"
        if subscript:
            parts += f'<tspan font-size="{size * 0.74:.1f}" dy="3.5">{subscript}</tspan>'
            parts += '<tspan dy="-3.5">&#8203;</tspan>'  # return to the baseline
        return parts

    return MATH.sub(markup, text)


@dataclass
class Card:
    """One part of a block: it reads the running sum through a norm, and adds to it."""

    picture: Picture
    column_x: float
    y: float
    title: str
    n_rows: int

    def __post_init__(self):
        x = self.column_x + CARD_LEFT
        self.picture.card(x, self.y, self.height)
        self.picture.text(x + PADDING, self.y + 21, self.title, anchor="start", weight="bold")

    @property
    def height(self):
        return FIRST_ROW + (self.n_rows - 1) * ROW_STEP + ROW + PADDING

    @property
    def bottom(self):
        return self.y + self.height

    @property
    def rail_x(self):
        return self.column_x + RAIL

    @property
    def left(self):
        return self.column_x + CARD_LEFT + PADDING

    @property
    def middle(self):
        return self.left + INNER / 2

    def lane(self, number):
        """Return the middle of the lane of queries (0), keys (1) or values (2)."""
        return self.left + LANE / 2 + number * LANE_STEP

    def row(self, number):
        return self.y + FIRST_ROW + number * ROW_STEP

    def down(self, x, row, to_row=None):
        """Draw an arrow from the bottom of a row to the top of the next one, or of `to_row`."""
        if to_row is None:
            to_row = row + 1
        self.picture.line((x, self.row(row) + ROW), (x, self.row(to_row)))

    def read_sum(self, width):
        """Draw the norm, which reads the running sum."""
        y = self.row(0)
        self.picture.line((self.rail_x, y + ROW / 2), (self.left, y + ROW / 2))
        self.picture.box(self.left + width / 2, y, width, "norm")

    def add_to_sum(self, text):
        """Draw the last matrix, and its way back to the running sum."""
        y = self.row(self.n_rows - 1)
        self.picture.box(self.middle, y, INNER, text)
        self.picture.line((self.left, y + ROW / 2), (self.rail_x + 9, y + ROW / 2))
        self.picture.operator(self.rail_x, y + ROW / 2, "+")


def draw_attention(card, scores, has_rotation=False, has_memory=False, kv_width=LANE):
    """Draw queries, keys and values in three lanes. kv_width: smaller if heads are shared."""
    picture = card.picture
    q_x, k_x, v_x = (card.lane(number) for number in range(3))
    if has_memory:
        card.read_sum(LANE)
        picture.pill((k_x + v_x) / 2, card.row(0), LANE_STEP + LANE, "encoder output")
    else:
        card.read_sum(INNER)

    for x, width, name in ((q_x, LANE, "W_q"), (k_x, kv_width, "W_k"), (v_x, kv_width, "W_v")):
        card.down(x, 0)
        picture.box(x, card.row(1), width, name)
    for x, name in ((k_x, "l_k"), (v_x, "l_v")):
        card.down(x, 1)
        picture.vector(x, card.row(2), kv_width, name)

    softmax_row = card.n_rows - 2
    if has_rotation:
        card.down(q_x, 1, 3)
        card.down(k_x, 2)
        picture.box(q_x, card.row(3), LANE, "rotate")
        picture.box(k_x, card.row(3), kv_width, "rotate")
        card.down(q_x, 3)
        card.down(k_x, 3)
    else:
        card.down(q_x, 1, softmax_row)
        card.down(k_x, 2, softmax_row)

    y = card.row(softmax_row)
    picture.box((q_x + k_x) / 2, y, LANE_STEP + LANE, scores)
    picture.line((v_x, card.row(2) + ROW), (v_x, y + ROW / 2 - 9))
    picture.line((k_x + LANE / 2, y + ROW / 2), (v_x - 9, y + ROW / 2))
    picture.operator(v_x, y + ROW / 2, "x")
    picture.line((v_x, y + ROW / 2 + 9), (v_x, card.row(softmax_row + 1)))
    card.add_to_sum("W_o")


def draw_feed_forward(card, activation, is_gated):
    picture = card.picture
    card.read_sum(INNER)
    if is_gated:
        width = (INNER - 14) / 2
        gate_x = card.left + width / 2
        up_x = card.left + INNER - width / 2
        y = card.row(2) + ROW / 2
        card.down(up_x, 0)
        picture.box(up_x, card.row(1), width, "W_up")
        picture.line((up_x, card.row(1) + ROW), (up_x, y - 9))
        picture.line((gate_x + width / 2, y), (up_x - 9, y))
        picture.operator(up_x, y, "x")
        picture.line((up_x, y + 9), (up_x, card.row(3)))
    else:
        width = INNER
        gate_x = card.middle
        card.down(gate_x, 2)
    card.down(gate_x, 0)
    picture.box(gate_x, card.row(1), width, "W_gate")
    card.down(gate_x, 1)
    picture.box(gate_x, card.row(2), width, activation)
    picture.vector(card.middle, card.row(3), INNER, "l_ff")
    card.down(card.middle, 3)
    card.add_to_sum("W_down")


def draw_heading(picture, x, title, subtitle):
    picture.text(x, 44, title, size=18, anchor="start", weight="bold")
    picture.text(x, 65, subtitle, anchor="start", fill=LINE)


def draw_rail(picture, x, y):
    """Draw the running sum of a column, down to y."""
    picture.line((x + RAIL, FIRST_CARD - 16), (x + RAIL, y))


def draw_t5_encoder(picture, x):
    """Draw the column, and return where the encoder's output leaves it."""
    draw_heading(picture, x, "T5, encoder", "three vectors per block")
    attention = Card(picture, x, FIRST_CARD, "self-attention", 5)
    draw_attention(attention, "softmax(q \u00b7 k + bias)")
    feed_forward = Card(picture, x, attention.bottom + CARD_GAP, "feed-forward", 5)
    draw_feed_forward(feed_forward, "ReLU", is_gated=False)
    y = feed_forward.bottom + 20
    draw_rail(picture, x, y)
    width = LANE_STEP + LANE
    picture.pill(x + width / 2, y, width, "encoder output")
    return x + width, y + ROW / 2


def draw_t5_decoder(picture, x, output):
    """Draw the column. output: where the encoder's output comes from."""
    draw_heading(picture, x, "T5, decoder", "five vectors: it attends twice")
    attention = Card(picture, x, FIRST_CARD, "self-attention", 5)
    draw_attention(attention, "softmax(q \u00b7 k + bias)")
    cross = Card(picture, x, attention.bottom + CARD_GAP, "cross-attention", 5)
    draw_attention(cross, "softmax(q \u00b7 k)", has_memory=True)
    feed_forward = Card(picture, x, cross.bottom + CARD_GAP, "feed-forward", 5)
    draw_feed_forward(feed_forward, "ReLU", is_gated=False)

    draw_rail(picture, x, feed_forward.bottom + 20)
    gutter_x = x - GUTTER / 2
    gap_y = cross.y - CARD_GAP / 2
    memory_x = (cross.lane(1) + cross.lane(2)) / 2
    picture.interrupt(cross.rail_x, gap_y)
    picture.line(
        output,
        (gutter_x, output[1]),
        (gutter_x, gap_y),
        (memory_x, gap_y),
        (memory_x, cross.row(0)),
        is_dashed=True,
    )


def draw_llama(picture, x):
    """Draw the column, and return its bottom."""
    draw_heading(picture, x, "LLaMA", "three vectors per block")
    attention = Card(picture, x, FIRST_CARD, "self-attention", 6)
    draw_attention(attention, "softmax(q \u00b7 k / \u221aK)", has_rotation=True, kv_width=50)
    feed_forward = Card(picture, x, attention.bottom + CARD_GAP, "feed-forward", 5)
    draw_feed_forward(feed_forward, "SiLU", is_gated=True)
    draw_rail(picture, x, feed_forward.bottom + 20)
    return feed_forward.bottom


def draw_legend(picture, x, y):
    """Say what the shapes mean."""
    middle = x + CARD_LEFT - 17
    picture.vector(middle, y, 58, "l")
    picture.box(middle, y + 34, 58, "W")
    picture.operator(middle, y + 80, "+")
    picture.operator(middle, y + 114, "x")
    texts = (
        "trains: multiply, entry by entry",
        "frozen",
        "add to the running sum",
        "multiply, as it was without (IA)^3",
    )
    for number, text in enumerate(texts):
        picture.text(x + 74, y + BASELINE + 34 * number, text, anchor="start")


def draw_notes(picture, x, y):
    """Say how long the vectors are."""
    notes = (
        ("l_k, l_v", "as wide as keys and values"),
        ("l_ff", "as wide as the feed-forward"),
        ("W_k, W_v", "LLaMA: heads may share them"),
        ("rotate", "after l_k, which then folds into W_k"),
    )
    for number, (name, text) in enumerate(notes):
        picture.text(x, y + BASELINE + 34 * number, name, anchor="start")
        picture.text(x + 74, y + BASELINE + 34 * number, text, anchor="start")


def draw_blocks():
    """Return the picture as the text of an SVG file."""
    picture = Picture()
    step = COLUMN + GUTTER
    output = draw_t5_encoder(picture, MARGIN)
    draw_t5_decoder(picture, MARGIN + step, output)
    bottom = draw_llama(picture, MARGIN + 2 * step)
    draw_legend(picture, MARGIN, bottom + 66)
    draw_notes(picture, MARGIN + 2 * step, bottom + 66)
    return picture.svg()


if __name__ == "__main__":
    TARGET.write_text(draw_blocks(), encoding="utf-8", newline="\n")
