"""Figures: the same bytes each time, the right panels, and colours that a colour-blind reader tells apart."""

import itertools
import types
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from dori_utils import plots

CHROMIUM = Path("/usr/bin/chromium")

# Machado, Oliveira, Fernandes (2009), severity 1.0: what becomes of linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.fixture(autouse=True)
def _figures_in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DORI_FIGURES", str(tmp_path / "figures"))
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def _squares(*row_lengths):
    return [[Image.new("RGB", (8, 8), (40 * i, 30 * j, 90)) for j in range(n)] for i, n in enumerate(row_lengths)]


def _seen_by(color, vision):
    """The CIELAB coordinates (3,) of the colour as seen with that vision."""
    srgb = np.array(to_rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    red, green, blue = np.clip(VISION[vision] @ linear, 0, 1)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def _smallest_distance(colors, vision):
    return min(np.linalg.norm(_seen_by(a, vision) - _seen_by(b, vision)) for a, b in itertools.combinations(colors, 2))


def test_drawing_a_figure_twice_gives_the_same_bytes(tmp_path):
    files = []
    for last_bits in (0.0, 1e-12):  # by which a rerun on another machine differs
        table = pd.DataFrame({"steps": [0, 10], "SSCD": [0.1, 2 / 3 + last_bits]})
        fig, ax = plt.subplots()
        ax.plot(table["steps"], table["SSCD"])
        plots.save_figure(fig, table, "curve")
        files.append([(tmp_path / "figures" / name).read_bytes() for name in ("curve.png", "curve.csv")])

    assert files[0] == files[1]
    assert files[0][1] == b"steps,SSCD\n0,0.1\n10,0.666667\n"


@pytest.fixture
def shown(monkeypatch):
    """What a notebook's cell shows, by hand."""
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=True))
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def test_a_notebook_shows_the_saved_picture_once_and_no_path(tmp_path, shown):
    fig, _ = plt.subplots(figsize=(3, 2), dpi=100)
    assert plots.save_figure(fig, pd.DataFrame({"a": [1]}), "shown") is None
    path = tmp_path / "figures" / "shown.png"
    assert [picture.data for picture in shown] == [path.read_bytes()]
    assert shown[0].width == round(Image.open(path).width / 2), "the inches that it has on the page"
    assert not plt.fignum_exists(fig.number)


def test_a_grid_that_is_a_cells_last_value_is_shown_once(shown):
    fig = plots.image_grid(_squares(2))
    fig._ipython_display_()  # what IPython calls
    assert len(shown) == 1 and shown[0].data.startswith(b"\x89PNG")
    assert not plt.get_fignums(), "nothing is left for matplotlib to show at the end of the cell"


def test_a_picture_carries_no_date_and_no_version(tmp_path):
    fig, _ = plt.subplots()
    plots.save_figure(fig, pd.DataFrame({"a": [1]}), "plain")
    with Image.open(tmp_path / "figures" / "plain.png") as picture:
        assert set(picture.info) <= {"dpi"}


def test_an_index_that_means_something_is_written_with_the_numbers(tmp_path):
    fig, _ = plt.subplots()
    table = pd.DataFrame({"MR": [2 / 3]}, index=pd.Index(["NeMo"], name="mitigation"))
    plots.save_figure(fig, table, "table")
    assert (tmp_path / "figures" / "table.csv").read_text() == "mitigation,MR\nNeMo,0.666667\n"


def test_figures_go_where_git_ignores_them_unless_one_says_otherwise(tmp_path, monkeypatch):
    assert plots.figures_folder() == plots.figures_folder(plots.FIGURES) == tmp_path / "figures"
    monkeypatch.delenv("DORI_FIGURES")
    monkeypatch.chdir(tmp_path)
    assert plots.figures_folder() == plots.ROOT / "build" / "figures"
    assert plots.figures_folder(plots.FIGURES) == plots.ROOT / "figures"
    assert (plots.ROOT / "pyproject.toml").is_file()


def test_a_figure_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    fig, ax = plt.subplots()
    plots.save_figure(fig, pd.DataFrame({"a": [1]}), "kept")
    both = tmp_path / "figures" / "kept.png", tmp_path / "figures" / "kept.csv"
    before = [file.read_bytes() for file in both]

    def disk_full(self, content):
        with open(self, "wb") as half:
            half.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    ax.plot([0, 1])
    with pytest.raises(OSError, match="No space left"):
        plots.save_figure(fig, pd.DataFrame({"a": [2]}), "kept")
    assert [file.read_bytes() for file in both] == before


