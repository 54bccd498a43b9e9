"""Each mistake of a user is one line that says what to do, and leaves nothing behind."""

import errno
import shutil
import warnings

import pytest
import torch
from running import fails, model, rows, run, task, train, words, write
from safetensors.torch import save_file
from written_out import adapter


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": "t5-bsae"}, ["t5-bsae", "did you mean t5-base?"]),
        ({"model": "nowhere/to/be/found"}, ["nowhere/to/be/found", "info --list"]),
        ({"task": "rt"}, ["'rt' is not a known task", "did you mean 'rte'?"]),
        ({"task": "nowhere.jsonl"}, ["nowhere.jsonl", "no such file or folder"]),
        ({"task": "missing,x.csv"}, ["2 of the 2 tasks of --task", "'missing'", "x.csv"]),
        ({"adapter": "nowhere"}, ["nowhere", "expected the folder or file of an adapter"]),
        ({"device": "gpu"}, ["--device is 'gpu'", "expected a device that this machine has"]),
        ({"device": "meta"}, ["--device is 'meta'", "expected a device that this machine has"]),
        ({"shots": 21}, ["expected 1 to 20 shots", "found 21"]),
        ({"task": task((0,)), "losses": "ul,ln"}, ["expected lm in --losses, found ul,ln"]),
        ({"eval_prompt": 1}, ["--eval-prompt is 1", "numbers from 0 to 0"]),
        ({"max_length": 1}, ["does not fit into max_length 1"]),
    ],
)
def test_a_name_of_something_that_does_not_exist_is_one_line_and_nothing_is_written(
    values, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(words(tmp_path / "run", **values), capsys, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_cut_to_fit_is_found_before_the_first_evaluation(tmp_path, capsys):
    # 20 characters without a space are one word, and here 60 bytes.
    long = {"input": "\N{SNOWMAN}" * 20, "choices": ["no", "yes"], "label": 0}
    short = {**long, "input": "red"}
    split = write(tmp_path / "task", train=[short, long], validation=[short])
    flags = {"model": "tiny-t5", "task": split, "max_length": 30}
    fails(words(tmp_path / "run", **flags), capsys, "row 1 does not fit into max_length 30")
    assert not (tmp_path / "run").exists()


LONG_CHOICE = {"input": "w3", "choices": ["w4", " ".join(["w5"] * 50)], "label": 0}


@pytest.mark.parametrize("method", ["ia3", "lora"])
def test_a_held_out_row_that_does_not_fit_is_found_before_the_first_evaluation(
    method, tmp_path, capsys
):
    """Its first evaluation comes hundreds of steps later. There are longer rows that do fit."""
    longer = [{**row, "input": "w3 " * 99} for row in rows(20)]
    data = write(tmp_path / "task", train=rows(9), validation=[LONG_CHOICE, *longer], test=rows(9))
    flags = {"method": method, "task": data, "eval_every": 2, "eval_batch_size": 4}
    arguments = words(tmp_path / "run", max_target_length=7, **flags)
    fails(arguments, capsys, "row 0: a choice has 51 tokens, expected at most 7")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_bad_row_of_a_later_cell_is_found_before_an_earlier_one_trains(split, tmp_path, capsys):
    splits = {"train": rows(9), "validation": rows(9), "test": rows(9)}
    good = write(tmp_path / "good", **splits)
    bad = write(tmp_path / "bad", **splits | {split: [*rows(20), LONG_CHOICE]})
    flags = {"method": "lora", "task": f"{good},{bad}", "eval_every": 2}
    arguments = words(tmp_path / "run", max_target_length=7, steps=3, **flags)
    fails(arguments, capsys, "bad: row 20: a choice has 51 tokens, expected at most 7")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("adapters", ["each", "one"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_message_about_a_row_names_its_task_if_there_are_several(
    split, adapters, tmp_path, capsys
):
    long = [{"input": "w3", "choices": ["w4", " ".join(["w5"] * 50)], "label": 0}]
    short = {"train": rows(4), "validation": rows(4)}
    tasks = [write(tmp_path / "good", **short), write(tmp_path / "bad", **short)]
    write(tmp_path / "bad", **{split: long})
    flags = {"task": ",".join(map(str, tasks)), "adapters": adapters, "max_target_length": 7}
    fails(words(tmp_path / "run", **flags), capsys, ": bad: row 0: a choice has 51 tokens")


def test_every_bad_row_is_named_in_one_line(tmp_path, capsys):
    bad = write(tmp_path / "task", test=rows(3))
    lines = [
        "{",
        "[]",
        '{"input": "a"}',
        '{"input": "", "target": "b"}',
        '{"input": "a", "choices": ["b"]}',
        "{",
    ]
    (bad / "train.jsonl").write_text("\n".join(lines))
    fails(
        words(tmp_path / "run", task=bad),
        capsys,
        *[f"train.jsonl:{i}: " for i in range(1, 6)],
        "and 1 more",
    )
    (bad / "train.jsonl").write_text("")
    fails(words(tmp_path / "run", task=bad), capsys, "train.jsonl: no rows")


def test_an_adapter_of_another_model_is_one_line(tmp_path, capsys):
    assert run(words(tmp_path / "llama", model=model("llama"), steps=1)) == 0
    with warnings.catch_warnings(record=True) as more_lines:
        wrong = words(tmp_path / "run", adapter=tmp_path / "llama" / "adapter")
        fails(wrong, capsys, "an adapter of another base", "expected none")
    assert more_lines == []
    tensors = adapter(tmp_path / "llama")
    folder = tmp_path / "wrong"
    shutil.copytree(tmp_path / "llama" / "adapter", folder)
    save_file({name: x[:1] for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    fails(
        words(tmp_path / "run", model=model("llama"), adapter=folder), capsys, "of 1, expected 12"
    )


@pytest.mark.parametrize(
    ("trained", "flags", "advice"),
    [
        ("lora", ["--eval-only"], "give --method lora, with --eval-only if nothing should train"),
        ("lora", ["--seed", "0,1"], "give --method lora"),
        ("lora", ["--method", "none"], "give --method lora"),
        ("lora", ["--method", "icl", "--shots", "2"], "merge it into its model (minia3 merge)"),
        ("ia3", ["--method", "lora"], "for (IA)^3, give --method ia3"),
        ("ia3", ["--method", "lora", "--eval-only"], "for (IA)^3, give --method ia3"),
    ],
)
def test_an_adapter_of_another_method_is_one_line_that_names_the_method(
    trained, flags, advice, tmp_path, capsys
):
    assert run(words(tmp_path / "trained", method=trained, steps=1)) == 0
    folder = tmp_path / "trained" / "adapter"
    found = f"--adapter is {str(folder)!r}"
    fails(words(tmp_path / "run", *flags, adapter=folder), capsys, found, advice)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_of_the_same_sizes_is_a_note(tmp_path, capsys):
    assert run(words(tmp_path / "run", steps=1)) == 0
    capsys.readouterr()
    other = {"model": model("t5", seed=1), "adapter": tmp_path / "run" / "adapter"}
    with warnings.catch_warnings(record=True) as more_lines:
        assert run(words(None, "--eval-only", **other)) == 0
    assert (
        f"adapter was trained on {model('t5').name}, and this model is {model('t5', seed=1)}\n"
        in capsys.readouterr().out
    )
    assert more_lines == []


def test_a_failed_download_is_one_line_that_names_the_folder(tmp_path, capsys, monkeypatch):
    no_network = lambda *args, **options: (_ for _ in ()).throw(OSError("no network"))  # noqa: E731
    monkeypatch.setattr("minia3.tasks.download.urlopen", no_network)
    data = tmp_path / "data"
    fails(
        words(tmp_path / "run", task="rte", data_dir=data),
        capsys,
        "no network",
        data / "rte",
        "by hand",
    )
    (tmp_path / "file").write_text("mine")
    fails(
        words(tmp_path / "run", task="rte", data_dir=tmp_path / "file"),
        capsys,
        tmp_path / "file",
        "by hand",
    )


def test_a_full_gpu_is_one_line_that_names_the_flag_to_lower(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has " + "many words " * 50
        )

    monkeypatch.setattr(train, "choice_logprobs", full)
    fails(words(tmp_path / "run"), capsys, "CUDA out of memory", "lower --micro-batch-size", code=1)
    monkeypatch.setattr("minia3.training.group.evaluate", full)
    fails(words(tmp_path / "other"), capsys, "CUDA out of memory", "--eval-batch-size", code=1)
    assert not (tmp_path / "other").exists()  # so that the same command with other flags can begin


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/nowhere/run"])
def test_an_out_that_cannot_be_a_folder_is_a_mistake(where, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    fails(words(tmp_path / where), capsys, f"--out is '{tmp_path / where}'", "expected a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_to_write_is_a_mistake(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()

    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("minia3.training.run_folder.write_json", refuse)
    fails(words(out), capsys, out, "Permission denied")


def test_a_compiler_that_fails_is_one_line_and_the_run_leaves_nothing(
    tmp_path, capsys, monkeypatch
):
    """On a machine without a C++ compiler, torch raises what this backend makes it raise."""

    def fail(*_):
        raise RuntimeError("No working C++ compiler found\n\nin a list")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **options: compile_module(module, backend=fail, **options),
    )
    out = tmp_path / "run"
    parts = ("--compile: torch's compiler failed", "No working C++ compiler found", "train without")
    fails(words(out, "--compile", steps=1), capsys, *parts, code=1)
    assert not out.exists()
