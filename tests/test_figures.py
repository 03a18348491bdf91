"""How figures look and where they go."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sb3_klip.figures import DASHES, SIZES, line_styles, save, style


@pytest.mark.parametrize("count", [1, 4, 8])
def test_lines_can_be_told_apart_without_colour(count):
    lines = line_styles(count)
    lightness = [np.dot(to_rgb(line["color"]), (0.299, 0.587, 0.114)) for line in lines]
    assert len(set(map(str, (line["linestyle"] for line in lines)))) == min(count, len(DASHES)) == count
    assert count == 1 or np.diff(lightness).min() > 0.03
    assert max(lightness) < 0.85  # on a white page


def test_the_style_ends_with_its_figures():
    before = dict(matplotlib.rcParams)
    for size, shape in SIZES.items():
        with style(size) as found:
            assert found == shape
            assert matplotlib.rcParams["axes.grid"]
        assert dict(matplotlib.rcParams) == before


def test_the_same_drawing_gives_the_same_files(tmp_path):
    def draw(folder):
        with style():
            figure = Figure()
            figure.subplots().plot([1, 2], label="a line")
            figure.legend()
            return save(figure, tmp_path / folder / "a.figure")

    first, second = draw("one"), draw("two")
    assert [path.relative_to(tmp_path).as_posix() for path in first] == ["one/a.figure.svg", "one/a.figure.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
