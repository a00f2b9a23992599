"""Ctrl-C: a program that trains gets SIGINT."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mxfp4train as mxt

PROGRAM = Path(__file__).with_name("interrupted.py")


def interrupted(how, folder):
    """What a program printed that was interrupted once it had said that it runs."""
    command = [sys.executable, str(PROGRAM), how, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "running\n"
        time.sleep(0.2)
        begin = time.monotonic()
        program.send_signal(signal.SIGINT)
        out, _ = program.communicate(timeout=120)
        print(f"{how}: stopped in {time.monotonic() - begin:.2f} s")
    assert program.returncode == 0, out
    return out.split()


@pytest.mark.parametrize("how", ["run", "callback", "asleep", "nested", "own"])
def test_ctrl_c_ends_a_run_in_order(how, tmp_path):
    words = interrupted(how, tmp_path / "out")
    assert words[0] == "interrupted"
    loaded = mxt.Trainer.load(mxt.Engine(threads=1), tmp_path / "out")
    assert loaded.steps_done == int(words[1]) > 0


def test_a_stop_is_seen_within_a_step(tmp_path):
    words = interrupted("micro", tmp_path / "out")
    assert words[0] == "interrupted"
    # A step of this trainer takes minutes.
    assert words[1] == "0" and float(words[2]) < 30


@pytest.mark.parametrize("how", ["unsaved", "unsaved-asleep"])
def test_what_else_went_wrong_is_told(how, tmp_path):
    words = interrupted(how, tmp_path / "out")
    assert words[0] == "interrupted" and words[1] in ("FileError", "FormatError")


def test_ctrl_c_lets_a_store_end_its_save(tmp_path):
    words = interrupted("store", tmp_path / "out")
    assert words == ["interrupted", "1", "saved", "1"]


def test_ctrl_c_lets_a_callback_end_its_save(tmp_path):
    for _ in range(10):
        words = interrupted("saving", tmp_path / "out")
        # It may come before a step's save, but cuts none off ("aborted").
        assert words[0] == "interrupted" and int(words[1]) - int(words[3]) in (0, 1)


def test_ctrl_c_ends_runs_inside_runs(tmp_path):
    # It comes into a store's function of the inner run, of another trainer.
    assert interrupted("inside", tmp_path / "out") == ["interrupted", "1", "1", "saved", "1"]


def test_ctrl_c_comes_at_any_moment(tmp_path):
    # Whatever a callback does for the first time in its process.
    for how in ("first-save", "first-evaluate", "first-generate"):
        assert interrupted(how, tmp_path / how)[0] == "interrupted"


def test_the_handler_is_given_back(tmp_path):
    assert interrupted("no-thread", tmp_path / "out") == ["interrupted"]


@pytest.mark.parametrize("how", ["evaluate", "generate", "step"])
def test_ctrl_c_ends_other_calls(how, tmp_path):
    assert interrupted(how, tmp_path / "out")[0] == "interrupted"
