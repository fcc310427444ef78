"""A plot: every line where its points are, and words for those who can't see it."""

import base64
import re
from xml.etree import ElementTree

import numpy as np

from rac3.report.plots import Line, plot


def test_a_plot_draws_each_line_through_its_points():
    lines = [
        Line("one", [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)], "#ff0000"),
        Line("two", [(0.0, 2.0), (10.0, 2.0)], "#00ff00", dashed=True),
    ]
    image = plot("Title", "steps", "nats", lines, markers=True)
    assert 'alt="Title, nats: one 1 to 2; two 2 to 2"' in image
    root = ElementTree.fromstring(base64.b64decode(image.split("base64,")[1].split('"')[0]))
    found = {}
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        style = path.get("style", "")
        for color in ("#ff0000", "#00ff00"):
            if f"stroke: {color}" in style and "fill: none" in style:
                points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d", "")), float)
                found.setdefault(color, (points, "stroke-dasharray" in style))
    (one, solid), (two, dashed) = found["#ff0000"], found["#00ff00"]
    assert (solid, dashed) == (False, True)
    assert len(one) == 3
    np.testing.assert_allclose((one[1] - one[0])[0], (one[2] - one[1])[0], rtol=1e-4)  # 5 steps each
    np.testing.assert_allclose((one[0] - one[1])[1], 2 * (one[0] - one[2])[1], rtol=1e-4)  # up 2, and 1 of them down
    np.testing.assert_allclose(two[:, 1], one[2, 1], rtol=1e-4)
    assert plot("Title", "steps", "nats", lines, markers=True) == image