@pytest.mark.parametrize("name", ["sub/roc", "roc.png", "../roc", ""])
def test_a_name_with_a_folder_or_an_ending_is_refused(name):
    with pytest.raises(ValueError, match="no plain name"):
        plots.save_figure(plt.figure(), pd.DataFrame({"a": [1]}), name)


def test_a_figure_without_numbers_is_refused():
    with pytest.raises(ValueError, match="empty table"):
        plots.save_figure(plt.figure(), pd.DataFrame(), "roc")


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("group", [plots.KINDS, plots.MITIGATIONS], ids=["kinds", "mitigations"])
def test_colors_of_one_figure_stay_apart_for_every_kind_of_vision(group, vision):
    assert _smallest_distance(group.values(), vision) > 20  # CIELAB units; about 2 is just noticeable


@pytest.mark.parametrize("vision", VISION)
def test_no_two_meanings_share_a_color(vision):
    tints = [plots.mitigation_color(name, dori=False) for name in plots.MITIGATIONS]
    assert _smallest_distance(plots.PALETTE.values(), vision) > 12
    assert _smallest_distance([*plots.MITIGATIONS.values(), *tints], vision) > 10


def test_dori_has_the_full_color_and_the_prompts_alone_a_lighter_one_of_the_same_hue():
    for name, color in plots.MITIGATIONS.items():
        assert plots.mitigation_color(name, dori=True) == color
        full, tint = np.array(to_rgb(color)), np.array(to_rgb(plots.mitigation_color(name, dori=False)))
        assert (tint >= full).all() and tint.sum() > full.sum()
        np.testing.assert_allclose(1 - tint, 0.45 * (1 - full), atol=0.01)  # on the line to white


def test_a_grid_shows_each_image_in_its_place_under_its_label():
    rows = _squares(3, 2)
    rows[0][1] = None
    fig = plots.image_grid(rows, row_labels=["VM", "control"], column_labels=["training image", "seed 0", "seed 1"])
    ax = fig.axes[0]
    shown = {
        (round(x, 3), round(y, 3)): image.get_array()
        for image, (x, y) in zip(ax.images, _middles(ax.images), strict=True)
    }
    xs, ys = (sorted({place[i] for place in shown}) for i in (0, 1))
    assert set(shown) == {(xs[0], ys[0]), (xs[2], ys[0]), (xs[0], ys[1]), (xs[1], ys[1])}
    np.testing.assert_array_equal(shown[xs[1], ys[1]], np.asarray(rows[1][1]))
    labels = {text.get_text(): text.get_position() for text in ax.texts}
    assert [labels[label][0] for label in ("training image", "seed 0", "seed 1")] == pytest.approx(xs, abs=1e-3)
    assert [labels[label][1] for label in ("VM", "control")] == pytest.approx(ys, abs=1e-3)


def _middles(images):
    """Middle (x, y) of each."""
    extents = np.array([image.get_extent() for image in images])
    return np.stack([extents[:, :2].mean(axis=1), extents[:, 2:].mean(axis=1)], axis=1)


def test_borders_and_captions_tell_the_score_and_copies_stand_out():
    (ax,) = plots.image_grid(_squares(4), scores=[[None, 0.2, 0.9, float("nan")]]).axes
    different, copy = ax.patches

    assert [text.get_text() for text in ax.texts] == ["", "0.20", "0.90", ""]
    middles = [border.get_x() + border.get_width() / 2 for border in ax.patches]
    assert middles == pytest.approx(_middles(ax.images)[1:3, 0])
    assert copy.get_linewidth() > different.get_linewidth()
    assert copy.get_edgecolor() == plots.SCORES(0.9)


def test_captions_replace_scores_under_the_images():
    (ax,) = plots.image_grid(_squares(2), captions=[["before", "after"]], scores=[[0.9, 0.1]]).axes
    assert [text.get_text() for text in ax.texts] == ["before", "after"]


