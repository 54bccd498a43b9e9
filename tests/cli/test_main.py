"""Guards the command line: every help has an example that works, a mistake is one line and exit code 2, a failure one
line and 1, pipes and Ctrl-C make no noise; and each command does what the function of its name does.
"""

import errno
import io
import json
import os
import pty
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import running
import torch
from conftest import randomize
from running import ROOT
from safetensors.torch import load_file
from torch import nn

import minia3
from minia3.adapters.lora import add_lora, save_lora
from minia3.adapters.merge import merge
from minia3.adapters.mix import mix
from minia3.adapters.peft_files import read_adapter
from minia3.checkpoints.tokenizer import Tokenizer
from minia3.cli.info import info
from minia3.cli.main import COMMANDS, main

GIVEN = json.loads((ROOT / "minia3" / "cli" / "commands.json").read_text())
NAMES = [run.__name__ for run in COMMANDS]
EXAMPLES = {
    run.__name__: shlex.split(run.__doc__.partition(": python -m minia3 ")[2]) for run in COMMANDS
}


def python(*words, **options):
    """`python -m minia3` in a process of its own."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "minia3", *map(str, words)], env=environ, **options
    )


def done(*words):
    """-> stdout, stderr and exit code of such a process."""
    process = python(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return *process.communicate(timeout=60), process.returncode


def said(capsys, *words):
    """What a command prints in this process."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def fails(capsys, *words, code=2):
    """-> the one line on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minia3: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def adapters(tmp_path):
    """A folder with two adapters of the embedded model, one/adapter and other/adapter."""
    for seed, name in enumerate(("one", "other")):
        minia3.save_adapter(
            randomize(minia3.load_model("tiny-t5"), seed), tmp_path / name / "adapter"
        )
    return tmp_path


def tfew(path):
    """T-Few's file of random vectors for a gated T5 of two layers."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for stack, sites in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        for i in range(2):
            for j, site in enumerate(sites):
                for part in "kv":
                    tensors[f"{stack}.block.{i}.layer.{j}.{site}.{part}.multi_lora_b"] = (24, 1)
            tensors[f"{stack}.block.{i}.layer.{len(sites)}.DenseReluDense.wi_1.multi_lora_b"] = (
                40,
                1,
            )
    torch.save(
        {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}, path
    )
    return path


