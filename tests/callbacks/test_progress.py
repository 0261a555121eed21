"""What the progress bar says while a measurement takes long, in whole fits and with a clock of the test's."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.fit import fit, mini_batches
from helpers.modules import Classification, Regression
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_dynamics import (
    DisplacementMonitor,
    HessianMonitor,
    NeuralCollapseMonitor,
    Probe,
    StochasticSharpnessMonitor,
)
from lightning_dynamics.callbacks import session
from lightning_dynamics.callbacks.progress import Progress

WHOLE = Probe(whole=True)


class Clock:
    """Goes on by so many seconds at every look."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(session, "Progress", partial(Progress, clock=Clock(0.7)))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(session, "Progress", partial(Progress, clock=Clock(1e-4)))


class Watched(TQDMProgressBar):
    """Writes to a stream of its own, and notes each description that is set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.stream = io.StringIO()
        self.set = []

    def init_train_tqdm(self):
        before, sys.stdout = sys.stdout, self.stream
        try:
            bar = super().init_train_tqdm()
        finally:
            sys.stdout = before
        original = bar.set_description_str

        def note(desc=None, refresh=True):
            self.set.append(desc)
            original(desc, refresh)

        bar.set_description_str = note
        return bar

    @property
    def frames(self):
        return self.stream.getvalue().split("\r")


def watched(monitors, module=None, data=None, bar=None, **options):
    bar = Watched() if bar is None else bar
    trainer = fit([*monitors, bar], module, data, **{"max_epochs": 2, **options, "enable_progress_bar": True})
    return bar, trainer


def monitor(**options):
    return HessianMonitor(**{"every_n_train_steps": 1, "spectrum": False, "probe": WHOLE, "pair": False, **options})


def test_a_long_measurement_says_what_it_is_and_takes_it_back(slow):
    bar, _ = watched([monitor(name="own")])
    said = [text for text in bar.set if "HessianMonitor" in text]
    assert said[0].startswith("Epoch 0: HessianMonitor[own] (preflight), ")
    assert any(text.startswith("Epoch 0: HessianMonitor[own] at step 0, ") for text in said)
    assert any(" s, " in text and text.endswith(" evaluations: ") for text in said)
    assert any("HessianMonitor[own] at step 1" in text for text in said)
    own = [text for text in bar.set if "HessianMonitor" not in text]
    assert set(own) == {"Epoch 0: ", "Epoch 1: "}
    for text, following in zip(bar.set, [*bar.set[1:], "Epoch"], strict=True):
        same = "HessianMonitor" in text and "HessianMonitor" in following
        assert same or following.startswith("Epoch"), "after a measurement the bar shows its own description"
    assert "HessianMonitor" not in bar.set[-1]
    frames = bar.frames
    shown = [number for number, frame in enumerate(frames) if "HessianMonitor[own]" in frame]
    assert shown
    assert "HessianMonitor" not in frames[-1]
    assert "Epoch 1: 100%" in frames[-1]


def test_short_measurements_never_touch_the_bar(quick):
    bar, _ = watched([monitor(), DisplacementMonitor(every_n_train_steps=1)])
    assert bar.set == []


class Bar(TQDMProgressBar):
    """Without a display: what is written, None where it is taken back."""

    desc, disable = "", False

    def __init__(self, leads=True):
        super().__init__()
        self.texts = []
        self.of = SimpleNamespace(is_global_zero=leads, progress_bar_callback=self)

    @property
    def train_progress_bar(self):
        return self

    def set_description_str(self, text):
        self.texts.append(text.removesuffix(": ") or None)


def test_work_that_took_long_the_last_time_is_shown_at_once():
    clock, bar = Clock(0.0), Bar()
    progress = Progress(lambda: bar.of, clock)
    for _ in range(2):
        with progress.during("fits"):
            clock.now += 5.0  # without a beat
    assert bar.texts == ["fits", None]
    with progress.during("fits"):
        pass
    with progress.during("fits"):
        pass
    assert bar.texts == ["fits", None, "fits", None]


def test_what_a_kind_of_work_has_taken_is_known_of_that_kind_only():
    clock, bar = Clock(0.0), Bar()
    progress = Progress(lambda: bar.of, clock)
    with progress.during("at step 0", kind="in detail"):
        clock.now += 5.0
    with progress.during("at step 1", kind="as usual"):
        pass
    with progress.during("at step 2", kind="in detail"):
        pass
    assert bar.texts == ["at step 2", None]


def test_parts_of_the_same_work_are_called_by_their_names():
    clock, bar = Clock(0.0), Bar()
    progress = Progress(lambda: bar.of, clock)
    with progress.during("one"):
        clock.now = 3.5
        progress.beat()
        progress.now("another")
        clock.now = 4.4
        progress.beat()
        clock.now = 4.5
        progress.beat()
    progress.beat()
    progress.now("nothing")
    assert bar.texts == ["one, 4 s, 1 evaluation", "another, 4 s, 3 evaluations", None]


def test_the_text_changes_at_most_once_a_second():
    clock, bar = Clock(0.0), Bar()
    progress = Progress(lambda: bar.of, clock)
    with progress.during("work", units=("batch", "batches")):
        for _ in range(24):
            progress.beat()
            clock.now += 0.25
    assert bar.texts == ["work, 3 s, 14 batches", "work, 4 s, 18 batches", "work, 5 s, 22 batches", None]


def test_an_error_takes_the_text_back_too():
    clock, bar = Clock(0.0), Bar()
    progress = Progress(lambda: bar.of, clock)

    def interrupted():
        with progress.during("work"):
            clock.now = 4.0
            progress.beat()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert bar.texts == ["work, 4 s, 1 evaluation", None]


def test_other_ranks_show_nothing():
    clock, bar, said = Clock(0.0), Bar(leads=False), []
    progress = Progress(lambda: bar.of, clock)
    for _ in range(2):
        with progress.during("work", otherwise=said.append):
            clock.now += 5.0
            progress.beat()
    assert bar.texts == said == []


@pytest.mark.parametrize("method", ["set_description_str", "refresh"])
def test_a_bar_that_fails_costs_the_display_only(slow, method):
    class Failing(Watched):
        failures = 0

        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            original = getattr(bar, method)

            def fail(*args, **kwargs):
                if sys._getframe(1).f_globals["__name__"].startswith("lightning_dynamics") or any(
                    "HessianMonitor" in str(arg) for arg in (*args, bar.desc)
                ):
                    self.failures += 1
                    raise BrokenPipeError("the terminal is gone")
                return original(*args, **kwargs)

            setattr(bar, method, fail)
            return bar

    made, bar = monitor(), Failing()
    _, trainer = watched([made], bar=bar)
    assert trainer.global_step == 2
    assert [record.step for record in made.history] == [0, 1, 2]
    assert 1 <= bar.failures <= 2  # it is not tried again, except to take the text back


def test_nothing_is_shown_where_there_is_no_bar_or_another(slow, capsys):
    class Silent(ProgressBar):
        def disable(self):
            pass

        def enable(self):
            pass

    for bars, options in (([], {"enable_progress_bar": False}), ([Silent()], {"enable_progress_bar": True})):
        made = monitor()
        fit([made, *bars], max_epochs=2, **options)
        assert [record.step for record in made.history] == [0, 1, 2]
    disabled, _ = watched([monitor()], bar=Watched(refresh_rate=0))
    assert disabled.set == []
    printed = capsys.readouterr()
    assert "HessianMonitor at step" not in printed.out + printed.err


class Validated(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def train_dataloader(self):
        return mini_batches()

    def val_dataloader(self):
        return mini_batches()


def trained(monitors, leave=False, **options):
    """A fit with validation; its bar, its Trainer and the state of the generator afterwards."""
    torch.manual_seed(0)
    bar = Watched(leave=leave)
    settings = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    settings.update({"num_sanity_val_steps": 0, "max_epochs": 2, "accelerator": "cpu", **options})
    trainer = Trainer(callbacks=[*monitors, bar], **settings)
    trainer.fit(Validated())
    return bar, trainer, torch.get_rng_state()


@pytest.mark.parametrize("options", [{"val_check_interval": 1}, {"num_sanity_val_steps": 1}, {"leave": True}])
def test_validation_and_the_state_of_the_run_are_as_without_monitors(slow, options):
    bar, trainer, state = trained([monitor()], **options)
    bare, other, bare_state = trained([], **options)
    assert any("HessianMonitor at step 4" in text for text in bar.set)
    assert "HessianMonitor" not in bar.frames[-1]
    assert bar.train_progress_bar.desc == bare.train_progress_bar.desc == "Epoch 1: "
    assert bar.train_progress_bar.postfix == bare.train_progress_bar.postfix
    assert bar.train_progress_bar.n == bare.train_progress_bar.n
    assert trainer.progress_bar_metrics == other.progress_bar_metrics
    assert torch.equal(state, bare_state)
    assert torch.equal(trainer.lightning_module.net.weight, other.lightning_module.net.weight)


def test_features_are_told_of_too(monkeypatch):
    """They are read in few commands."""
    monkeypatch.setattr(session, "Progress", partial(Progress, clock=Clock(2.0)))
    data = torch.utils.data.TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
    bar, _ = watched(
        [NeuralCollapseMonitor(every_n_train_steps=1)],
        Classification(),
        torch.utils.data.DataLoader(data, 8, drop_last=True),
    )
    assert any("NeuralCollapseMonitor at step 1, " in text for text in bar.set)


def test_the_preflight_is_told_of(monkeypatch):
    monkeypatch.setattr(session, "Progress", partial(Progress, clock=Clock(2.0)))
    bar, _ = watched([monitor(every_n_train_steps=100)])
    assert any("HessianMonitor (preflight), " in text for text in bar.set)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (WHOLE, "HessianMonitor: reading 24 samples for the probe, "),
        (Probe(draws=4), "HessianMonitor: reading 32 samples for the probe, "),
        (Probe(dataloader=mini_batches()), "HessianMonitor: reading the loader of the probe, "),
    ],
)
def test_reading_a_large_probe_is_said_before_there_is_a_bar(monkeypatch, caplog, probe, words):
    monkeypatch.setattr(session, "Progress", partial(Progress, clock=Clock(1.2)))
    made = (StochasticSharpnessMonitor if probe.draws else HessianMonitor)(every_n_train_steps=3, probe=probe)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(made, None, mini_batches(), max_epochs=1)
    said = [record.message for record in caplog.records if "reading" in record.message]
    assert len(said) == 1
    assert said[0].startswith(words.replace("HessianMonitor", type(made).__name__))
    assert said[0].endswith(" batches")


def test_a_probe_that_is_read_quickly_is_not_spoken_of(quick, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(monitor(), max_epochs=1)
    assert "reading" not in caplog.text


class RichTask:
    id = 3
    description = "Epoch 0/1 "


class RichDisplay:
    """Stands for the display of Rich: what it is told."""

    def __init__(self):
        self.updates = []
        self.refreshed = 0

    def update(self, task, **changes):
        assert task == 3
        self.updates.append(changes)

    def refresh(self):
        self.refreshed += 1


class RichWithoutRich(RichProgressBar):
    """The callback's interface where the package is not there."""

    def __init__(self, display, task):
        self._enabled, self._refresh_rate = True, 1
        self.progress, self.task = display, task

    @property
    def train_progress_bar(self):
        assert self.task is not None
        return self.task


