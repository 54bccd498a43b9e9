"""Guards the benchmark: every line works on tiny models, where both sides compute the same before they are timed."""

import json

import pytest

from tests.benchmarks.__main__ import main
from tests.benchmarks.lines import LINES


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_line_works_quickly(dtype, tmp_path, capsys):
    main(["--quick", "--dtype", dtype, "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) >= 2 * len(LINES)
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in result["rows"].values())
    assert capsys.readouterr().out.count("\n| ") == len(result["rows"]) + 1
