"""The committed picture of the blocks is what its script draws."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import minia3

DOCS = Path(minia3.__file__).parent.parent / "docs"


def load_script():
    spec = importlib.util.spec_from_file_location("draw_blocks", DOCS / "draw_blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_picture_is_what_the_script_draws():
    script = load_script()
    assert script.TARGET.read_text(encoding="utf-8") == script.draw_blocks()


def test_the_picture_has_a_vector_in_each_of_the_eleven_places():
    """An encoder has three, a decoder five, a LLaMA three; one more is in the legend."""
    script = load_script()
    picture = ET.fromstring(script.draw_blocks())
    shapes = [shape for shape in picture.iter() if shape.get("fill") == script.ACCENT]
    assert len(shapes) == 3 + 5 + 3 + 1


def test_every_text_of_the_picture_lies_inside_it():
    script = load_script()
    picture = script.draw_blocks()
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"', picture)
    assert len(places) == picture.count("<text") > 0
    for x, y in places:
        assert 0 < float(x) < script.WIDTH
        assert 0 < float(y) < script.HEIGHT