# Help


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"]])
def test_help_is_quick_and_imports_no_torch(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, err, code = done(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (code, err) == (0, "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    program = f"import sys, minia3.__main__ as m\ntry: m.main({words})\nfinally: print('torch' in sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert child.stdout == out + "False\n"


def test_help_names_every_command_and_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in NAMES)
    assert out.endswith("\nexample: python -m minia3 info t5-base\n")


@pytest.mark.parametrize("run", COMMANDS, ids=NAMES)
def test_the_help_of_a_command_explains_every_argument_and_ends_with_an_example(run, capsys):
    with pytest.raises(SystemExit):
        main([run.__name__, "--help"])
    out = capsys.readouterr().out
    text = " ".join(out.split())
    for name in GIVEN["commands"][run.__name__].split():
        assert name in text
        argument = GIVEN["arguments"][name] | GIVEN["own"].get(f"{run.__name__} {name}", {})
        assert argument["help"] % argument in text
    assert out.splitlines()[-1] == f"example: python -m minia3 {shlex.join(EXAMPLES[run.__name__])}"


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_a_command_line_that_works(name, adapters, monkeypatch, capsys):
    (adapters / "data").symlink_to(ROOT / "data")
    if name == "merge":
        shutil.copytree(adapters / "one" / "adapter", adapters / "adapter")
    tfew(adapters / "finish.pt")
    monkeypatch.chdir(adapters)
    if name in ("table", "plot"):
        pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
        running.run(running.words(adapters / "runs" / "one"))
        capsys.readouterr()
    assert main(EXAMPLES[name]) == 0
    out, err = capsys.readouterr()
    assert (out != "") == (name in ("info", "generate", "predict", "table", "plot"))
    assert err == ""


def test_the_file_tells_of_every_command_and_of_the_arguments_that_they_use():
    assert list(GIVEN["commands"]) == NAMES
    assert set(GIVEN["arguments"]) == {
        name for names in GIVEN["commands"].values() for name in names.split()
    }


# Mistakes and failures


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["command", "required"]),
        (["inof", "t5-base"], ["inof", "info", "generate"]),
        (["info", "t5-base", "t5-large"], ["t5-large"]),
        (["info", "t5-bsae"], ["did you mean t5-base?"]),
        (["generate"], ["model", "required"]),
        (["generate", "tiny-t5", "--beam", "2"], ["--beam"]),
        (["generate", "tiny-t5", "--beams", "two", "x"], ["--beams", "'two'"]),
        (["generate", "tiny-t5", "--beams", "0", "x"], ["beams", "0"]),
        (["generate", "tiny-t5", "--top-p", "2", "x"], ["top_p", "2.0"]),
        (["generate", "tiny-t5", "--chat", "x"], ["chat_template"]),
        (["generate", "tiny-t5", "--dtype", "float17", "x"], ["float17", "float32"]),
        (["generate", "tiny-t5", "--device", "tpu", "x"], ["--device is 'tpu'", "cuda"]),
        (["generate", "tiny-t5", "--adapter", "nowhere", "x"], ["nowhere"]),
        (["predict", "tiny-t5", "nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
        (["predict", "tiny-t5", "nowhere.jsonl", "--task", "rtx"], ["--task is 'rtx'", "rte"]),
        (["merge", "tiny-t5", "nowhere", "out"], ["nowhere"]),
        (["convert", "nowhere", "out"], ["nowhere"]),
        (["mix", "out"], ["adapter:weight", "required"]),
        (["mix", "out", "adapter"], ["adapter:weight", "'adapter'"]),
        (["mix", "out", "adapter:half"], ["'adapter:half'", "expected ADAPTER:WEIGHT"]),
        (["mix", "out", "nowhere:1"], ["nowhere"]),
    ],
)
def test_a_mistake_is_one_line_and_two(words, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, *words)
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["notes.txt", None])
@pytest.mark.parametrize(
    "command", ["merge tiny-t5 one/adapter", "convert one/adapter", "convert tiny-t5", "mix"]
)
def test_a_place_that_holds_something_is_refused(command, inside, adapters, monkeypatch, capsys):
    monkeypatch.chdir(adapters)
    out = adapters / "out"
    if inside:
        out.mkdir()
        (out / inside).write_text("mine")
    else:
        out.write_text("mine")
    words = ["mix", "out", "one/adapter:1"] if command == "mix" else [*command.split(), "out"]
    assert "out exists and is not empty" in fails(capsys, *words)
    assert [p.read_text() for p in ([out / inside] if inside else [out])] == ["mine"]
    shutil.rmtree(out) if inside else out.unlink()
    out.mkdir()
    (out / ".hidden").touch()
    assert main(words) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EIO, "Input/output error", "file"), 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),  # of a download: standard output is well
        (ConnectionResetError("reset"), 1),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), 1),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), 1),
        (MemoryError(), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
    ],
)
def test_a_failure_is_one_line_and_one(error, code, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("minia3.adapters.lora.is_lora", fail)
    line = fails(capsys, "merge", "tiny-t5", "adapter", "out", code=code)
    assert line == f"minia3: {' '.join(str(error).split()) or 'MemoryError'}\n"


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("minia3.adapters.lora.is_lora", lambda *args: {}["bug"])
    with pytest.raises(KeyError):
        main(["merge", "tiny-t5", "adapter", "out"])


def test_a_warning_is_one_line(adapters, capsys):
    path = adapters / "one" / "adapter" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/base"})
    )
    assert main(["generate", "tiny-t5", "same colour ?", "--adapter", str(path.parent)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("minia3: ")
    assert "was trained on other/base" in err
    assert err.count("\n") == 1


# Pipes, signals


@pytest.mark.parametrize(
    "words",
    [["--help"], ["info", "t5-base"], ["predict", "tiny-t5", "data/same-colour/test.jsonl"]],
)
def test_a_reader_that_goes_makes_no_noise(words):
    read, write = os.pipe()
    process = python(*words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    if words[0] == "predict":
        assert os.read(read, 10)
    os.close(read)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("words", [["--help"], ["info", "t5-base"]])
def test_a_full_disk_behind_standard_output_is_one_line(words):
    with open("/dev/full", "w") as full:
        process = python(*words, stdout=full, stderr=subprocess.PIPE, text=True)
        assert process.communicate(timeout=60)[1] == "minia3: [Errno 28] No space left on device\n"
    assert process.returncode == 1


def read_until(fd, mark):
    """What comes until `mark` has come, or nothing has for 30 seconds."""
    seen = b""
    while mark not in seen and select.select([fd], [], [], 30)[0]:
        seen += os.read(fd, 1000)
    return seen.replace(b"\r", b"")


def test_a_closed_standard_input_is_an_empty_one():
    for words in (["generate", "tiny-t5"], ["generate", "tiny-t5", "--chat"]):
        process = python(
            *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(0)
        )
        assert (*process.communicate(timeout=60), process.returncode) == (b"", b"", 0)


def test_ctrl_c_makes_no_noise():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's job in the background ignores it
    try:
        process = python("generate", "tiny-t5", **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    process.stdin.write(b"same colour ?\n" * 16)
    process.stdin.flush()
    assert read_until(process.stdout.fileno(), b"\n")  # it waits for more
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 130


# info


def test_info_as_json_is_one_object_with_the_lines_that_have_a_title(capsys):
    out = said(capsys, "info", "t5-base", "--json")
    assert out.count("\n") == 1
    assert json.loads(out) == {title: text for title, text in info("t5-base") if title}
    text = said(capsys, "info", "t5-base")
    assert text == "".join(f"{title:<18}{line}\n" for title, line in info("t5-base"))


# generate


PROMPTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]


def expected(prompts=PROMPTS, adapter=None, name="t5", **options):
    model, tokenizer = (
        minia3.load_model(running.model(name)),
        minia3.load_tokenizer(running.model(name)),
    )
    if adapter:
        minia3.load_adapter(model, adapter)
    return minia3.generate(model, tokenizer, prompts, **options)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--beams", "3", "--length-penalty", "0.5"], {"beams": 3, "length_penalty": 0.5}),
        (["--temperature", "2", "--seed", "5"], {"temperature": 2.0, "seed": 5}),
        (
            ["--temperature", "2", "--seed", "5", "--top-k", "4"],
            {"temperature": 2.0, "seed": 5, "top_k": 4},
        ),
        (
            ["--temperature", "2", "--seed", "5", "--top-p", "0.5"],
            {"temperature": 2.0, "seed": 5, "top_p": 0.5},
        ),
        (["--stop", "w1", "--stop", "w2"], {"stop": ["w1", "w2"]}),
        (["--max-new-tokens", "2"], {"max_new_tokens": 2}),
    ],
)
def test_generate_prints_what_generate_gives(words, options, capsys):
    """Three prompts at once; one prompt, which is streamed; and as JSON."""
    model = running.model("t5")
    if "max_new_tokens" not in options:
        words, options = [*words, "--max-new-tokens", "8"], {**options, "max_new_tokens": 8}
    texts = expected(**options)
    assert said(capsys, "generate", model, *PROMPTS, *words) == "".join(
        f"{text}\n" for text in texts
    )
    assert said(capsys, "generate", model, *words, PROMPTS[0]) == f"{texts[0]}\n"
    lines = said(capsys, "generate", *words, "--json", model, *PROMPTS).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": prompt, "output": text} for prompt, text in zip(PROMPTS, texts, strict=True)
    ]


