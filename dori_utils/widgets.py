"""Widgets: watch DoRI at work, in JupyterLab.

Choose a target, what was done to the weights, where the attack starts; then see the loss fall and, every few steps, the
picture that the embedding gives by then, with its SSCD to the training image. `attack_widget` is what one sees.
`LiveAttack` is what it looks at: one attack in a thread of its own, so that the kernel runs other cells meanwhile.

`attack` calls back while the edit is applied to the weights, and a single case runs under a plain `applied`. So a
generation within the callback is one under the edit, and the attack goes on as if nobody had looked. The U-Net that it
edits is a copy of its own: other cells find the pipeline as it is.
"""

import copy
import html
import io
import threading
import time
from dataclasses import replace

import ipywidgets
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from dori_utils.attack import AttackConfig, attack
from dori_utils.core.edits_by_row import encode_by_row
from dori_utils.core.generation import generate
from dori_utils.core.hashes import known
from dori_utils.core.sscd import load_sscd, sscd_scores
from dori_utils.evaluation import edit_of_each
from dori_utils.plots import COPY, MITIGATIONS, SCORES, lighter

SIDE = 168  # of a picture on the screen, in pixels
REDRAW = 0.5  # seconds between two drawings of the curves, at least
STARTS = {"the target's prompt": "prompt", "noise": "noise", "another prompt": "other"}


class LiveAttack:
    """One attack at a time in a background thread, and how far it is; no widgets in it.

    It works on a copy of the U-Net, and of what else the edit changes, made at each start and let go at the end, so
    that the pipeline is free for other cells meanwhile, and never has the edit in its weights. A U-Net of Stable
    Diffusion 1.x is 1.7 GB more in float16.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        preset: a `Preset`, for sampling, the pictures' seed (its first) and SSCD's transform.
        sscd: an `SSCD`; default: `load_sscd()`.
        every: steps between two pictures; there is one of the start and of the end as well.
        on_update: called with the `LiveAttack` in its thread: at the beginning, after each picture or step, at the end.

    Attributes:
        running: whether it is at work.
        stopping: whether it is, and `stop` has been called.
        target: the `Target` under attack, or the last one.
        steps, step, losses: steps to make, steps made, and the loss before each of them.
        start_image, image: PIL images of step 0, so without an attack, and of the latest one that was generated.
        sscds: step → SSCD of its picture to the target's image.
        triggers: what `attack` returned; None before the end.
        error: the exception that ended it, or None.
    """

    def __init__(self, pipe, preset, sscd=None, *, every=5, on_update=lambda live: None):
        self.pipe, self.preset, self.sscd, self.every = pipe, preset, sscd or load_sscd(), every
        self._on_update = on_update
        self._enough = threading.Event()
        self._thread = self._copy = None
        self.running = False
        self._forget(None, 0)

    @property
    def image_sscd(self):
        """SSCD of `image`; None while there is none."""
        return next(reversed(self.sscds.values()), None)

    @property
    def stopping(self):
        return self.running and self._enough.is_set()

    def start(self, target, edit=None, config=None, prompt=None):
        """Begin, and return at once.

        Args:
            target: the `Target` to attack.
            edit: the `Edit` under which it is attacked, or None.
            config: an `AttackConfig` without restarts.
            prompt: a text whose embedding the attack starts from, instead of `config.start`.

        Raises:
            RuntimeError: one is running.
            ValueError: a config with restarts.
        """
        config = config or AttackConfig()
        if self.running:
            raise RuntimeError("An attack is running: stop it first, or wait until it ends.")
        if config.restarts != 1:
            raise ValueError(f"restarts is {config.restarts}: a live attack is a single one.")
        self.wait()
        self._forget(target, config.steps)
        self._copy = _copy_to_edit(self.pipe, edit)
        self.running = True
        self._thread = threading.Thread(target=self._run, args=(target, edit, config, prompt), daemon=True)
        self._thread.start()

    def stop(self):
        """End it after the step that it is at; what was found until then is kept."""
        self._enough.set()

    def wait(self):
        """Return when it has ended."""
        if self._thread is not None:
            self._thread.join()

    def _forget(self, target, steps):
        self._enough.clear()
        self.target, self.steps, self.step, self.losses, self.sscds = target, steps, 0, [], {}
        self.start_image = self.image = self.triggers = self.error = None

    def _run(self, *case):
        try:
            self._on_update(self)
            with known(self._copy):
                self._attack(*case)
        except Exception as error:  # a thread has nobody to raise it to
            self.error = error
        self._copy = None
        self.running = False
        self._on_update(self)

    def _attack(self, target, edit, config, prompt):
        starts = None if prompt is None else encode_by_row(self._copy, [prompt], [edit])
        settings = {"edits": edit, "starts": starts, "progress": False}
        before = attack(self._copy, [target], replace(config, steps=0, record=()), **settings)
        self._generate(before.prompt_embeds, [edit])
        self.start_image = self.image
        self._on_update(self)
        self.triggers = attack(
            self._copy,
            [target],
            config,
            stop=lambda *_: [self._enough.is_set()],
            callback=self._after_step,
            **settings,
        )
        if self.triggers.cases[0]["stopped"] == "diverged":
            raise FloatingPointError(
                f"The loss is no longer a number at step {self.step}: try a smaller learning rate."
            )
        if self.step not in self.sscds:
            self._generate(self.triggers.prompt_embeds, [edit])

    def _after_step(self, about):
        self.step = about["step"]
        self.losses.append(about["losses"].item())
        if self.step % self.every == 0:
            self._generate(about["prompt_embeds"])  # without edits: the attack has applied its own
        self._on_update(self)

    def _generate(self, embeds, edits=None):
        """The picture of an embedding (1, T, D), and its SSCD."""
        settings = dict(seeds=self.preset.seeds[:1], **self.preset.sampling, progress=False)
        images = generate(self._copy, prompt_embeds=embeds, edits=edits, **settings)
        settings = dict(transform=self.preset.sscd_transform, sscd=self.sscd, progress=False)
        self.image = images[0][0]
        self.sscds[self.step] = sscd_scores(images, [self.target.image], **settings).item()


