import errno
import signal
import threading

import pytest

from lepton.train.stop_request import NAMES, Interrupted, StopRequest

ASKED = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@pytest.mark.parametrize("signum", ASKED, ids=lambda signum: signum.name)
def test_the_first_is_noted_and_said(signum, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before
    assert f"{signal.Signals(signum).name}: stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize("signum", ASKED, ids=lambda signum: signum.name)
def test_one_that_is_ignored_stays_ignored(signum):
    """As `nohup` does with SIGHUP, and a shell with the SIGINT of a job in the background."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signum)
            assert stop.signum is None
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_terminal_that_is_gone_does_not_turn_into_an_error(monkeypatch):
    def gone(*args):
        raise OSError(errno.EIO, "Input/output error")

    with StopRequest() as stop:
        monkeypatch.setattr("os.write", gone)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        assert stop.signum == signal.SIGTERM


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
