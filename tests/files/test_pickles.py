"""Guards minia3/files/pickles.py: a .bin file that does not hold the numbers of its tensors is
refused before torch.load takes other bytes for them, or allocates them.

tests/hostile/ damages such files at random.
"""

import io
import pickle
import zipfile

import pytest
import torch

from minia3.files.tensors import read_tensors

TENSORS = {"a": torch.randn(30, 4), "b": torch.randn(5).bfloat16()}


def saved(**options):
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, **options)
    return buffer.getvalue()


def rewritten(change):
    """Return the saved file with each record as `change(name, content)` returns it.

    change: returns a list of (name, content, compression).
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(result, "w") as new:
        for record in old.infolist():
            for name, content, compression in change(record.filename, old.read(record)):
                new.writestr(name, content, compression)
    return result.getvalue()


def stored(name, content):
    return [(name, content, zipfile.ZIP_STORED)]


def with_compression(name, content):
    compression = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
    return [(name, content, compression)]


def cut_short(name, content):
    return stored(name, content[:-4] if name.endswith("data/0") else content)


def without_numbers(name, content):
    return [] if name.endswith("data/0") else stored(name, content)


def with_two_pickles(name, content):
    if not name.endswith("data.pkl"):
        return stored(name, content)
    return [*stored(name, content), *stored("other/data.pkl", content)]


def refusal_of(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers compare the message)
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_compression, "data/0' is compressed, which torch.save never does"),
        (cut_short, "expected 480 bytes in the record data/0, found 476"),
        (without_numbers, "expected 480 bytes in the record data/0, found None"),
        (with_two_pickles, "expected one data.pkl, found 2"),
    ],
)
def test_an_archive_whose_records_are_not_the_numbers_of_its_tensors_is_refused(
    tmp_path, change, reason
):
    assert reason in refusal_of(tmp_path, rewritten(change))


def test_an_archive_that_was_only_written_again_is_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(rewritten(stored))
    entries = read_tensors(path)
    assert entries.keys() == TENSORS.keys()
    for name, entry in entries.items():
        assert torch.equal(entry.read(), TENSORS[name])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(tmp_path):
    twice = rewritten(lambda name, content: stored(name, content) * 2)
    assert "found two records with the same name" in refusal_of(tmp_path, twice)


def test_records_that_share_bytes_are_refused(tmp_path):
    """The directory at the end of the archive may send two names to one place."""
    content = saved()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        places = {record.filename: record.header_offset for record in archive.infolist()}
    first, second = (places[f"archive/data/{i}"] for i in range(2))
    directory = content.rindex(b"archive/data/1")
    place = content.rindex(second.to_bytes(4, "little"), 0, directory)
    moved = content[:place] + first.to_bytes(4, "little") + content[place + 4 :]
    message = refusal_of(tmp_path, moved)
    assert "overlap" in message or "differ" in message


def test_the_old_format_may_not_ask_for_more_than_the_file_holds(tmp_path):
    content = saved(_use_new_zipfile_serialization=False)
    # K is a number of one byte (120 entries), J one of four, and N is None, which follows it.
    huge = content.replace(b"KxN", b"J\xff\xff\xff\x7fN")
    assert huge != content
    assert "expected tensors of 8589934598 bytes" in refusal_of(tmp_path, huge)


def test_the_old_format_must_hold_the_numbers_of_all_tensors(tmp_path):
    """torch.load leaves a tensor without numbers as it allocated it."""
    content = saved(_use_new_zipfile_serialization=False)
    key = content[content.index(b"FloatStorage") :].split(b"X", 1)[1][4:].split(b"q", 1)[0]
    other = bytes(reversed(key))
    assert other != key
    assert "does not hold the numbers of all tensors" in refusal_of(
        tmp_path, content.replace(key, other, 1)
    )


class Memo:
    """A pickle that would execute something."""

    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_pickle_is_executed(tmp_path, capsys):
    torch.save({"a": Memo()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="damaged, or more than tensors"):
        read_tensors(tmp_path / "pytorch_model.bin")
    assert capsys.readouterr().out == ""


def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path):
    huge_bytes = b"\x80\x05\x96" + (10**12).to_bytes(8, "little")
    for content in (huge_bytes + b"\0" * 20 + b".", pickle.dumps(bytearray(10), protocol=5)):
        assert "damaged, or more than tensors" in refusal_of(tmp_path, content)