def test_an_image_keeps_its_shape_and_stands_upright():
    picture = Image.new("RGB", (20, 10))
    picture.paste("white", (0, 0, 20, 5))  # its upper half
    fig = plots.image_grid([[picture]], width=1)
    fig.canvas.draw()
    left, right, bottom, top = fig.axes[0].images[0].get_extent()
    assert right - left == pytest.approx(2 * abs(bottom - top))
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., 0]
    middle = pixels.shape[0] // 2
    assert pixels[middle - 10, pixels.shape[1] // 2] == 255 and pixels[middle + 10, pixels.shape[1] // 2] == 0


def test_a_grid_is_as_wide_as_asked_and_nothing_in_it_overlaps():
    labels = {"row_labels": ["one", "two\nlines"], "column_labels": ["a\nb", *"bcde"]}
    fig = plots.image_grid(_squares(5, 5), scores=[[0.9] * 5] * 2, width=plots.COLUMN, **labels)
    fig.canvas.draw()
    assert fig.get_size_inches()[0] == plots.COLUMN
    boxes = [artist.get_window_extent() for artist in (*fig.axes[0].images, *fig.axes[0].texts)]
    assert not any(a.shrunk(0.98, 0.98).overlaps(b) for a, b in itertools.combinations(boxes, 2))
    page = fig.bbox.padded(1)
    assert all(page.contains(*box.min) and page.contains(*box.max) for box in boxes)


@pytest.mark.parametrize(
    "wrong", [{"row_labels": ["a"]}, {"column_labels": ["a"]}, {"captions": [["a"], ["b"]]}, {"scores": [[0.1, 0.2]]}]
)
def test_labels_that_do_not_fit_the_images_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plots.image_grid(_squares(2, 2), **wrong)


def test_bars_carry_their_intervals():
    _, ax = plt.subplots()
    plots.interval_bars(ax, ["NeMo", "Wanda"], [0.2, 0.7], [(0.1, 0.4), (0.6, 0.9)], ["#000000", "#ffffff"])
    (errors,) = (c for c in ax.containers if hasattr(c, "has_yerr"))
    segments = [segment[:, 1] for segment in errors.lines[2][0].get_segments()]
    np.testing.assert_allclose(segments, [(0.1, 0.4), (0.6, 0.9)])
    assert [bar.get_height() for bar in ax.patches] == [0.2, 0.7]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["NeMo", "Wanda"]


def test_a_bar_that_rounds_to_nothing_has_no_sign():
    _, ax = plt.subplots()
    plots.interval_bars(ax, ["a", "b"], [-0.004, -0.02], [(-0.01, 0), (-0.03, 0)], ["#000000"] * 2)
    assert [text.get_text() for text in ax.texts] == ["0.00", "-0.02"]


def test_the_papers_marks_are_whole_at_zero():
    rows = [
        {"kind": kind, "attack": attack, "mitigation": "NeMo", "sscd": 0.5, "rate": 0.0}
        | {"sscd_low": 0.4, "sscd_high": 0.6, "low": 0.0, "high": 0.3}
        for kind, attack in (("VM", "none"), ("VM", "DoRI"), ("control", "DoRI"))
    ]
    _, axes = plt.subplots(1, 2)
    plots.attack_bars(axes, pd.DataFrame(rows), {"NeMo": "#000000"}, {"NeMo": (0.4, 0.0)})
    (marks,) = axes[1].collections[-1:]
    assert marks.get_offsets()[0, 1] == 0 and not marks.get_clip_on()


def test_a_curve_lies_in_its_band():
    _, ax = plt.subplots()
    plots.curve_with_interval(ax, [0, 1], [0.4, 0.5], [0.3, 0.4], [0.6, 0.7], color=plots.PALETTE["NeMo"], label="NeMo")
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.3, 0.7))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.4, 0.5])


