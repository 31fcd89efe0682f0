import signal
import threading

import pytest

from lepton.train.signals import Interrupted, StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_said(signum, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_leaves_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.append(stop.signum)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_exit_codes_are_those_of_shells():
    assert Interrupted(signal.SIGINT, "").exit_code == 130
    assert Interrupted(signal.SIGTERM, "").exit_code == 143
