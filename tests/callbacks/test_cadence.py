import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_dynamics.callbacks.cadence import Cadence


def steps(cadence, until, per_epoch=10):
    return [s for s in range(until) if cadence.due(s, s // per_epoch, s % per_epoch == 0)]


def test_every_n_steps_from_the_first():
    assert steps(Cadence(every_n_train_steps=7), 30) == [0, 7, 14, 21, 28]


def test_every_n_epochs_at_their_first_step():
    assert steps(Cadence(every_n_epochs=2), 45) == [0, 20, 40]


def test_log_spaced():
    assert steps(Cadence(log_spaced=True), 60) == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50]


def test_log_spaced_until_the_spacing_has_grown():
    due = steps(Cadence(every_n_train_steps=10, log_spaced=True), 100)
    assert due[:12] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]
    assert due[-6:] == [40, 50, 60, 70, 80, 90]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 0}, "`every_n_train_steps` must be an integer of at least 1 or None, got 0"),
        ({"every_n_train_steps": -3}, "got -3"),
        ({"every_n_train_steps": 2.5}, "got 2.5"),
        ({"every_n_train_steps": True}, "got True"),
        ({"every_n_train_steps": "10"}, "got '10'"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, r"\(5\) and `every_n_epochs` \(1\) exclude each other"),
        ({"every_n_epochs": 1, "log_spaced": True}, "does not go with `every_n_epochs`"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Cadence(**arguments)


@pytest.mark.parametrize(
    ("cadence", "text"),
    [
        (Cadence(every_n_train_steps=5), "every 5 steps"),
        (Cadence(every_n_epochs=2), "every 2 epochs"),
        (Cadence(log_spaced=True), "10 per decade of steps"),
        (Cadence(every_n_train_steps=5, log_spaced=True), "10 per decade of steps, then every 5 steps"),
    ],
)
def test_schedules_are_put_in_words(cadence, text):
    assert str(cadence) == text
