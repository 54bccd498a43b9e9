"""`generate` and `predict` over a base that processes hold together."""

import pytest
import several
from torch_version import divides_a_base

from minia3.cli.main import main

PROMPTS = ["anna has a red ball . same colour ?", "ben has a blue box . same colour ?", "anna"]
ROWS = several.ROOT / "data" / "same-colour" / "test.jsonl"


@divides_a_base
@pytest.mark.slow
def test_a_divided_model_writes_and_labels_as_a_whole_one(tmp_path, capsys):
    sampled = ["generate", "tiny-t5", *PROMPTS, "--temperature", "1", "--seed", "3"]
    assert main(sampled) == 0
    expected = capsys.readouterr().out
    code, out, err = several.call(2, "-m", "minia3", *sampled, "--shard")
    assert (code, out, err) == (0, expected, "")

    alone, divided = tmp_path / "alone.csv", tmp_path / "divided.csv"
    labels = ["predict", "tiny-t5", ROWS, "--dtype", "float64", "--out"]
    assert main([*map(str, labels), str(alone)]) == 0
    code, _, err = several.call(2, "-m", "minia3", *labels, divided, "--shard", "--offload")
    assert (code, err) == (0, "")
    assert divided.read_text() == alone.read_text()
