"""Checks that the configs of all architectures share.

They use `type(x) is int` and not isinstance, because True is an instance of int.
"""

# The least and the greatest value of a number, if a table of limits does not say.
OTHER_LIMITS = (1, 2**20)

# Limits that no architecture has for itself
SHARED_LIMITS = {"pad_token_id": (-1, 2**31)}  # -1 means "no such token"


def refuse_unsupported(refused):
    """Raise ValueError if there are texts in `refused`, one for each setting."""
    if refused:
        raise ValueError(f"config.json asks for what minia3 does not support: {', '.join(refused)}")


def unsupported(stated, supported):
    """Return a text for each setting whose value is not among the supported ones.

    supported: a dict from keys to the values with which our code computes the same as the model of
        the file. None stands for absent or null.
    """
    refused = []
    for key, values in supported.items():
        if stated.get(key) not in values:
            refused.append(f"{key}={stated.get(key)!r}")
    return refused


def without_nulls(stated, same_as):
    """Return the settings that are not null, completed by what follows from other keys.

    same_as: if a key is absent or null, it takes the value of another key.
    """
    settings = {key: value for key, value in stated.items() if value is not None}
    for key, other in same_as.items():
        if key not in settings and other in settings:
            settings[key] = settings[other]
    return settings


def end_ids(stated, default):
    """Return a list of the ids that end a text. Null means none. Without the key, use `default`."""
    ids = stated.get("eos_token_id", list(default))
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def wrong_ids(settings, keys):
    """Return a text for each id that is not a whole number."""
    faults = []
    if not all(type(i) is int for i in settings["eos_token_id"]):
        faults.append(f"eos_token_id is {settings['eos_token_id']!r}, expected whole numbers")
    for key in keys:
        if key in settings and type(settings[key]) is not int:
            faults.append(f"{key} is {settings[key]!r}, expected a whole number")
    return faults


def wrong_numbers(numbers, limits):
    """Return a text for each number that is missing, of the wrong type or out of its limits.

    limits: a dict from keys to the least and the greatest value. Fractions are allowed if the
        limits are floats. All published models stay far below the limits, which keep a damaged file
        from filling the memory.
    """
    faults = []
    for key, value in numbers.items():
        least, greatest = (SHARED_LIMITS | limits).get(key, OTHER_LIMITS)
        kind = "a whole number" if type(least) is int else "a number"
        is_number = type(value) in (int, type(least))
        if not is_number or not least <= value <= greatest:
            faults.append(f"{key} is {value!r}, expected {kind} from {least} to {greatest}")
    return faults


def raise_if_any(faults):
    if faults:
        raise ValueError(f"config.json: {'; '.join(faults)}")


def read_numbers(settings, names, config_class):
    """Return a dict from config.json's keys to numbers: the file's, or the default, or None."""
    numbers = {}
    for key, ours in names.items():
        default = getattr(config_class, ours, None)  # the default of the dataclass
        numbers[key] = settings.get(key, default)
    return numbers