def test_samples_follow_their_prompt(capsys):
    words = ["--temperature", "3", "--seed", "1", "--samples", "2", "--max-new-tokens", "4"]
    texts = expected(temperature=3.0, seed=1, samples=2, max_new_tokens=4)
    assert len(set(texts)) > 3
    assert said(capsys, "generate", running.model("t5"), *PROMPTS, *words) == "".join(
        f"{text}\n" for text in texts
    )
    lines = said(capsys, "generate", running.model("t5"), *PROMPTS, *words, "--json").splitlines()
    assert [json.loads(line)["outputs"] for line in lines] == [texts[0:2], texts[2:4], texts[4:6]]


def test_generate_uses_the_adapter(tmp_path, capsys):
    minia3.save_adapter(randomize(minia3.load_model(running.model("llama"))), tmp_path)
    words = ["generate", running.model("llama"), *PROMPTS, "--max-new-tokens", "6"]
    texts = expected(adapter=tmp_path, name="llama", max_new_tokens=6)
    assert said(capsys, *words, "--adapter", tmp_path).splitlines() == texts
    assert said(capsys, *words).splitlines() == expected(name="llama", max_new_tokens=6) != texts


def test_one_prompt_is_streamed_piece_by_piece(capsys, monkeypatch):
    seen = []

    def stream(model, tokenizer, prompt, **options):
        for piece in ("one", " two", " three"):
            seen.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr("minia3.inference.decoding.stream", stream)
    assert said(capsys, "generate", running.model("t5"), "w3") == " three\n"
    assert seen == ["", "one", " two"]


