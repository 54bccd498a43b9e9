"""Guards what writes: killed or disturbed anywhere, it can be done again, and leaves nothing half.

`python -m tests.hostile --cases 0 --kills 1000 --faults` does so more often; here are a few of
each, and a check that the campaign notices a deed that leaves something behind.
"""

import sys

import pytest

LACKING = "processes are forked by means that Windows lacks"
kills = pytest.importorskip("tests.hostile.kills", reason=LACKING)
faults = pytest.importorskip("tests.hostile.faults", reason=LACKING)
scenes = pytest.importorskip("tests.hostile.scenes", reason=LACKING)
numbers = pytest.importorskip("tests.hostile.numbers", reason=LACKING)
deeds = pytest.importorskip("tests.hostile.deeds", reason=LACKING)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's"),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Makes the models that the deeds need, and knows what each deed does if nobody disturbs it."""
    campaign = kills.KillCampaign(tmp_path_factory.mktemp("campaign"))
    yield campaign
    campaign.close()


def show_nothing(tally):
    """Stands for the table."""


def test_what_is_killed_can_be_done_again(campaign):
    names = ["run", "merge", "predict", "save model", "download"]
    tallies = kills.run_kills(campaign, names, 15, 0, show_nothing)
    assert [failure for tally in tallies for failure in tally.failures] == []
    assert sum(tally.n_refused for tally in tallies) > 10, "most processes are killed in time"


def test_a_deed_that_leaves_something_behind_is_noticed(campaign, monkeypatch):
    def run(inputs, folder):
        """Write a file that only a deed which is not killed removes."""
        (folder / "half").write_text("")
        (folder / "whole").write_text("whole")
        (folder / "half").unlink()

    def again(inputs, folder):
        (folder / "whole").write_text("whole")

    monkeypatch.setattr(campaign, "references", {})  # those of the deed that this one replaces
    monkeypatch.setitem(deeds.DEEDS, "run", deeds.Deed(run, again))
    (tally,) = kills.run_kills(campaign, ["run"], 6, 0, show_nothing)
    assert any("left behind: ['half']" in failure for failure in tally.failures)


def test_a_fault_ends_in_one_line(campaign):
    for name in faults.FAULTS:
        assert faults.run_fault(campaign, name, 9, 0)[1] is None, name


def test_a_traceback_is_noticed(campaign, monkeypatch):
    def run(inputs, folder):
        (folder / "whole").write_text("whole")
        (folder / "more").write_text("")

    monkeypatch.setattr(campaign, "references", {})
    monkeypatch.setitem(deeds.DEEDS, "run", deeds.Deed(run))
    assert "Traceback" in faults.run_fault(campaign, "read-only", 0, 0)[1]


@pytest.mark.parametrize("name", ["pipes", "odd names", "servers", "command lines"])
def test_a_scene_plays_without_harm(campaign, name):
    for number in range(3):
        assert scenes.play(campaign, name, number, 0) is None


def test_random_models_have_the_numbers_of_their_peers(tmp_path):
    assert numbers.run_numbers(2, 0, tmp_path).failures == []