def _copy_to_edit(pipe, edit):
    """The same pipeline but for a U-Net and a tokenizer of its own, and whatever else the edit changes.

    A fast tokenizer is not for two threads at once.
    """
    own = copy.copy(pipe)
    for part in {"unet", "tokenizer", *(edit.parts if edit else ())}:
        setattr(own, part, copy.deepcopy(getattr(pipe, part)))
    return own


def attack_widget(pipe, targets, edits, preset, sscd=None):
    """The widget: choose, press Start, watch.

    The kernel stays free for other cells meanwhile, and so does the pipeline: the attack edits a copy of its U-Net.
    What went wrong is said in the widget.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: list of `Target`s to choose from.
        edits: mitigation's name → None, an `Edit`, or a list with one for each target, as `audit` takes them.
        preset: a `Preset`; its `attack` is what steps and learning rate begin with.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        An ipywidgets container. Its `live` is the `LiveAttack`; after the end `live.triggers` are the `Triggers` found,
        to save, or to generate from, with the preset's sampling as here:
        `generate(pipe, prompt_embeds=widget.live.triggers.prompt_embeds, **preset.sampling)`.

    Raises:
        ValueError: a list of edits that is not as long as the targets.
    """
    return _AttackWidget(pipe, targets, edits, preset, sscd)