def test_a_pipe_sends_a_prompt_a_line(capsys, monkeypatch):
    prompts = [f"w{3 + i % 50} w{4 + i % 7}" for i in range(40)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(prompts)))
    found = said(
        capsys, "generate", running.model("t5"), "--max-new-tokens", "3", "--json"
    ).splitlines()
    assert [json.loads(line)["prompt"] for line in found] == prompts
    assert [json.loads(line)["output"] for line in found] == expected(prompts, max_new_tokens=3)


class Terminal:
    """Standard input where `lines` are typed, and then Ctrl-D."""

    def __init__(self, monkeypatch, *lines):
        self.lines = list(lines)
        monkeypatch.setattr("sys.stdin", self)
        monkeypatch.setattr("builtins.input", self.input)

    def isatty(self):
        return True

    def input(self, prompt):
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_chat_wraps_a_prompt_and_a_conversation_keeps_its_messages(capsys, monkeypatch):
    heard = []

    def chat(self, messages):
        heard.append([(message["role"], message["content"]) for message in messages])
        return self.encode(" ".join(message["content"] for message in messages))

    monkeypatch.setattr(Tokenizer, "chat", chat)
    words = ["generate", running.model("t5"), "--chat", "--max-new-tokens", "3"]
    out = said(capsys, *words, "w3 w4", "w5")
    assert heard == [[("user", "w3 w4")], [("user", "w5")]]
    assert out.splitlines() == expected(["w3 w4", "w5"], max_new_tokens=3)
    heard.clear()
    Terminal(monkeypatch, "w3", "  ", "w4 ", "w5")
    first, second, _ = said(capsys, *words).splitlines()
    so_far = [
        ("user", "w3"),
        ("assistant", first),
        ("user", "w4"),
        ("assistant", second),
        ("user", "w5"),
    ]
    assert heard == [so_far[:1], so_far[:3], so_far]
    assert [first, second] == expected(["w3", f"w3 {first} w4"], max_new_tokens=3)


def test_without_chat_each_line_that_is_typed_stands_alone(capsys, monkeypatch):
    Terminal(monkeypatch, "w3", "w4")
    out = said(capsys, "generate", running.model("t5"), "--max-new-tokens", "3")
    assert out.splitlines() == expected(["w3", "w4"], max_new_tokens=3)


def test_a_conversation_on_a_terminal_ends_with_ctrl_d():
    mine, theirs = pty.openpty()
    process = python(
        "generate", "tiny-t5", "--max-new-tokens", "1", stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert read_until(mine, b"> ") == b"> "
    os.write(mine, b"same colour ?\n")
    assert read_until(mine, b"\n> ") == b"same colour ?\nyes\n> "
    os.write(mine, b"\x04")
    assert process.wait(60) == 0
    os.close(mine)


# merge, convert, mix


def vectors_of(folder):
    return read_adapter(folder).vectors


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merge_is_merge(adapters, capsys):
    assert (
        main(["merge", "tiny-t5", str(adapters / "one" / "adapter"), str(adapters / "merged")]) == 0
    )
    model = minia3.load_model("tiny-t5")
    minia3.load_adapter(model, adapters / "one" / "adapter")
    found = minia3.load_model(adapters / "merged")
    assert same(dict(found.named_parameters()), dict(merge(model).named_parameters()))
    assert minia3.load_tokenizer(adapters / "merged").encode("same colour ?")


def test_lora_generates_predicts_and_merges_too(tmp_path, capsys):
    model, tokenizer = minia3.load_model("tiny-t5"), minia3.load_tokenizer("tiny-t5")
    torch.manual_seed(0)
    for name, p in add_lora(model, where=("q", "v", "gate")).items():
        nn.init.normal_(p, std=0.3 if name.endswith("lora_B.weight") else 0.1)
    folder, texts = tmp_path / "lora", ["anna has a red ball .", "tom has a blue cup ."]
    save_lora(model, folder)
    expected = minia3.generate(model, tokenizer, texts, max_new_tokens=5)
    assert expected != minia3.generate(
        minia3.load_model("tiny-t5"), tokenizer, texts, max_new_tokens=5
    )
    flags = ["--adapter", str(folder), "--max-new-tokens", "5"]
    out = said(capsys, "generate", "tiny-t5", *texts, *flags, "--json")
    assert [json.loads(line)["output"] for line in out.splitlines()] == expected
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"input": text}) + "\n" for text in texts)
    )
    out = said(capsys, "predict", "tiny-t5", str(tmp_path / "rows.jsonl"), *flags)
    assert [json.loads(line)["output"] for line in out.splitlines()] == expected
    said(capsys, "merge", "tiny-t5", str(folder), str(tmp_path / "merged"))
    merged = minia3.load_model(tmp_path / "merged")
    assert same(dict(merged.named_parameters()), dict(merge(model).named_parameters()))
    minia3.save_model(merge(merge(model)), tmp_path / "again")
    for name in ("merged", "again"):
        assert (
            json.loads((tmp_path / name / "config.json").read_text())["_name_or_path"] == "tiny-t5"
        )
    assert minia3.load_tokenizer(tmp_path / "merged").encode(texts[0]) == tokenizer.encode(texts[0])


