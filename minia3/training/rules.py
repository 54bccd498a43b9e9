"""Rules about combinations of flags: which ones need each other, and which ones do not mix."""

from minia3.files.messages import plural
from minia3.training.choices import TRAINED_ALONE
from minia3.training.flags import check_flags, option

BELONGS_TO = {  # flag -> the only method that uses it
    "sites": "ia3",
    "layers": "ia3",
    "no_cross": "ia3",
    "rank": "lora",
    "alpha": "lora",
    "where": "lora",
}


def check_config(config):
    """Raise ValueError if a flag has a bad value, or does not go with another flag."""
    check_flags(config)
    if config.log_to is not None and config.eval_only and config.out is None:
        raise ValueError("--log-to needs the folder of a run: give --out, too")
    check_evaluations(config)
    if is_given(config, "cap") and config.adapters != "one":
        raise ValueError("--cap limits the rows of a mixture's tasks: give --adapters one, too")
    for name, method in BELONGS_TO.items():
        if is_given(config, name):
            check_belongs(config, name, method)
    if config.method == "icl" and config.shots is None:
        raise ValueError(
            "--method icl puts examples before each input: give their number with --shots"
        )
    if config.weight_decay and config.method == "ia3" and config.optimizer != "adamw":
        raise ValueError("--weight-decay is for --optimizer adamw: give it, too")
    if config.method in TRAINED_ALONE:
        check_trained_weights(config)
    if config.compile and divides(config):
        reason = "what is compiled would gather the blocks again and again"
        raise ValueError(f"--compile does not go with --shard or --offload ({reason})")


def check_evaluations(config):
    """Raise ValueError if a flag about evaluations on held-out rows does nothing."""
    if config.patience and not config.eval_every:
        raise ValueError("--patience counts evaluations on held-out rows: give --eval-every, too")
    if config.epochs is None:
        check_first_evaluation(config)  # else, `set_steps` does it


def check_first_evaluation(config):
    """Raise ValueError if a new run has fewer steps than --eval-every.

    This is probably a mistake: rows would be held out, and the evaluation of the last step alone
    would have nothing to choose from. A run that has begun already may be made longer.
    """
    is_new = config.resume is None
    if is_new and config.is_training and config.eval_every > config.steps:
        raise ValueError(
            f"--eval-every is {config.eval_every}, and the run has {config.steps} "
            f"{plural(config.steps, 'step')}: expected at most {config.steps}"
        )


def check_trained_weights(config):
    """Raise ValueError if a flag does not suit a method that trains weights, or adds to them."""
    if config.quantize:
        reason = "weights that train, or that a LoRA is added to, must be plain"
        raise ValueError(f"--quantize is not for --method {config.method} ({reason})")
    if divides(config):
        name = "--offload" if config.offload else "--shard"
        reason = "only a frozen base is divided, and this method trains or changes it"
        raise ValueError(f"{name} is not for --method {config.method} ({reason})")
    if config.optimizer == "adafactor":
        # LoRA's B starts at zero and would hardly leave it. Full fine-tuning would need Adafactor
        # to factor the second moments of matrices, and ours does not.
        reason = "its steps are proportional to a parameter's size, and LoRA's B starts at 0"
        raise ValueError(
            f"--optimizer adafactor is for --method ia3 ({reason}): use --optimizer adamw"
        )
    if config.method == "full" and config.dtype == "float16":
        reason = "an update of less than a thousandth of a weight is lost in float16"
        raise ValueError(f"--dtype float16 is not for --method full ({reason}): use float32")
    if config.method == "full" and config.adapter:
        raise ValueError("--method full continues from a model: give it as --model, not --adapter")


def divides(config):
    """Return whether the flags ask for a base that is divided, or kept on the CPU."""
    return config.offload or config.shard not in (None, 1)


def check_belongs(config, name, method):
    if config.method != method:
        raise ValueError(f"{option(name)} is for --method {method}, found --method {config.method}")
    if method == "lora" and config.adapter:
        raise ValueError(
            f"{option(name)} is for a new LoRA, but --adapter is a trained one: "
            f"leave out {option(name)}"
        )


def is_given(config, name):
    """Return whether a flag differs from its default."""
    return getattr(config, name) != getattr(type(config), name)
