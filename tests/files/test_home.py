"""A first ~ stands for the home folder, in paths and nowhere else."""

from pathlib import Path

from minia3.files.home import expand_home


def test_only_a_tilde_alone_at_the_beginning_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/x") == expand_home(Path("~/x")) == "/home/me/x"
    assert expand_home(("~", "a")) == ("/home/me", "a")
    for value in ("~root/x", "x/~/y", "~x", None, 3):
        assert expand_home(value) == value
