"""Check a file of torch.save before torch.load reads it.

torch.load(weights_only=True) executes nothing from a file, but it trusts the file's sizes:

    a zip archive    It maps the bytes of a record and takes them for numbers. A compressed record,
                     or a record that is shorter than its tensor, gives wrong numbers without an
                     error.
    the old format   It allocates what the pickle asks for before it reads a byte.

So `check_storages` lists the storages that the pickle asks for, and compares them with what the
file holds. It executes nothing either: a class or a function that the pickle names becomes an
`Inert`.
"""

import pickle
import pickletools
import zipfile
from typing import NamedTuple

N_OLD_HEADERS = 3  # pickles before the one with the tensors: magic number, version, platform

DIRECTORY = 0x10  # the attribute of a record that is a directory, as zip takes it from MS-DOS

# Bytes of an element, by the name that a pickle gives to the type of a storage.
ELEMENT_BYTES = {
    "BoolStorage": 1,
    "ByteStorage": 1,
    "CharStorage": 1,
    "ShortStorage": 2,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "IntStorage": 4,
    "FloatStorage": 4,
    "LongStorage": 8,
    "DoubleStorage": 8,
}


class Storage(NamedTuple):
    """The numbers that one or several tensors share, as a pickle asks for them."""

    key: str
    n_bytes: int


class Inert(dict):
    """Stands for any class, function or object that a pickle names. It does nothing."""

    def __init__(self, *arguments, **options):
        super().__init__()

    def __call__(self, *arguments):
        return self

    def __setstate__(self, state):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


# This is the unpickler in Python, because the one in C allocates whatever a size in the file says.
class StorageLister(pickle._Unpickler):
    """Read a pickle for the storages that it asks for."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch" and name in ELEMENT_BYTES:
            return ELEMENT_BYTES[name]
        return Inert

    def persistent_load(self, saved_id):
        """Note a storage: ("storage", type, key, device, number of elements, ...)."""
        kind, element_bytes, key, _, n_elements = saved_id[:5]
        is_known = kind == "storage" and type(element_bytes) is int
        if not is_known or type(n_elements) is not int or n_elements < 0:
            raise ValueError(f"expected tensors of plain numbers, found {saved_id!r:.80}")
        storage = Storage(str(key), element_bytes * n_elements)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"found two sizes of the storage {storage.key!r:.40}")
        return Inert()


def check_storages(path):
    """Raise ValueError if the file does not hold the numbers of its tensors, byte for byte."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_archive(archive)
    else:
        with open(path, "rb") as file:
            check_old_format(file, path.stat().st_size)


def check_checksums(path):
    """Raise an error if a byte of a record is not the one that torch.save wrote.

    This reads the whole file, which `torch.load` does not compare with its checksums.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of the record {damaged!r:.80} is wrong")


def check_archive(archive):
    records = archive.infolist()
    check_records(records)
    for record in records:
        archive.open(record).close()  # which compares the two headers of a record
    pickles = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"expected one data.pkl, found {len(pickles)}")
    with archive.open(pickles[0]) as file:
        _, storages = read_inert(file)
    sizes = {record.filename: record.file_size for record in records}
    root = pickles[0].filename.removesuffix("data.pkl")
    for storage in storages.values():
        n_found = sizes.get(f"{root}data/{storage.key}")
        if n_found != storage.n_bytes:
            raise ValueError(
                f"expected {storage.n_bytes} bytes in the record data/{storage.key:.40}, "
                f"found {n_found}"
            )


def check_records(records):
    """Raise ValueError if a record is compressed, or if two have one name or share bytes."""
    names = {record.filename for record in records}
    if len(names) < len(records):
        raise ValueError("found two records with the same name")
    end = 0  # of the record before
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"the record {record.filename!r:.80} is compressed, which torch.save never does: "
                "load the file with torch.load, and save it with torch.save"
            )
        if record.external_attr & DIRECTORY or record.is_dir():  # torch.load would read nothing
            raise ValueError(f"the record {record.filename!r:.80} is a directory")
        if record.header_offset < end:
            raise ValueError(f"the record {record.filename!r:.80} overlaps with another")
        end = record.header_offset + record.file_size


def check_old_format(file, n_file_bytes):
    for _ in range(N_OLD_HEADERS):
        read_inert(file)
    _, storages = read_inert(file)
    n_bytes = sum(storage.n_bytes for storage in storages.values())
    if n_bytes > n_file_bytes:
        raise ValueError(
            f"damaged or cut short: expected tensors of {n_bytes} bytes, found a file of "
            f"{n_file_bytes}"
        )
    keys, _ = read_inert(file)  # of the storages whose numbers follow
    if sorted(keys) != sorted(storages):
        # torch.load would leave the others as it allocated them, with whatever the memory holds.
        raise ValueError("the file does not hold the numbers of all tensors")


def read_inert(file):
    """Return what the next pickle of a file holds, and key -> Storage for all that it asks for."""
    first = file.tell()
    check_opcodes(file)
    file.seek(first)
    lister = StorageLister(file)
    value = lister.load()
    return value, lister.storages


def check_opcodes(file):
    """Check the next pickle of a file, without reading its values.

    Raise UnpicklingError if it is damaged, or if it has an operation that torch.save never writes.
    """
    try:
        names = {opcode.name for opcode, _, _ in pickletools.genops(file)}
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None
    # A reader of these operations allocates whatever size the file states.
    refused = sorted(name for name in names if name.startswith(("BYTEARRAY", "NEXT_BUFFER", "EXT")))
    if refused:
        raise pickle.UnpicklingError(f"found {refused[0]}, which torch.save does not write")