def trainer_with(bar):
    return SimpleNamespace(is_global_zero=True, progress_bar_callback=bar)


def test_a_rich_bar_is_told_in_its_own_language():
    clock, display = Clock(0.0), RichDisplay()
    progress = Progress(lambda: trainer_with(RichWithoutRich(display, RichTask())), clock)
    with progress.during("HessianMonitor[gn] at step 2"):
        clock.now = 4.0
        progress.beat()
    assert display.updates == [
        {"description": "Epoch 0/1: HessianMonitor\\[gn] at step 2, 4 s, 1 evaluation"},
        {"description": "Epoch 0/1 "},
    ]
    assert display.refreshed == 2


@pytest.mark.parametrize("bar", [RichWithoutRich(None, None), RichWithoutRich(RichDisplay(), None)])
def test_before_there_is_a_rich_bar_nothing_is_shown(bar):
    clock, said = Clock(0.0), []
    progress = Progress(lambda: trainer_with(bar), clock)
    with progress.during("work", otherwise=said.append):
        clock.now = 4.0
        progress.beat()
        progress.beat()
    assert said == ["work, 4 s, 1 evaluation"]


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="Rich is not installed")
def test_a_real_rich_bar_shows_the_text_and_its_own_again(slow):
    stream = io.StringIO()
    options = {"file": stream, "force_terminal": True, "width": 160, "color_system": None}
    bar = RichProgressBar(refresh_rate=1, console_kwargs=options)
    fit([monitor(name="gn"), bar], max_epochs=2, enable_progress_bar=True)
    shown = stream.getvalue()
    assert "HessianMonitor[gn] at step 1" in shown
    assert "Epoch 1/1 " in shown[shown.rindex("HessianMonitor[gn]") :]
