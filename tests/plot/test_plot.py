"""Figures: that each kind of table gets one, that nothing global changes, and that no half-written file stays."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fasttrace import plot
from fasttrace.effects.effects import Effects
from fasttrace.errors import StudyError
from fasttrace.findings.wording import counted, number, site_label, unet_place
from fasttrace.plot import style
from fasttrace.plot.bars import draw_ranked
from fasttrace.plot.text import draw_text, rows_shown
from fasttrace.plot.unet import draw_profile, draw_sites, draw_steps
from tests.synthetic import row, text_effects, text_sites, unet_effects, unet_sites


def panels(fig):
    """Axes that show data, without colour scales."""
    return [axis for axis in fig.axes if axis.get_label() != "<colorbar>"]


def test_text_heatmap_has_a_panel_a_kind_with_tokens_down_and_layers_across():
    fig = style.figure(10, 4)
    draw_text(fig, text_effects(length=12))
    axes = panels(fig)
    assert [axis.get_title() for axis in axes] == ["whole layer", "MLP", "self-attention"]
    labels = [tick.get_text() for tick in axes[0].get_yticklabels()]
    assert labels == ["[start]", "a", "red", "apple ★", "in", "flat", "style", "[end]", "padding (mean of 4)"]
    top, bottom = axes[0].get_ylim()[::-1]
    assert top < bottom  # the first token stands at the top
    assert all(axis.images[0].get_array().shape == (9, 3) for axis in axes)


def test_text_heatmap_is_scaled_from_corrupted_to_clean_and_shows_scores():
    fig = style.figure(10, 4)
    draw_text(fig, text_effects())
    attention = panels(fig)[2].images[0]
    assert (attention.norm.vmin, attention.norm.vmax) == (20.0, 30.0)
    assert attention.get_array()[3, 0] == pytest.approx(27.0)  # corrupted 20, and 7 brought back
    ends = [tick.get_text() for tick in fig.axes[-1].get_xticklabels()]
    assert ends == ["corrupted\n20.0", "clean\n30.0"]


def test_several_prompts_are_shown_by_token_role():
    fig = style.figure(10, 4)
    effects = text_effects(prompts=3)
    draw_text(fig, effects)
    labels = [tick.get_text() for tick in panels(fig)[0].get_yticklabels()]
    assert labels == ["bos", "before", "subject last ★", "after", "eos", "pad"]
    assert rows_shown(effects) == 6


def test_noising_is_shown_from_the_clean_end():
    table = text_effects().table.assign(base="clean", source="corrupted")
    table = table.assign(indirect_effect=-table["indirect_effect"])
    fig = style.figure(10, 4)
    draw_text(fig, Effects(table, {}))
    assert panels(fig)[2].images[0].get_array()[3, 0] == pytest.approx(23.0)


def noising(effects):
    table = effects.table.assign(base="clean", source="corrupted")
    return Effects(table.assign(indirect_effect=-table["indirect_effect"]), {})


def test_noising_of_unet_sites_reaches_from_clean_to_corrupted():
    effects = noising(unet_effects())
    fig = style.figure(10, 6)
    draw_sites(fig, effects)
    (label,) = [text.get_text() for text in panels(fig)[0].texts if "total effect" in text.get_text()]
    assert label == "corrupted: total effect 10.0"
    dashed = [line for line in panels(fig)[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [-10.0]
    assert fig.get_supylabel() == "average indirect effect: patched − clean score"


def test_noising_by_steps_is_darker_nearer_to_clean():
    effects = noising(unet_effects(steps=[(0, 10), (10, 20)]))
    fig = style.figure(12, 5)
    draw_steps(fig, effects)
    image = panels(fig)[0].images[0]
    effect = effects.where(site=unet_sites()[0].name, step_start=0).aie()["aie"].iloc[0]
    assert effect < 0
    assert image.get_array()[0, 0] == pytest.approx(10 + effect)
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 10.0)


def test_bars_of_noising_begin_with_the_site_that_is_needed_most():
    effects = noising(unet_effects())
    fig = style.figure(11, 6)
    draw_ranked(fig, effects)
    (axis,) = panels(fig)
    assert axis.get_yticklabels()[0].get_text() == effects.aie().sort_values("aie")["site"].iloc[0]
    assert [text.get_text() for text in axis.texts] == ["corrupted"]
    assert axis.texts[0].xy[0] == pytest.approx(-10.0)
    assert axis.get_xlabel() == "average indirect effect: patched − clean score"


def test_unet_sites_stand_in_network_order_with_their_effects():
    effects = unet_effects()
    fig = style.figure(10, 6)
    draw_sites(fig, effects)
    order = [site.name for site in unet_sites()]
    aie = effects.aie().set_index("site")["aie"]
    bars = {}
    for axis in panels(fig):
        bars |= {
            round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axis.patches if bar.get_width() < 1
        }
    assert [bars[place] for place in range(len(order))] == pytest.approx([aie[name] for name in order])


def test_step_grid_has_a_cell_for_each_site_and_window():
    windows = [(0, 5), (5, 10), (10, 20)]
    effects = unet_effects(steps=windows)
    fig = style.figure(12, 5)
    draw_steps(fig, effects)
    resnets = panels(fig)[0]
    assert resnets.images[0].get_array().shape == (8, 3)
    assert [tick.get_text() for tick in resnets.get_xticklabels()] == ["0–4", "5–9", "10–19"]
    cell = effects.where(site=unet_sites()[0].name, step_start=5).aie()["aie"].iloc[0]
    assert resnets.images[0].get_array()[0, 1] == pytest.approx(cell)


TABLES = {
    "text": lambda: text_effects(prompts=2),
    "unet": unet_effects,
    "steps": lambda: unet_effects(steps=[(0, 10), (10, 20)]),
    "both": lambda: Effects(
        pd.concat([text_effects().table, unet_effects(1, 1).table.assign(prompt_id="p00")], ignore_index=True), {}
    ),
    "sets": lambda: Effects(
        pd.DataFrame(
            [
                row(
                    0,
                    0,
                    unet_sites()[0],
                    2.0,
                    site="unet.mid* + text_encoder*",
                    part="text_encoder+unet",
                    kind="mlp+resnet",
                ),
                row(0, 0, text_sites()[0], 1.0, token_role="subject", position=None),
            ]
        ),
        {},
    ),
}


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        *((plot.heatmap, table) for table in TABLES),
        *((draw, table) for draw in (plot.profile, plot.ranked) for table in ("text", "unet")),
    ],
)
def test_every_table_gets_every_figure(table, draw, tmp_path):
    path = draw(TABLES[table](), tmp_path / "new" / "figure.png")
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape[1] > 900
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_heads_are_a_line_of_the_profile_and_bars_of_the_heatmap(tmp_path):
    table = text_effects().table
    heads = table[table["kind"] == "self_attn"].assign(kind="head", site=table["site"] + ".heads.0")
    fig = style.figure(10, 4)
    draw_profile(fig, Effects(pd.concat([table, heads], ignore_index=True), {}))
    (axis,) = panels(fig)
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert lines["head"] == pytest.approx(lines["self-attention"])
    assert plot.heatmap(Effects(heads, {}), tmp_path / "heads.png").exists()


@pytest.mark.parametrize("prompt", ["$100 bill beside $5", r"$\frac{1$ apple", "100% $x_1$"])
def test_dollars_of_a_prompt_are_no_mathematics(prompt, tmp_path, monkeypatch):
    from matplotlib.mathtext import MathTextParser

    monkeypatch.setattr(MathTextParser, "parse", lambda *args, **kwargs: pytest.fail("read as mathematics"))
    effects = text_effects()
    table = effects.table.assign(prompt=prompt, subject="$a$", token="$b$")
    assert plot.heatmap(Effects(table, {}), tmp_path / "a.png").is_file()
    assert plot.ranked(Effects(table, {}), tmp_path / "b.svg").is_file()
    cell = [(prompt, [plot.Picture(np.zeros((8, 8, 3), np.uint8), prompt)])]
    assert plot.picture_grid(cell, tmp_path / "c.png", title=prompt).is_file()


def test_titles_and_legends_stay_within_the_figure_and_beside_the_data():
    fig = style.figure(9, 4.6)
    draw_ranked(fig, unet_effects())
    style.heading(fig, "Where a site matters, by depth: " + 30 * "a red apple ", "")
    fig.canvas.draw()
    assert fig._suptitle.get_window_extent().x1 <= fig.bbox.x1
    (axis,) = panels(fig)
    assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1


def test_settings_of_matplotlib_stay_as_they_are(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    unet_effects(1, 1).heatmap(tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_a_figure_that_fails_leaves_no_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        unet_effects(1, 1).heatmap(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_of_mixed_meaning_is_refused(tmp_path):
    table = unet_effects(1, 1).table
    mixed = Effects(pd.concat([table, table.assign(base="clean")], ignore_index=True), {})
    with pytest.raises(StudyError, match=r"effects\.where\(base=\.\.\.\)"):
        mixed.heatmap(tmp_path / "a.png")


def test_picture_grid_writes_rows_of_different_length(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    rows = [
        ("a", [plot.Picture(image, "clean", 1.0), plot.Picture(image, "corrupted")]),
        ("b", [plot.Picture(image, "x")]),
    ]
    assert plot.picture_grid(rows, tmp_path / "grid.png", title="t").is_file()
    with pytest.raises(StudyError, match="at least one picture"):
        plot.picture_grid([], tmp_path / "none.png", title="t")


def test_wording():
    assert [number(v) for v in (0.0, 0.034, 0.5, -12.34, 431.2)] == ["0.00", "0.034", "0.50", "-12.3", "431"]
    assert (counted(1, "seed"), counted(2, "seed")) == ("1 seed", "2 seeds")
    assert unet_place("unet.mid_block.resnets.1") == "mid / 1"
    assert unet_place("unet.up_blocks.0.attentions.2.transformer_blocks.3.attn1") == "up 0 / 2.3"
    assert site_label("text_encoder.encoder.layers.3.mlp", "mlp", 3, "subject_last") == "MLP\nlayer 3, subject last"
