"""Checks that the configs of all architectures share.

They use `type(x) is int` and not isinstance, because True is an instance of int.
"""

import warnings

from minia3.checkpoints import generation_keys

# The least and the greatest value of a number, if a table of limits does not say.
OTHER_LIMITS = (1, 2**20)

# Limits that no architecture has for itself
SHARED_LIMITS = {"pad_token_id": (-1, 2**31)}  # -1 means "no such token"

# fmt: off
# Keys of config.json that are passed over, because they change no logits -> why
HARMLESS = {
    # What the file is, and who wrote it
    "model_type":               "decides the architecture, before other keys are read",
    "architectures":            "names the class; the tensors show what the file holds",
    "auto_map":                 "names code in the repository, which is never run",
    "custom_pipelines":         "names code in the repository, which is never run",
    "transformers_version":     "says who wrote the file",
    "_name_or_path":            "says where the weights come from",
    "_commit_hash":             "says where the weights come from",
    "torch_dtype":              "the dtype of the stored tensors counts, or --dtype",
    "dtype":                    "the dtype of the stored tensors counts, or --dtype",
    "use_bfloat16":             "for TPUs; the dtype of the stored tensors counts",
    "quantization_config":      "nf4_files.py reads or refuses it",
    # How another program computes the same
    "use_cache":                "the logits are the same with and without a cache",
    "output_past":              "an old name of use_cache",
    "return_dict":              "the form of the output in transformers",
    "return_dict_in_generate":  "the form of the output in transformers",
    "output_attentions":        "the form of the output in transformers",
    "output_hidden_states":     "the form of the output in transformers",
    "output_scores":            "the form of the output in transformers",
    "torchscript":              "how transformers exports a model",
    "xla_device":               "how transformers exports a model",
    "tf_legacy_loss":           "TensorFlow's loss",
    "chunk_size_feed_forward":  "computes the feed-forward in parts, with the same result",
    "gradient_checkpointing":   "recomputes in training, with the same result",
    "attn_implementation":      "which kernel computes the attention",
    "_attn_implementation":     "which kernel computes the attention",
    "_attn_implementation_autoset": "which kernel computes the attention",
    "_attn_implementation_internal": "which kernel computes the attention",
    "_experts_implementation":  "which kernel computes experts; these models have none",
    # What begins a training from scratch
    "initializer_range":        "the weights come from the file",
    "initializer_factor":       "the weights come from the file",
    # Classification heads, which a text-to-text model does not have
    "id2label":                 "names the classes of a classification head",
    "label2id":                 "names the classes of a classification head",
    "num_labels":               "counts the classes of a classification head",
    "problem_type":             "the loss of a classification head",
    "classifier_dropout":       "the dropout of a classification head",
    "finetuning_task":          "names a task",
    # Texts and tokens, which the tokenizer's files decide
    "tokenizer_class":          "the tokenizer's files decide",
    "prefix":                   "transformers 2 put it before a prompt in pipelines",
    "task_specific_params":     "settings of pipelines, which nobody else applies",
    "bos_token_id":             "the tokenizer reads it",
    "sep_token_id":             "no text-to-text model uses it",
    # How long texts may be
    "n_positions":              "T5 has no limit: positions are distances",
}
# fmt: on


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
            refused.append(f"{key}={stated.get(key)!r:.80}")
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
        faults.append(f"eos_token_id is {settings['eos_token_id']!r:.80}, expected whole numbers")
    for key in keys:
        if key in settings and type(settings[key]) is not int:
            faults.append(f"{key} is {settings[key]!r:.80}, expected a whole number")
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
            faults.append(f"{key} is {value!r:.80}, expected {kind} from {least} to {greatest}")
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


def check_keys(raw, origin, *known):
    """Check the keys that have to do with writing, and warn of keys that nobody knows.

    raw: the content of a config.json. known: tables of the architecture, whose keys are known, in
        addition to the keys of HARMLESS and of generation_keys.py.
    Raise ValueError if tokens are forced or forbidden.
    """
    generation_keys.check_generation_keys(raw, origin)
    all_known = {*HARMLESS, *generation_keys.USED, *generation_keys.ALL}.union(*known)
    unknown = sorted(raw.keys() - all_known)
    if unknown:
        names = ", ".join(unknown)
        effect = "if they change the model, its results are wrong"
        warnings.warn(
            f"{origin} has keys that minia3 does not know: {names:.300}: {effect}", stacklevel=2
        )
