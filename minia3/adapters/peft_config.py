"""The keys of PEFT's adapter_config.json. Each is read, harmless or refused.

A key that is none of these may change what the adapter computes, so we warn of it by name. The
tables hold all keys of PEFT's IA3Config and LoraConfig; a test compares them.
"""

import re
import sys
import warnings

from minia3.adapters.vector_names import PREFIX, SUFFIX

# fmt: off
# Keys that are read
READ = ("peft_type", "base_model_name_or_path")

# Keys that change nothing -> why
HARMLESS = {
    "task_type":                "the base model decides what is done with it",
    "auto_mapping":             "for models that PEFT does not know by themselves",
    "peft_version":             "says who wrote the file",
    "revision":                 "says where the base model comes from",
    "inference_mode":           "whether PEFT trains it; here, a flag decides",
    "target_modules":           "the names of the tensors say the same (check_targets)",
    "exclude_modules":          "the names of the tensors say the same (check_targets)",
    "feedforward_modules":      "the shape of a vector says whether it scales an input",
    "fan_in_fan_out":           "PEFT itself corrects it for a linear",
    "init_ia3_weights":         "the values before training",
    "runtime_config":           "where PEFT computes",
}
LORA_HARMLESS = HARMLESS | {
    "lora_dropout":             "in training only, and ours has none",
    "layers_to_transform":      "the names of the tensors say which layers have an adapter",
    "layers_pattern":           "the names of the tensors say which layers have an adapter",
    "merge_weights":            "in files of PEFT 0.2: when it added B A to the weight",
    "loftq_config":             "belongs to an init_lora_weights that is refused",
    "eva_config":               "the values of A before training",
    "corda_config":             "belongs to an init_lora_weights that is refused",
    "astra_config":             "belongs to an init_lora_weights that is refused",
    "lora_ga_config":           "belongs to an init_lora_weights that is refused",
    "megatron_core":            "read only with a megatron_config",
    "qalora_group_size":        "read only with use_qalora",
    "ensure_weight_tying":      "for adapters of embeddings, which are refused",
    "velora_config":            "how gradients are computed in training",
}

# Keys that change the equation, or the places where it applies -> the values that ask for nothing.
# (0 equals False.)
REFUSED = {
    "modules_to_save":          (None, [], False),
}
LORA_REFUSED = REFUSED | {
    "bias":                     (None, "none", False),
    "enable_lora":              (None, [], False),  # in files of PEFT 0.2: for parts of a linear
    # The others start from the weights of the base, which some of them change.
    "init_lora_weights":        (None, True, False, "gaussian", "orthogonal", "eva"),
    "use_rslora":               (None, False, True),  # True: `load_lora` computes the scale
    "use_dora":                 (None, False),
    "use_qalora":               (None, False),
    "use_bdlora":               (None, False),
    "lora_bias":                (None, False),
    "rank_pattern":             (None, {}, False),
    "alpha_pattern":            (None, {}, False),
    "alora_invocation_tokens":  (None, [], False),
    "trainable_token_indices":  (None, [], {}, False),
    "target_parameters":        (None, [], False),
    "layer_replication":        (None, [], False),
    "megatron_config":          (None, {}, False),
    "arrow_config":             (None, {}, False),
    "kasa_config":              (None, {}, False),
    "monteclora_config":        (None, {}, False),
}
# fmt: on


def check_ia3_config(folder, config):
    """Raise ValueError unless the config is of a plain (IA)^3 adapter. Warn of unknown keys."""
    found = other_values(config, {"peft_type": ("IA3",), **REFUSED})
    if found:
        raise ValueError(f"{folder}: expected plain (IA)^3, found {', '.join(found)}")
    warn_of_unknown(folder, config, {*READ, *HARMLESS, *REFUSED})


def check_lora_config(folder, config):
    """Return (r, lora_alpha) of a LoRA, W x + (lora_alpha / r) B A x. Warn of unknown keys.

    If use_rslora is true, it has the square root of r in place of r: `load_lora` knows this.

    Raise ValueError if the config describes more than this equation, or if a number is missing or
    impossible.
    """
    found = other_values(config, {"peft_type": ("LORA",), **LORA_REFUSED})
    if found:
        raise ValueError(f"{folder}: expected plain LoRA, found {', '.join(found)}")
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{folder}: r is {rank!r:.80}, expected a whole number of 1 or more")
    alpha = config.get("lora_alpha")
    # An integer of a JSON file may be larger than any float. A NaN is not between the limits.
    limit = sys.float_info.max
    if type(alpha) not in (int, float) or not -limit <= alpha <= limit:
        raise ValueError(f"{folder}: lora_alpha is {alpha!r:.80}, expected a finite number")
    warn_of_unknown(folder, config, {*READ, "r", "lora_alpha", *LORA_HARMLESS, *LORA_REFUSED})
    return rank, alpha


def check_targets(config, names):
    """Raise ValueError if the config leaves out a module whose tensors are in the file.

    PEFT would leave these tensors out. names: PEFT's names of the tensors.
    """
    modules = [module_name(name) for name in names]
    excluded = config.get("exclude_modules")
    for module in named_by(excluded, modules):
        found = f"found {excluded!r:.200}"
        raise ValueError(f"expected exclude_modules without {module!r:.200}, {found}")

    targets = config.get("target_modules")
    if targets == "all-linear":
        return
    targeted = set(named_by(targets, modules))
    for module in modules:
        if module not in targeted:
            found = f"found {targets!r:.200}"
            raise ValueError(f"expected target_modules that name {module!r:.200}, {found}")


def module_name(name):
    """Return the name of the module that a tensor of an adapter belongs to."""
    name = name.removeprefix(PREFIX)
    for suffix in (SUFFIX, ".lora_A.weight", ".lora_B.weight"):
        name = name.removesuffix(suffix)
    return name


def named_by(targets, modules):
    """Return the modules that PEFT finds by a list of the ends of names, or by a pattern."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error:
            return []
        return [module for module in modules if pattern.fullmatch(module)]
    if not isinstance(targets, list):
        return []
    ends = tuple(f".{target}" for target in targets)
    return [module for module in modules if f".{module}".endswith(ends)]


def other_values(config, neutral):
    """Return a text for each key whose value is not among the neutral ones."""
    found = []
    for key, values in neutral.items():
        if config.get(key) not in values:
            found.append(f"{key} {config.get(key)!r:.200}")
    return found


def warn_of_unknown(folder, config, known):
    """Warn of keys that are not known, by name."""
    unknown = sorted(config.keys() - known)
    if unknown:
        names = ", ".join(unknown)
        found = f"{folder}/adapter_config.json has keys that minia3 does not know: {names:.300}"
        warnings.warn(f"{found}: if they change the adapter, its results are wrong", stacklevel=2)