def test_t_few_s_file_becomes_a_peft_folder_without_the_base(tmp_path, loaded):
    file = tfew(tmp_path / "finish.pt")
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = loaded("t5-v1.1")
    minia3.load_adapter(model, tmp_path / "out")
    raw = torch.load(file, weights_only=True)
    assert sum(v.numel() for v in minia3.vectors(model).values()) == sum(
        x.numel() for x in raw.values()
    )
    for j, part in ((2, "DenseReluDense.wi_1"), (1, "EncDecAttention.v")):
        value_D = raw[f"decoder.block.1.layer.{j}.{part}.multi_lora_b"][:, 0]
        assert [torch.equal(vector[0], value_D) for vector in minia3.vectors(model).values()].count(
            True
        ) == 1


def test_a_model_without_a_tokenizer_converts(adapters, copy):
    folder = copy("t5-v1.0")
    assert main(["convert", str(folder), str(adapters / "out")]) == 0
    assert sorted(path.name for path in (adapters / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_any_form_of_an_adapter_converts_to_the_same_folder(adapters):
    folder = adapters / "one" / "adapter"
    assert main(["convert", str(folder), str(adapters / "a")]) == 0
    assert main(["convert", str(folder / "adapter_model.safetensors"), str(adapters / "b")]) == 0
    assert same(vectors_of(folder), vectors_of(adapters / "a"))
    assert same(vectors_of(folder), vectors_of(adapters / "b"))
    assert read_adapter(adapters / "a").base == read_adapter(folder).base


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_model_becomes_a_folder_in_the_hugging_face_layout(name, tmp_path):
    source, out = running.model(name), tmp_path / "out"
    shutil.copytree(source, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    assert main(["convert", str(tmp_path / "bin"), str(out), "--dtype", "bfloat16"]) == 0
    found = minia3.load_model(out)
    assert found.embed.weight.dtype == torch.bfloat16
    wanted = minia3.load_model(source, dtype=torch.bfloat16)
    assert same(dict(found.named_parameters()), dict(wanted.named_parameters()))
    assert minia3.load_tokenizer(out).encode("w3 w9") == minia3.load_tokenizer(source).encode(
        "w3 w9"
    )


@pytest.mark.parametrize("how", ["average", "product", "power"])
def test_mix_is_mix(how, adapters):
    for name in ("one", "other"):  # positive ones, for powers
        model = minia3.load_model("tiny-t5")
        minia3.load_adapter(model, adapters / name / "adapter")
        for vector in minia3.vectors(model).values():
            vector.data.abs_().add_(0.1)
        minia3.save_adapter(model, adapters / name / "positive")
    one, other = adapters / "one" / "positive", adapters / "other" / "positive"
    more = ["--how", how] if how != "average" else []
    assert main(["mix", str(adapters / "out"), *more, f"{one}:0.25", f"{other}:-1.5"]) == 0
    assert same(
        vectors_of(adapters / "out"), mix([(vectors_of(one), 0.25), (vectors_of(other), -1.5)], how)
    )
    assert read_adapter(adapters / "out").base == read_adapter(one).base == "tiny-t5"


def test_a_mixture_of_adapters_of_different_models_names_none_and_says_so(adapters, capsys):
    path = adapters / "one" / "adapter" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/base"})
    )
    words = ["mix", adapters / "out", f"{path.parent}:1", f"{adapters / 'other' / 'adapter'}:1"]
    assert main([str(word) for word in words]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "other/base" in err
    assert read_adapter(adapters / "out").base is None
