"""Read files that other programs wrote, and say in one line what is wrong with them.

A foreign file may be missing, cut short, an HTML page that a failed download left, or a Git LFS
pointer. The libraries that parse it (json, torch, safetensors, tokenizers, gguf) each fail in their
own way. `reading` turns every failure into a ValueError of one line that begins with the file's
path, because a user's mistake must not end in a traceback:

    with reading(path):
        vocabulary = parse(path.read_bytes())
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

N_SHOWN = 300  # characters of a foreign message: some quote the whole file
N_HEAD = 512  # bytes in which an HTML page or a Git LFS pointer shows

CHUNK = 1 << 20  # bytes that are read at a time to make a checksum

# What `sample_digest` reads of a file: this many blocks of this many bytes
N_SAMPLES = 256
SAMPLE = 1 << 12

# What an error about memory says, if it is not a MemoryError.
MEMORY_SIGNS = (
    "can't allocate memory",
    "out of memory",
    "std::bad_alloc",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def read_json(path):
    """Return the object in a JSON file as a dict. Raise ValueError if there is no such object."""
    with reading(path):
        value = json.loads(Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def sha256(path):
    """Return the checksum of a file, without reading it into memory as a whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sample_digest(paths):
    """Return a checksum of the sizes of files, and of blocks all over them.

    It is for files of gigabytes, and takes milliseconds. A file of up to a megabyte counts whole.
    Raise ValueError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{size}\n".encode())
            for i in range(N_SAMPLES):
                start = max(size - SAMPLE, 0) * i // (N_SAMPLES - 1)  # the last block ends the file
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


@contextmanager
def reading(origin, damage="damaged or cut short", extra=None, is_bounded=False):
    """Turn whatever goes wrong in the block into a ValueError of one line that names `origin`.

    origin: the Path of the file that the block reads, or a name for anything that is not a file.
    damage: what a library's exception means to the user. A plain ValueError keeps its own message.
    extra: the extra of minia3 to suggest if the block imports a package that is not installed.
    is_bounded: whether even a damaged file asks for no more memory than it holds. If memory runs
    out all the same, the file may be good: raise OSError.
    """
    try:
        yield
    except BaseException as error:
        # If the Rust code of tokenizers panics, the exception is not even an Exception.
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise  # KeyboardInterrupt, SystemExit
        if is_bounded and is_out_of_memory(error):
            raise OSError(f"{origin}: not enough memory to read it: {one_line(error)}") from None
        raise ValueError(f"{origin}: {explain(error, origin, damage, extra)}") from None


def explain(error, origin, damage, extra):
    """Return the message of `reading` for an exception, without the origin."""
    if isinstance(origin, Path) and not origin.is_dir():
        problem = problem_of_file(origin)
        if problem:  # which says more than a parser's complaint about the content
            return problem
    message = one_line(error)
    if extra and isinstance(error, ImportError):
        return f"{message}: pip install 'minia3[{extra}]'"
    # Not isinstance, because a subclass such as UnicodeDecodeError does not speak for itself.
    if type(error) is ValueError:
        return message
    # Only the first sentence, because torch.load goes on to recommend weights_only=False.
    first_sentence = message.split(". ")[0]
    return f"{damage}: {type(error).__name__}: {first_sentence}"


def problem_of_file(path):
    """Return why this cannot be the file that its name promises, or "" if it can.

    It may be missing, empty, a Git LFS pointer or an HTML page.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(N_HEAD)
    except FileNotFoundError:
        return broken_link(path) or "not found"
    except OSError as error:
        return error.strerror or one_line(error)  # str(error) repeats the path
    if not head:
        return "the file is empty"
    return problem_of_content(head)


def broken_link(path):
    """Return "a broken link to ..." if a path is a link that leads nowhere, or "".

    A copy of the hub's cache has such links, and so has a folder on a disk that is not mounted.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return f"a broken link to {os.readlink(path)}"
    return ""


def check_link(path):
    """Raise ValueError if a path is a broken link, which would be taken for no file."""
    link = broken_link(path)
    if link:
        raise ValueError(f"{path}: {link}")


def problem_of_content(head):
    """Return why a file that begins with these bytes was not downloaded, or "" if it was."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page in place of the file: the download went wrong"
    return ""


def is_out_of_memory(error):
    """Return whether an exception says that there is not enough memory, on a GPU or on a CPU."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # PyTorch's errors about memory are of this class
        return False
    # torch.save says that a file has no end, and hides that there was no memory for it.
    is_hidden = isinstance(error.__context__, MemoryError)
    return is_hidden or any(sign in str(error) for sign in MEMORY_SIGNS)


def one_line(error):
    """Return the message of an exception in one line, or its type if the message is empty."""
    message = " ".join(str(error).split())
    return message[:N_SHOWN] or type(error).__name__