def test_a_detector_that_separates_a_kind_has_a_curve_through_the_corner():
    _, ax = plt.subplots()
    plots.roc_curves(ax, {"VM": [3, 4], "once": [0, 1], "control": [1, 0]}, labels={"VM": "VM 1.00"})
    vm, once, chance = ax.lines
    assert (0, 1) in set(zip(*vm.get_data(), strict=True))
    np.testing.assert_array_equal(once.get_xdata(), once.get_ydata())  # the same scores as the controls: the diagonal
    assert vm.get_color() == plots.PALETTE["VM"] and once.get_color() == plots.PALETTE["once"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["VM 1.00", "once"]


def test_a_map_of_regions_has_its_numbers_where_the_regions_are():
    _, ax = plt.subplots()
    similarity = np.arange(9).reshape(3, 3) / 10
    plots.region_map(ax, Image.new("RGB", (64, 40)), similarity)
    assert [text.get_text() for text in ax.texts] == [f"{value:.2f}" for value in similarity.flat]
    assert ax.texts[0].get_position() == (16, 10) and ax.texts[5].get_position() == (48, 20)
    assert [text.get_color() for text in ax.texts[5:8]] == ["white", "white", "black"]
    np.testing.assert_allclose(ax.collections[0].get_array(), similarity.ravel())


def test_layers_have_short_labels():
    layer = "attentions.0.transformer_blocks.0.attn2.to_v"
    assert plots.layer_label(f"down_blocks.1.{layer}") == "down 1.0"
    assert plots.layer_label(f"up_blocks.3.{layer.replace('s.0', 's.2', 1)}.weight") == "up 3.2"
    assert plots.layer_label(f"mid_block.{layer}") == "mid"


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs Chromium at {CHROMIUM}")
def test_an_interactive_map_shows_the_image_under_the_mouse_without_a_network(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    points = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])  # the first is in the middle
    page_html = plots.interactive_map(points, plots.IMAGES[:3], ["first", "second", "third"], _squares(3)[0]).data
    (tmp_path / "map.html").write_text(page_html)
    with playwright.sync_playwright() as browsers:
        patient = {"timeout": 600_000}  # milliseconds: nothing takes so long, unless something is broken
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=arguments, **patient)
        page = browser.new_page()
        page.set_default_timeout(patient["timeout"])
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{tmp_path}/map.html")
        frame = page.frame_locator("iframe")
        frame.locator(".bk-Canvas").wait_for()
        page.frames[1].wait_for_function("window.Bokeh?.documents[0]?.is_idle")
        box = frame.locator(".bk-CartesianFrame, .bk-Canvas").first.bounding_box()
        tooltip = frame.get_by_text("first")
        rests = [rest for rest in (20, 100, 500, 2_500) for _ in range(40)]  # milliseconds, more if the machine is busy
        for step, rest in enumerate(rests):  # the toolbar moves the middle down a little
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - 40 + 2 * (step % 40))
            page.wait_for_timeout(rest)
            if tooltip.count() and tooltip.is_visible():
                break
        tooltip.wait_for()
        loaded = frame.locator("img").first.evaluate("image => image.naturalWidth")
        browser.close()
    assert loaded == 8 and not [url for url in requests if url.startswith("http")]


ATTACKED = [("VM", "none"), ("VM", "DoRI"), ("control", "DoRI")]


def test_attack_bars_are_the_summary_s_numbers_with_marks_where_the_paper_has_some():
    keys = [(name, kind, attack) for name in ("NeMo", "ESD") for kind, attack in ATTACKED]
    summary = pd.DataFrame(keys, columns=["mitigation", "kind", "attack"])
    for number, column in enumerate(["sscd", "sscd_low", "sscd_high", "rate", "low", "high"]):
        summary[column] = np.linspace(0.2, 0.7, len(keys)) + 0.01 * number
    fig, axes = plt.subplots(1, 2)
    plots.attack_bars(axes, summary, {name: plots.PALETTE[name] for name in ("ESD", "NeMo")}, {"NeMo": (0.91, 0.99)})
    for ax, column, published in zip(axes, ("sscd", "rate"), (0.91, 0.99), strict=True):
        values = summary.set_index(["kind", "attack", "mitigation"])[column]
        wanted = [values[kind, attack, name] for kind, attack in ATTACKED for name in ("ESD", "NeMo")]
        assert np.allclose([bar.get_height() for bar in ax.patches], wanted)
        assert [text.get_text() for text in ax.get_xticklabels()] == ["ESD", "NeMo"]
        marks = ax.collections[-1].get_offsets()
        assert np.ma.allclose(marks[1], (1, published)) and np.isnan(np.ma.getdata(marks)[0, 1])
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["prompts", "DoRI", "control + DoRI", "paper, with DoRI"]
