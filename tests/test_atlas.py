"""The atlas: what is drawn is the gradient, and every registered coefficient is there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.distributions import Categorical, kl_divergence

from sb3_klip import figures
from sb3_klip.atlas import MULTIPLIERS, POSITION, PROBABILITY, atlas, caption, layout, multiplier
from sb3_klip.coefficients import FAMILY, available, entries, make, register, registry
from sb3_klip.surrogate import per_sample_kl_loss
from sb3_klip.trust_region import categorical_ratio_bounds, default_delta

COMMITTED = Path(__file__).parents[1] / "docs" / "figures" / "atlas.svg"


@pytest.mark.parametrize("name", [*available(), "gppo", "fixed k1", "fixed k3"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 2.5])
def test_what_is_drawn_is_the_gradient_of_the_loss(name, advantage):
    """Of a policy with four actions, of which the first becomes more or less probable."""
    name, _, estimator = name.partition(" ")
    coefficient = make(name, **({"estimator": estimator} if estimator else {}))
    old = Categorical(th.tensor([PROBABILITY, 0.4, 0.2, 0.15], dtype=th.float64))
    delta = default_delta("categorical", 0.2, 1) if coefficient.delta is None else coefficient.delta
    least, greatest = categorical_ratio_bounds(old.probs[:1], delta)
    ratio = np.array([0.05, 0.3, 0.55, 0.77, 0.9, 1.0, 1.1, 1.23, 1.45, 1.6, 1.97])
    expected = []
    for w in ratio:
        q = PROBABILITY
        shift = th.tensor(np.log(w * (1 - q) / (1 - q * w)), requires_grad=True)  # of the first logit, for which π / π_old = w
        new = Categorical(logits=old.logits + shift * th.tensor([1.0, 0.0, 0.0, 0.0], dtype=th.float64))
        log_prob = new.log_prob(th.tensor([0]))
        loss = per_sample_kl_loss(
            log_prob,
            old.log_prob(th.tensor([0])),
            th.tensor([advantage], dtype=th.float64),
            coefficient,
            kl=kl_divergence(old, new).reshape(1),
            position=th.tensor([POSITION], dtype=th.float64),
            least_ratio=least,
            greatest_ratio=greatest,
        )
        (slope,) = th.autograd.grad(-loss, shift, retain_graph=True)
        (score,) = th.autograd.grad(log_prob.sum(), shift)
        expected.append((slope / (advantage * score)).item())
    np.testing.assert_allclose(multiplier(coefficient, ratio, advantage), expected, rtol=1e-9, atol=1e-12)


def test_every_coefficient_has_a_place_of_its_own_beside_its_family():
    for columns in (2, 3, 6, 50):
        panels = layout(columns)
        assert {panel.entry.name for panel in panels} >= set(available())
        assert len({(panel.row, panel.column) for panel in panels}) == len(panels) == len(entries())
        assert {panel.row for panel in panels} == set(range(panels[-1].row + 1))
        assert max(panel.column for panel in panels) < columns
        modules = [panel.entry.function.__module__ for panel in panels]
        order = [module.__name__ for module in FAMILY]
        known = [order.index(module) for module in modules if module in order]
        assert known == sorted(known)
        for i, panel in enumerate(panels):
            begins = i == 0 or modules[i] != modules[i - 1] or panel.column == 0
            assert bool(panel.heading) == begins


@pytest.fixture
def _own_names(monkeypatch):
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))


@pytest.mark.usefixtures("_own_names")
def test_a_new_coefficient_appears_by_itself():
    @register("only_here", "mine", source="a paper, arXiv 3012.00001 and arXiv 3101.00001")
    def only_here(ratio, advantages, clip_range, old_log_prob, age, *, share=0.5):
        return share * old_log_prob.exp() + age

    panel = layout(6)[-1]
    assert (panel.entry.name, panel.heading) == ("only_here", "your own")
    assert caption(panel.entry) == "2030, 3012.00001\nmine"
    axis = atlas().axes[-1]
    assert axis.texts[0].get_text() == "only_here"
    ratio, drawn = axis.get_lines()[-1].get_data()
    np.testing.assert_allclose(drawn, ratio * (1 - 0.5 * PROBABILITY), rtol=1e-6)


@pytest.mark.usefixtures("_own_names")
def test_a_coefficient_that_knows_no_precision_but_that_of_training():
    shares = th.tensor([0.25, 0.75])
    register("from_a_table")(lambda ratio, advantages, clip_range: shares[(ratio > 1).long()])
    ratio, drawn = atlas().axes[-1].get_lines()[-1].get_data()
    np.testing.assert_allclose(drawn, ratio * np.where(ratio > 1, 0.25, 0.75), rtol=1e-6)


@pytest.mark.usefixtures("_own_names")
def test_a_coefficient_without_a_paper_has_its_name():
    register("unpublished", source="me")(lambda ratio, advantages, clip_range: 0 * ratio)
    assert caption(layout(6)[-1].entry) == "\n "


@pytest.mark.parametrize("size", figures.SIZES)
def test_titles_stay_within_their_columns(size):
    with figures.style(size):
        figure = atlas(0.1, size)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    boxes = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts]
    boxes += [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.98, 0.7).overlaps(b.shrunk(0.98, 0.7))]
    assert not overlapping
    assert all(axis.get_ylim() == MULTIPLIERS for axis in figure.axes)


def test_the_figure_of_the_documentation_has_all_of_them():
    """Matplotlib writes each text as a comment beside its outlines."""
    texts = set(re.findall(r"<!-- (.*?) -->", COMMITTED.read_text(encoding="utf-8"), re.DOTALL))
    assert texts >= set(available()), "run `python -m sb3_klip.plot atlas -o docs/figures/atlas`"
