"""Guards minia3/files/read.py: whatever goes wrong while a foreign file is read becomes a message
of one line that names the file.

The tests of the readers say what each kind of file may look like, and tests/hostile/ damages
the files.
"""

import io
import json
import re

import pytest
import torch

from minia3.files.read import (
    is_out_of_memory,
    one_line,
    problem_of_file,
    read_json,
    reading,
    sample_digest,
)

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"


def test_a_json_object_is_read_as_a_dict(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"x": [1, null, "é"]}', encoding="utf-8")
    assert read_json(path) == read_json(str(path)) == {"x": [1, None, "é"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"x": 1', "damaged or cut short: JSONDecodeError: Expecting ',' delimiter"),
        (b'{"x": "\xff"}', "damaged or cut short: UnicodeDecodeError: 'utf-8' codec can't decode"),
        (b"", "the file is empty"),
        (LFS_POINTER, "a Git LFS pointer in place of the file: run `git lfs pull`"),
        (b" \n<!DOCTYPE html>\n<p>", "an HTML page in place of the file: the download went wrong"),
        (b"<HTML><p>", "an HTML page in place of the file: the download went wrong"),
    ],
)
def test_a_file_without_a_json_object_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]*/b\.json: not found$"):
        read_json(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to("../blobs/1")
    with pytest.raises(ValueError, match=r"/b\.json: a broken link to \.\./blobs/1$"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"^[^\n]*damaged or cut short: IsADirectoryError[^\n]*$"):
        read_json(tmp_path)


def message_of(error, *arguments, **options):
    """Return the message that `reading` makes of an exception."""
    with pytest.raises(ValueError) as caught, reading(*arguments, **options):  # noqa: PT011
        raise error
    assert caught.value.__suppress_context__, "the traceback of a user's mistake would be noise"
    return str(caught.value)


def test_a_value_error_keeps_its_message_and_other_exceptions_are_explained():
    assert message_of(ValueError("two\nlines"), "x") == "x: two lines"
    assert message_of(KeyError("a"), "x") == "x: damaged or cut short: KeyError: 'a'"
    assert message_of(KeyError("a"), "x", "cut") == "x: cut: KeyError: 'a'"
    assert message_of(UnicodeError("a"), "x") == "x: damaged or cut short: UnicodeError: a"


NO_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_errors_about_memory_mean_damage_only_if_a_damaged_file_asks_for_too_much(error):
    assert is_out_of_memory(error)
    assert message_of(error, "x").startswith("x: damaged or cut short: ")
    message = f"x: not enough memory to read it: {one_line(error)}"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"), reading("x", is_bounded=True):
        raise error


def test_a_file_of_torch_that_finds_no_memory_is_recognised():
    class NoRoomForTensors(io.BytesIO):
        def write(self, content):
            if len(content) >= 4000:
                raise MemoryError
            return super().write(content)

    with pytest.raises(RuntimeError) as caught:
        torch.save({"x": torch.zeros(1000)}, NoRoomForTensors())
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_about_memory():
    for error in (RuntimeError("expected all tensors on one device"), ValueError("out of memory")):
        assert not is_out_of_memory(error)


def test_only_the_first_sentence_of_a_library_is_kept():
    """torch.load goes on to recommend weights_only=False, which would run the code in a pickle."""
    error = RuntimeError("Unsupported class. Set weights_only=False to load it anyway.")
    assert message_of(error, "x", "cut") == "x: cut: RuntimeError: Unsupported class"


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    error = ModuleNotFoundError("No module named 'gguf'")
    assert message_of(error, "x", extra="gguf").endswith("'gguf': pip install 'minia3[gguf]'")
    assert "pip" not in message_of(error, "x")
    assert "pip" not in message_of(ValueError("a"), "x", extra="gguf")


def test_a_file_that_is_another_kind_of_file_says_so_whatever_the_parser_found(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LFS_POINTER)
    assert message_of(ValueError("a"), path).startswith(f"{path}: a Git LFS pointer")
    assert message_of(ValueError("a"), str(path)) == f"{path}: a", "a text is not looked up"
    path.write_bytes(b"weights")
    assert message_of(ValueError("a"), path) == f"{path}: a"
    assert message_of(ValueError("a"), tmp_path) == f"{tmp_path}: a"


def test_a_panic_of_rust_is_damage_and_an_interrupt_is_not():
    """A panic in tokenizers or safetensors is a BaseException of this name."""
    panic = type("PanicException", (BaseException,), {})
    assert message_of(panic("index out of bounds"), "x").startswith(
        "x: damaged or cut short: Panic"
    )
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt), reading("x"):
            raise interrupt


def test_a_message_is_one_line_of_limited_length():
    assert one_line(ValueError(" a\n\tb  c ")) == "a b c"
    assert one_line(ValueError("\n")) == "ValueError"
    assert len(one_line(ValueError("x" * 10_000))) == 300


def test_a_good_file_has_no_problem(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"html": "<html>"}))
    assert problem_of_file(tmp_path / "a.json") == ""


@pytest.mark.parametrize("place", [0, 1_000_000, 2_999_999])
def test_a_sample_of_a_file_shows_a_change(tmp_path, place):
    path = tmp_path / "weights"
    content = bytearray(3_000_000)
    path.write_bytes(content)
    digest = sample_digest([path])
    assert sample_digest([path]) == digest
    for i in range(place, min(place + 10_000, len(content))):
        content[i] = 1
    path.write_bytes(content)
    assert sample_digest([path]) != digest


def test_a_sample_shows_each_byte_of_a_file_of_a_megabyte(tmp_path):
    path = tmp_path / "weights"
    digests = set()
    for place in range(0, 1 << 20, 9_999):
        content = bytearray(1 << 20)
        content[place] = 1
        path.write_bytes(content)
        digests.add(sample_digest([path]))
    assert len(digests) == len(range(0, 1 << 20, 9_999))


def test_samples_of_files_that_divide_the_same_bytes_otherwise_differ(tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_bytes(bytes(30))
    short.write_bytes(bytes(20))
    assert sample_digest([long, short]) != sample_digest([short, long])
    assert sample_digest([]) != sample_digest([short])
