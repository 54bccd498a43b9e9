"""`generate` and `predict` in several processes, also over a base that they hold together."""

import json
from contextlib import contextmanager

import pytest
import several
from command_line import output, save_adapters
from torch_version import divides_a_base

from minia3.cli import arguments, predict
from minia3.cli.main import main
from minia3.files import lock

PROMPTS = ["anna has a red ball . same colour ?", "ben has a blue box . same colour ?", "anna"]
TEST_ROWS = several.ROOT / "data" / "same-colour" / "test.jsonl"


@divides_a_base
@pytest.mark.slow
def test_a_divided_model_writes_and_labels_as_a_whole_one(tmp_path, capsys):
    sampled = ["generate", "tiny-t5", *PROMPTS, "--temperature", "1", "--seed", "3"]
    assert main(sampled) == 0
    expected = capsys.readouterr().out
    code, out, err = several.call(2, "-m", "minia3", *sampled, "--shard")
    assert (code, out, err) == (0, expected, "")

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(TEST_ROWS.read_text().splitlines(keepends=True)[:99]))
    alone, divided = tmp_path / "alone.csv", tmp_path / "divided.csv"
    labels = ["predict", "tiny-t5", rows, "--dtype", "float64", "--out"]
    assert main([*map(str, labels), str(alone)]) == 0
    code, _, err = several.call(2, "-m", "minia3", *labels, divided, "--shard", "--offload")
    assert (code, err) == (0, "")
    assert divided.read_text() == alone.read_text()


@pytest.mark.parametrize("command", ["generate", "predict"])
def test_only_the_first_process_moves_an_adapter_into_place(command, tmp_path, monkeypatch, capsys):
    """Processes on other machines may not see the lock of the folder."""
    save_adapters(tmp_path)
    folder = tmp_path / "one" / "adapter"
    folder.rename(tmp_path / "complete")
    folder.mkdir()
    (tmp_path / "complete").rename(folder / ".written")  # as a killed process leaves it
    is_first_alone = False
    alone_at_locks = []
    lock_folder = lock.lock_folder

    @contextmanager
    def noted_turn():
        nonlocal is_first_alone
        is_first_alone = True
        yield
        is_first_alone = False

    def noted_lock(*arguments):
        alone_at_locks.append(is_first_alone)
        return lock_folder(*arguments)

    for module in (arguments, predict):
        monkeypatch.setattr(module, "first_goes_first", noted_turn)
    monkeypatch.setattr(lock, "lock_folder", noted_lock)
    words = [command, "tiny-t5", "same colour ?", "--adapter", folder]
    if command == "predict":
        words[2] = tmp_path / "rows.jsonl"
        words[2].write_text(json.dumps({"input": "same colour ?", "target": "yes"}) + "\n")
    assert output(capsys, *words)
    assert alone_at_locks == [True]
