"""Guards `python -m minia3 info`: its numbers are those of the model that is loaded and of the files that are written;
neither a network nor weights are needed to know them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import LLAMA_PEERS, T5_PEERS
from test_known_models import TOTALS, VECTORS

import minia3
from minia3.checkpoints.known_models import known_models
from minia3.checkpoints.load import build_model
from minia3.cli.info import info
from minia3.cli.main import main
from minia3.training.memory_plan import planned_memory
from tests.benchmarks.memory import measured


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a network is asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


def n_bytes(text):
    number, unit = text.replace(",", "").split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def cells(name):
    """All lines before the plan of the memory, which takes a while."""
    found = {}
    for title, text in info(name):
        found[title] = text
        if title == "its file":
            return found


def test_t5_base_from_the_command_line_without_a_network(tmp_path):
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "minia3", "info", "t5-base"]
    root = os.path.dirname(os.path.dirname(minia3.__file__))
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for number in ("129,024", "222,903,552", "0.058%"):
        assert number in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(VECTORS.keys() | TOTALS.keys()))
def test_every_known_name_has_its_numbers_without_a_network(name, monkeypatch):
    monkeypatch.setattr("minia3.checkpoints.hub.fetch", lambda *args: 0 / 0)
    found = cells(name)
    adapter, base = (
        int(found["adapter"].split()[0].replace(",", "")),
        int(found["parameters"].replace(",", "")),
    )
    assert adapter == VECTORS.get(name, adapter)
    assert base == TOTALS.get(name, base)
    assert found["adapter"] == f"{adapter:,} numbers, {adapter / base:.3%} of the base"
    assert found["model"] == known_models()[name].repo
    assert n_bytes(found["its file"]) == pytest.approx(4 * adapter, rel=0.1, abs=2e4)


def test_the_embedded_model_is_what_its_row_says():
    model = minia3.load_model("tiny-t5")
    adapter = sum(vector.numel() for vector in minia3.vectors(model).values())
    assert (
        cells("tiny-t5")["parameters"]
        == f"{sum(p.numel() for p in model.parameters()) - adapter:,}"
    )


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "t5-base",
            [
                "T5: encoder-decoder",
                "n_decoder_layers  12",
                "n_heads           12",
                "activation        relu",
            ],
        ),
        ("t5-3b", ["n_heads           32", "d_head            128", "d_model           1024"]),
        (
            "flan-t5-base",
            ["own_head          True", "d_ff              2048", "gated             True"],
        ),
        ("llama-3-8b", ["LLaMA: decoder-only", "own_head          True", "n_kv_heads        8"]),
        ("llama-3.2-1b", ["own_head          False", "rope_scaling      (32.0, 1.0, 4.0, 8192)"]),
        ("google-t5/t5-base", ["google-t5/t5-base", "129,024"]),
        ("HuggingFaceTB/SmolLM2-135M", ["134,515,008"]),
    ],
)
def test_a_model_is_described(name, texts, capsys, monkeypatch):
    monkeypatch.setattr("minia3.info.peak_memory", lambda *args: (0, 0))
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    for text in texts:
        assert text in out


@pytest.mark.parametrize("name", [*T5_PEERS, *LLAMA_PEERS])
def test_a_folder_is_described_from_its_config_alone_as_what_is_loaded(
    name, peer, loaded, tmp_path
):
    shutil.copy(peer(name).folder / "config.json", tmp_path)
    model = loaded(name)
    adapter = sum(vector.numel() for vector in minia3.vectors(model).values())
    found = cells(tmp_path)
    if name not in (
        "t5-v1.1",
        "t5-unscaled",
        "t5-deep-decoder",
        "mt5",
    ):  # the file decides, not the config
        assert found["parameters"] == f"{sum(p.numel() for p in model.parameters()) - adapter:,}"
    assert found["adapter"].startswith(f"{adapter:,} numbers, ")
    minia3.save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found["its file"] == f"{size / 1e6:.2f} MB"


SMALL = {
    "t5": known_models()["t5-small"].config,
    "llama": replace(known_models()["smollm2-135m"].config, n_layers=6, vocab_size=8192),
}


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="only Linux tells and resets a process's peak",
)
@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "length", "train"),
    [
        ("t5", torch.float32, 8, 128, True),
        (
            "t5",
            torch.float32,
            8,
            256,
            False,
        ),  # in bfloat16, of what so small a T5 serves, holes are up to a fifth
        ("llama", torch.float32, 8, 256, True),
        ("llama", torch.bfloat16, 8, 1024, False),
    ],
)
def test_the_plan_is_within_a_tenth_of_what_a_process_takes(kind, dtype, batch, length, train):
    """Its tensors alone are, of a process whose malloc is told to give back what is freed.

    Holes differ from process to process (of eight at each point: 0.96 to 1.06 of the plan): so the median of three.
    """
    point = SMALL[kind], dtype, batch, length, train
    tensors, malloc = planned_memory(*point)
    assert tensors == pytest.approx(measured(*point, trim=True), rel=0.1)
    assert tensors + malloc == pytest.approx(
        sorted(measured(*point, trim=False) for _ in range(3))[1], rel=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["t5-small", "smollm2-135m"])
def test_the_plan_counts_weights_vectors_and_what_a_step_keeps(name, dtype):
    config = known_models()[name].config
    own = sum(
        p.numel() * (4 if n.endswith(".scale") else dtype.itemsize)
        for n, p in build_model(config).named_parameters()
    )
    serve, train, longer = (
        planned_memory(config, dtype, 8, length, on)[0]
        for length, on in ((64, False), (64, True), (128, True))
    )
    assert own < serve < train < longer
    assert longer - own < 2.5 * (
        train - own
    )  # linear in the length, but for T5's weights of attention under dropout


def test_malloc_s_share_is_of_what_comes_and_goes_and_not_of_weights():
    config = known_models()["t5-small"].config
    own = sum(p.numel() * 4 for p in build_model(config).parameters())
    for batch, length, train in ((1, 8, False), (4, 64, True)):
        tensors, malloc = planned_memory(config, torch.float32, batch, length, train)
        assert malloc == min(64 << 20, tensors - own) + (tensors - own) // 8


def mistakes(arguments, capsys, *parts):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minia3: ")
    assert err.count("\n") == 1
    for part in parts:
        assert str(part) in err, err


def test_the_command_plans_for_the_batch_and_length_that_are_given(capsys):
    config = known_models()["t5-small"].config
    assert main(["info", "t5-small", "--batch", "3", "--length", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for dtype in (torch.float32, torch.bfloat16):
        serve, train = (sum(planned_memory(config, dtype, 3, 50, on)) / 1e6 for on in (False, True))
        assert (
            found[str(dtype).removeprefix("torch.")]
            == f"{serve:.2f} MB to serve, {train:.2f} MB to train"
        )


def test_a_mistake_is_one_line(tmp_path, capsys):
    mistakes(["info", "t5-bsae"], capsys, "t5-bsae", "did you mean t5-base?")
    mistakes(["info", str(tmp_path / "nowhere")], capsys, "nowhere", "Known names")
    mistakes(["info", str(tmp_path)], capsys, "config.json", "not found")
    mistakes(["inof", "t5-base"], capsys, "inof", "info")
    mistakes(["info", "t5-base", "--length", "0"], capsys, "8 and 0")
    mistakes(["info"], capsys, "model", "required")
    mistakes(["info", "t5-base", "t5-large"], capsys, "t5-large")
    mistakes([], capsys, "command", "required")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    mistakes(["info", str(tmp_path)], capsys, "bert")
    (tmp_path / "config.json").write_text("{")
    mistakes(["info", str(tmp_path)], capsys, "config.json")


def test_a_hub_id_that_is_not_known_needs_the_network_and_says_so(capsys, monkeypatch, tmp_path):
    code = "import sys; from minia3.__main__ import main; sys.exit(main(['info', 'some/model']))"
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = os.path.dirname(os.path.dirname(minia3.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "minia3: some/model: config.json is not in the cache, and the hub cannot be reached"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"]])
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "python -m minia3 info t5-base" in " ".join(capsys.readouterr().out.split())
