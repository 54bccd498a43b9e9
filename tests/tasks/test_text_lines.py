"""A text is UTF-8, or the message says what it is and how to save it as UTF-8."""

import io
import re
import shutil
import subprocess

import pytest

from minia3.tasks.text_lines import LineReader, decode


def test_a_byte_order_mark_belongs_to_the_first_line_only():
    lines = list(LineReader(io.BytesIO(b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb")))
    assert lines == ["a\r\n", "\ufeffb"]


def test_the_message_of_a_latin_1_file_says_where_it_is_not_utf_8(tmp_path):
    with pytest.raises(ValueError, match="not UTF-8") as error:
        decode("Der schöne, alte Käse".encode("latin-1"), is_first=False)
    assert str(error.value).startswith("not UTF-8: byte 0xf6 after 'Der sch'; save the file as ")
    assert len(str(error.value)) < 150


@pytest.mark.skipif(shutil.which("iconv") is None, reason="there is no iconv")
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "input,target\nché,Größe\n"),
        ("cp1252", "input,target\nit\u2019s,5 € \u2013 ché\n"),
        ("utf-16", "input,target\nché,Größe\n"),
    ],
)
def test_the_command_of_the_message_makes_the_file_utf_8(tmp_path, encoding, text):
    (tmp_path / "OLD").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="not UTF-8") as error:
        list(LineReader((tmp_path / "OLD").open("rb")))
    (command,) = re.findall("`(iconv .*)`", str(error.value))
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "NEW").read_bytes().decode("utf-8-sig") == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x1f\x8b\x08\xff", "a gzip file: add .gz to its name"),
        (b"PK\x03\x04\xff", "a zip or Excel file: save the table as .csv"),
        (b"PAR1\xff", "a parquet file: name it .parquet"),
        (b"PAR1\x15\0\x15", "a parquet file: name it .parquet"),  # a small one may be UTF-8
        ("a".encode("utf-16-be"), "a null byte"),
        (b"\xfe\xff\0a", "UTF-16: save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n", "an HTML page"),
    ],
)
def test_a_file_under_the_wrong_name_is_recognized_by_its_first_bytes(content, words):
    with pytest.raises(ValueError, match=words):
        list(LineReader(io.BytesIO(content)))


def test_a_table_may_have_a_column_with_the_name_of_a_format():
    assert list(LineReader(io.BytesIO(b"PAR1,PAR2\n1,2\n"))) == ["PAR1,PAR2\n", "1,2\n"]


def test_the_first_bytes_of_a_later_line_mean_nothing():
    with pytest.raises(ValueError, match="byte 0xff after ''; save the file as UTF-8"):
        decode(b"\xff\xfea", is_first=False)
