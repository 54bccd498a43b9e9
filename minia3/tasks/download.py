"""To be written."""

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte
INFLATED = 100  # a zip's member may be so many times the archive; texts become four times as long
HUB = "https://huggingface.co/datasets/"


def download(sources, folder):
    """Put the files of `sources` into `folder`. Raises ValueError, and leaves no part of one, whatever goes wrong."""
    wanted = ", ".join(name for source in sources for name in source.files)
    for source in reversed(sources):  # train is last, here and below: where it is, the others are
        try:
            contents = fetch_source(source)
            folder.mkdir(parents=True, exist_ok=True)
            # Only whole files leave this process's own folder, by a rename: nothing half-written is ever seen.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
                for name, content in reversed(contents.items()):
                    if not (target := folder / name).exists():  # what somebody put there stays
                        Path(scratch, name).write_bytes(content)
                        os.replace(Path(scratch, name), target)
        except Exception as error:  # the network's, the disk's, a zip's: of many kinds
            what = (
                " ".join(str(error).split()) or type(error).__name__
            )  # one line, whatever a server answered
            raise ValueError(
                f"{source.address}: {what:.300}; or put {wanted} into {folder} by hand"
            ) from error


def fetch_source(source):
    """The content of each file of a source, by its name in the folder."""
    if source.address.startswith(HUB):
        from huggingface_hub import hf_hub_download

        repo, get = source.address.removeprefix(HUB), hf_hub_download
        return {
            name: Path(get(repo, file, repo_type="dataset")).read_bytes()
            for name, file in source.files.items()
        }
    if not source.sha256:
        raise ValueError("the authors give these files to those who ask there")
    content, bar = bytearray(), {"total": source.bytes, "desc": source.address, "disable": None}
    with (
        urlopen(source.address, timeout=TIMEOUT) as file,
        tqdm.wrapattr(file, "read", **bar) as body,
    ):
        while len(content) <= source.bytes and (chunk := body.read(1 << 16)):
            content += chunk
    expected = f"{source.bytes} bytes of sha256 {source.sha256}"
    if (
        found := f"{len(content)} bytes of sha256 {hashlib.sha256(content).hexdigest()}"
    ) != expected:
        raise ValueError(f"found {found}, expected {expected}")
    if not source.address.endswith(".zip"):
        return dict.fromkeys(source.files, content)
    file, most = zipfile.ZipFile(io.BytesIO(content)), INFLATED * source.bytes
    if bad := [
        member for member in source.files.values() if file.getinfo(member).file_size >= most
    ]:
        raise ValueError(f"found {most} bytes or more in the zip's {', '.join(bad)}, expected less")
    return {name: file.read(member) for name, member in source.files.items()}