class _AttackWidget(ipywidgets.VBox):
    def __init__(self, pipe, targets, edits, preset, sscd):
        self._preset, self._drawing = preset, threading.Lock()  # two threads draw: the attack's, and who clicks
        self.edits = {name: edit_of_each(edit, targets, name=name) for name, edit in edits.items()}
        self._make_controls(targets, preset.attack)
        self._make_pictures()
        self.live = LiveAttack(pipe, preset, sscd, on_update=self._show)
        self._show_target()
        self._show_prompt()
        buttons = ipywidgets.HBox([self.start_button, self.stop_button], layout={"margin": "6px 0"})
        left = ipywidgets.VBox([*self._choices, buttons, self.progress, self.status], layout={"width": "310px"})
        pictures = ipywidgets.HBox([ipywidgets.VBox(pair) for pair in self.pictures])
        right = ipywidgets.VBox([pictures, self.curves], layout={"margin": "0 0 0 24px"})
        super().__init__([ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap"})])

    def _make_controls(self, targets, config):
        about = {"style": {"description_width": "95px"}, "layout": {"width": "300px"}}
        names = [(f"{target.id}: {target.prompt}", target) for target in targets]
        self.target = ipywidgets.Dropdown(options=names, description="target", **about)
        self.mitigation = ipywidgets.Dropdown(options=list(self.edits), description="mitigation", **about)
        self.start = ipywidgets.Dropdown(options=STARTS, value=config.start, description="start", **about)
        self.prompt = ipywidgets.Text(placeholder="a caption to start from", description="its words", **about)
        self.steps = ipywidgets.BoundedIntText(config.steps, min=1, max=10_000, description="steps", **about)
        self.lr = ipywidgets.FloatLogSlider(config.lr, min=-3, max=1, step=0.1, description="learning rate", **about)
        self._choices = [self.target, self.mitigation, self.start, self.prompt, self.steps, self.lr]
        half = {"width": "143px"}
        self.start_button = ipywidgets.Button(description="Start", icon="play", button_style="primary", layout=half)
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", layout=half, disabled=True)
        self.progress = ipywidgets.IntProgress(max=config.steps, layout={"width": "300px"})
        self.status = ipywidgets.HTML()
        self.target.observe(self._show_target, "value")
        self.start.observe(self._show_prompt, "value")
        self.start_button.on_click(self._start)
        self.stop_button.on_click(self._stop)

    def _make_pictures(self):
        """Training image, step 0 and now: each a picture and the text under it; and the curves."""
        sides = {"width": f"{SIDE}px", "height": f"{SIDE}px", "margin": "2px 6px 0 2px"}
        self.pictures = [(ipywidgets.Image(value=_png(None), layout=sides), ipywidgets.HTML()) for _ in range(3)]
        self.curves = ipywidgets.Image(layout={"width": f"{3 * SIDE + 24}px"})
        self._shown, self._drawn, self._color = None, -REDRAW, MITIGATIONS["original"]

    def _start(self, _):
        if self.live.running:  # a second click, before the button could be disabled
            return
        start = self.start.value
        own = dict(batch_size=self._preset.attack.batch_size, seed=self._preset.attack.seed)
        config = AttackConfig(self.steps.value, self.lr.value, start="noise" if start == "noise" else "prompt", **own)
        edits = self.edits[self.mitigation.value]
        edit = None if edits is None else edits[self.target.index]
        self.progress.max = config.steps
        self._color = MITIGATIONS.get(self.mitigation.value, MITIGATIONS["original"])
        self.progress.style.bar_color = self._color
        self.live.start(self.target.value, edit, config, self.prompt.value if start == "other" else None)

    def _stop(self, _):
        self.live.stop()
        self._show(self.live)

    def _show_target(self, _=None):
        """The image of the chosen target, and nothing of the one before."""
        target = self.target.value
        title = "never seen in training" if target.kind == "control" else "training image"
        self._show_picture(0, target.image, title, "none is known" if target.image is None else target.kind)
        self._show_picture(1, None, "before the attack", "")
        self._show_picture(2, None, "the attack", "")
        self.progress.value, self.status.value = 0, READY
        self.curves.value = _curves([], {}, self.steps.value, self._color)

    def _show_prompt(self, _=None):
        self.prompt.layout.display = None if self.start.value == "other" else "none"

    def _show(self, live):
        """All that changes while it runs; called in its thread, and in that of who stops it."""
        with self._drawing:
            self._draw(live)

    def _draw(self, live):
        for control in (*self._choices, self.start_button):
            control.disabled = live.running
        self.stop_button.disabled = not live.running or live.stopping
        self.progress.value = live.step
        self.status.value = _status(live)
        pictured = live.image is not self._shown
        if pictured:
            self._show_generations(live)
        if pictured or not live.running or time.monotonic() - self._drawn > REDRAW:
            self.curves.value = _curves(live.losses, live.sscds, self.progress.max, self._color)
            self._drawn = time.monotonic()

    def _show_generations(self, live):
        self._shown = live.image
        self._show_picture(1, live.start_image, "before the attack", live.sscds.get(0))
        title = f"after step {max(live.sscds)}" if live.sscds else "the attack"
        self._show_picture(2, live.image, title, live.image_sscd)

    def _show_picture(self, place, image, title, words):
        """An image, or an empty place; `words` are a text, or an SSCD that colours the border as in `image_grid`."""
        picture, caption = self.pictures[place]
        picture.value = _png(image)
        border = "#FFFFFF"
        if isinstance(words, float):
            border, words = to_hex(SCORES(words)), f"SSCD {words:.2f}" + (", a copy" if words > COPY else "")
        picture.layout.border = f"3px solid {border}"
        caption.value = _lines(f"<b>{title}</b>", html.escape(words or ""))


def _status(live):
    if live.error is not None:
        words = html.escape(str(live.error) or type(live.error).__name__)
        return _lines("<b>It ended with an error</b>", words, color="#B00020")
    if live.stopping:
        return _lines(f"<b>Step {live.step} of {live.steps}</b>", "stops after this step, and draws what it has found")
    if live.running:
        loss = f"loss {live.losses[-1]:.3f}" if live.losses else "generates from the start"
        return _lines(f"<b>Step {live.step} of {live.steps}</b>", loss)
    if live.triggers is None:
        return READY
    early = live.triggers.cases[0]["stopped"] == "early"
    return _lines(
        f"<b>{'Stopped' if early else 'Done'} after step {live.step}</b>", "what it found: the widget's live.triggers"
    )


def _lines(first, second, color="inherit"):
    return f'<div style="line-height: 1.4; color: {color}">{first}<br>{second}</div>'


READY = _lines("<b>Ready</b>", "")


def _png(image):
    """A PIL image, or None for an empty place, as a square PNG: small ones with their pixels visible."""
    if image is None:
        image = Image.new("RGB", (1, 1), "#F2F2F2")
    method = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    ImageOps.pad(image.convert("RGB"), (SIDE * 2, SIDE * 2), method, color="#F2F2F2").save(buffer, "png")
    return buffer.getvalue()


def _curves(losses, sscds, steps, color):
    """PNG of two curves over the steps: the loss (thin, and the mean of the last ten) and the pictures' SSCD.

    A `Figure` of its own, not pyplot's: those belong to the main thread.
    """
    figure = Figure(figsize=(5.28, 2.0), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, color=lighter(color), linewidth=0.8)
    left.plot(pd.Series(losses, dtype=float).rolling(10, min_periods=1).mean(), color=color, linewidth=1.6)
    left.set_ylim(bottom=0)
    if not losses:
        left.set_yticks([])
    if sscds:  # no points, and not clipped, are infinitely large for the layout
        right.plot(sscds.keys(), sscds.values(), color=color, linewidth=1.6, marker="o", markersize=3, clip_on=False)
    right.axhline(COPY, color="#888888", linewidth=0.8, linestyle="--")
    right.text(steps, COPY + 0.02, "a copy above this", ha="right", va="bottom", fontsize=7, color="#666666")
    right.set_ylim(-0.1, 1.05)
    for axes, title in ((left, "loss"), (right, "SSCD to the target's image")):
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, steps)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
