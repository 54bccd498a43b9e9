"""Guards what writes: killed or disturbed anywhere, it can be done again, and leaves nothing half.

`python -m tests.hostile --cases 0 --kills 1000 --faults` does so more often; here are a few of
each, and a check that the campaign notices a deed that leaves something behind.
"""

import sys

import pytest
import torch
from running import in_new_process
from safetensors.torch import save

LACKING = "processes are forked by means that Windows lacks"
kills = pytest.importorskip("tests.hostile.kills", reason=LACKING)
faults = pytest.importorskip("tests.hostile.faults", reason=LACKING)
scenes = pytest.importorskip("tests.hostile.scenes", reason=LACKING)
numbers = pytest.importorskip("tests.hostile.numbers", reason=LACKING)
deeds = pytest.importorskip("tests.hostile.deeds", reason=LACKING)
processes = pytest.importorskip("tests.hostile.processes", reason=LACKING)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's"),
]


KILLED = ["run", "merge", "predict", "save model", "download"]
PLAYED = ["pipes", "odd names", "servers", "command lines"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a small campaign finds, in a process that forks and computes nothing itself.

    This process may have threads of autograd, and then its forks can train nothing: from its first
    backward pass on if there is a GPU, or if the first one was that of a memory plan and torch is
    built for CUDA.
    """
    return in_new_process(run_campaign, tmp_path_factory.mktemp("campaign"))


def run_campaign(folder):
    processes.warm_up()
    campaign = kills.KillCampaign(folder)
    try:
        return {
            "kills": kills.run_kills(campaign, KILLED, 15, 0, show_nothing),
            "faults": {name: faults.run_fault(campaign, name, 9, 0)[1] for name in faults.FAULTS},
            "scenes": {name: play_thrice(campaign, name) for name in PLAYED},
            "left behind": kill_what_leaves_a_file_behind(campaign),
            "traceback": hinder_what_ends_in_a_traceback(campaign),
        }
    finally:
        campaign.close()


def show_nothing(tally):
    """Stands for the table."""


def play_thrice(campaign, name):
    return [scenes.play(campaign, name, number, 0) for number in range(3)]


def kill_what_leaves_a_file_behind(campaign):
    def run(inputs, folder):
        """Write a file that only a deed which is not killed removes."""
        (folder / "half").write_text("")
        (folder / "whole").write_text("whole")
        (folder / "half").unlink()

    def again(inputs, folder):
        (folder / "whole").write_text("whole")

    replace_run(campaign, deeds.Deed(run, again))
    (tally,) = kills.run_kills(campaign, ["run"], 6, 0, show_nothing)
    return tally.failures


def hinder_what_ends_in_a_traceback(campaign):
    def run(inputs, folder):
        (folder / "whole").write_text("whole")
        (folder / "more").write_text("")

    replace_run(campaign, deeds.Deed(run))
    return faults.run_fault(campaign, "read-only", 0, 0)[1]


def replace_run(campaign, deed):
    """Put a deed in the place of "run", in this process."""
    campaign.references.clear()  # those of the deed that is replaced
    deeds.DEEDS["run"] = deed


def test_what_is_killed_can_be_done_again(found):
    assert [failure for tally in found["kills"] for failure in tally.failures] == []
    n_killed = sum(tally.n_refused for tally in found["kills"])
    assert n_killed > 10, "most processes are killed in time"


def test_a_deed_that_leaves_something_behind_is_noticed(found):
    assert any("left behind: ['half']" in failure for failure in found["left behind"])


def test_a_fault_ends_in_one_line(found):
    assert found["faults"] == dict.fromkeys(faults.FAULTS)


def test_only_rounding_counts_as_near():
    lines = [{"loss": 1.25, "split": "test"}, {"loss": float("nan")}]
    assert not faults.is_near(lines, lines)  # a loss that is NaN is not near itself
    lines[1]["loss"] = 2.5
    assert faults.is_near(lines, [{"loss": 1.2500001, "split": "test"}, {"loss": 2.5}])
    assert not faults.is_near(lines, lines[:1])
    assert not faults.is_near(lines, [{"loss": 1.26, "split": "test"}, {"loss": 2.5}])
    assert not faults.is_near(lines, [{"loss": 1.25, "split": "train"}, {"loss": 2.5}])

    def file_of(value, name="l_k"):
        return save({name: torch.tensor([1.0, value])})

    assert faults.is_near(file_of(2.0), file_of(2.0000002))
    for other in (file_of(2.01), file_of(2.0, "l_v"), b"no tensors"):
        assert not faults.is_near(file_of(2.0), other)
    assert not faults.is_near(b"text", b"texts")


def test_a_traceback_is_noticed(found):
    assert "Traceback" in found["traceback"]


@pytest.mark.parametrize("name", PLAYED)
def test_a_scene_plays_without_harm(found, name):
    assert found["scenes"][name] == [None, None, None]


@pytest.mark.parametrize("number", range(2))
def test_a_random_model_has_the_numbers_of_its_peers(number, tmp_path):
    """In this process, which has imported the peers for other tests."""
    with torch.random.fork_rng():
        numbers.check_case(0, number, tmp_path)
