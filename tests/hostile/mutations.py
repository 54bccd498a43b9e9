"""Mutations for the fuzz: whatever may happen to a file on its way here, and some things that would
not.

A mutation takes a random generator and the bytes of a file, and returns other bytes. `mutate` does
something to one file of a folder: what fits its format (another value in a JSON object, another
entry in a zip archive), or damage to the bytes as such.
"""

import io
import json
import warnings
import zipfile

# Numbers that are not lengths, counts, offsets or ids of anything
LIES = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    *("", "x", "a\nb", "../x", "/etc/passwd", "\ud800", "a\0b", "x" * 5000),
    *("F32", "F16", "BF16", "I64", "F8_E5M2"),
]
DEEP = 10_000
# Values in JSON's own notation, some of which json.dumps would not write
VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "4.0", "1.5", "1e400", "-1e-300"),
    *("NaN", "Infinity", "-Infinity", "[]", "{}", "[0]", "[0,0]", "[4,6]", "[1,1,1]"),
    *map(str, LIES),
    *("9" * 5000, "[2147483648,4294967296]", '["x"]', "[null,{}]", '{"x":1}'),
    *map(json.dumps, TEXTS),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
]
INSERTIONS = [b"\0", b"\xff", b"\n", b'"', b",", b"\xef\xbb\xbf", b"{", b"]", b"\r", b"\x80" * 12]
NOT_FINITE = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"]  # NaN and infinities as float32


def mutate(rng, folder):
    """Do something to one file of `folder`, and return what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = path.read_bytes()
    chance = rng.random()
    if chance < 0.02:
        path.unlink()
        if chance < 0.01:
            path.mkdir()
            return f"{path.name}: a directory"
        return f"{path.name}: not there"
    if chance < 0.03:
        changed = b""
    elif rng.random() < 0.75:
        mutation = MUTATIONS.get(path.suffix, damage)
        changed = mutation(rng, content)
    else:
        changed = damage(rng, content)
    path.write_bytes(changed)
    first = first_difference(content, changed)
    return f"{path.name}: {len(content)} bytes became {len(changed)}, from {first} on"


def first_difference(content, changed):
    for i, (old, new) in enumerate(zip(content, changed, strict=False)):
        if old != new:
            return i
    return "the end"


# Bytes


def damage(rng, content):
    """Cut, flip bits, overwrite by numbers that lie, leave out, repeat, or put in foreign bytes."""
    data = bytearray(content)
    # Half of the damage falls on the first bytes, because headers are there.
    longest = len(data) if rng.random() < 0.5 else min(len(data), 600)
    at = rng.randrange(longest + 1)
    n = rng.choice([1, 2, 4, 8, 100])
    match rng.randrange(7):
        case 0:
            del data[at:]
        case 1:
            flip_bits(rng, data)
        case 2:
            width = rng.choice([4, 8])
            lie = rng.choice(LIES) % 2 ** (8 * width)
            data[at : at + width] = lie.to_bytes(width, rng.choice(["little", "big"]))
        case 3:
            del data[at : at + n]
        case 4:
            data[at:at] = data[at : at + n]
        case 5:
            data[at : at + n] = rng.randbytes(n)
        case 6:
            data[at:at] = rng.choice(INSERTIONS)
    return bytes(data)


def flip_bits(rng, data):
    for _ in range(rng.choice([1, 1, 3, 20])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def poison(rng, content):
    """Put NaN or infinity in the place of one of the last numbers, which are weights."""
    at = len(content) - 4 * rng.randrange(1, max(len(content) // 8, 2))
    return content[:at] + rng.choice(NOT_FINITE) + content[at + 4 :]


# JSON


class RawJson(str):
    """A value in JSON's own notation."""


def dump(tree):
    """Write JSON. An object is a tuple of pairs, so that it may have a key twice."""
    if isinstance(tree, RawJson):
        return str(tree)
    if isinstance(tree, tuple):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def mutate_json(rng, content):
    """Change one or two places: another value, a key less, twice, or of another name."""
    try:
        tree = json.loads(content, object_pairs_hook=tuple)
    except ValueError:
        return damage(rng, content)
    for _ in range(rng.choice([1, 1, 1, 2])):
        tree = mutate_tree(rng, tree)
    return dump(tree).encode()


def mutate_tree(rng, tree):
    if not isinstance(tree, list | tuple) or not tree or rng.random() < 0.05:
        return RawJson(rng.choice(VALUES))
    items = list(tree)
    at = rng.randrange(len(items))
    chance = rng.random()
    if chance < 0.1:
        items.pop(at)
    elif chance < 0.2:
        items.append(items[at])
    elif isinstance(tree, list):
        items[at] = mutate_tree(rng, items[at])
    else:
        mutate_pair(rng, items, at)
    return type(tree)(items)


def mutate_pair(rng, pairs, at):
    key, value = pairs[at]
    chance = rng.random()
    if chance < 0.125:
        other_key = rng.choice(pairs)[0]
        pairs[at] = (rng.choice(["x", "", "a\nb", key + "x", "../x", other_key]), value)
    elif chance < 0.25:
        pairs.append((key, mutate_tree(rng, value)))  # the same key twice
    else:
        pairs[at] = (key, mutate_tree(rng, value))


def mutate_lines(rng, content):
    """Change one line of JSON Lines. The line ends and the order of the lines stay."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    mutation = mutate_json if rng.random() < 0.7 else damage
    lines[at] = mutation(rng, lines[at])
    return b"\n".join(lines)


# Files of tensors


def mutate_safetensors(rng, content):
    """Change the header, its length, or the numbers."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    numbers = content[8 + length :]
    chance = rng.random()
    if chance < 0.6:
        header = mutate_json(rng, header)
        length = len(header)
    elif chance < 0.7:
        length = rng.choice([*LIES, length - 1, length + 1, length + 8, len(content) - 8])
    elif chance < 0.8:
        return poison(rng, content)
    else:
        return damage(rng, content)
    return length.to_bytes(8, "little") + header + numbers


def mutate_zip(rng, content):
    """Damage the archive, or change its entries and pack them again, with right checksums."""
    if rng.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(content)):
        return damage(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(entries))
    if rng.random() < 0.5:
        at = pickle_entry(entries, at)
    mutate_entries(rng, entries, at)
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w", rng.choice([0, 8])) as archive:
        warnings.simplefilter("ignore")  # a name may be there twice
        for name, body in entries:
            archive.writestr(name, body)
    return packed.getvalue()


def pickle_entry(entries, default):
    """Return the position of torch's pickle, which says where each tensor is, or `default`."""
    for i, (name, _) in enumerate(entries):
        if name.endswith(".pkl"):
            return i
    return default


def mutate_entries(rng, entries, at):
    name, body = entries[at]
    match rng.randrange(6):
        case 0:
            entries.append(("../" * rng.randrange(3) + name, body))
        case 1:
            entries.pop(at)
        case 2:
            entries[at] = (name, bytes(1 << 21))
        case 3:
            entries[at] = (name, poison(rng, body))
        case _:
            entries[at] = (name, damage(rng, body))


MUTATIONS = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".bin": mutate_zip,
    ".pt": mutate_zip,
    ".pth": mutate_zip,
    ".zip": mutate_zip,
    ".jsonl": mutate_lines,
}
