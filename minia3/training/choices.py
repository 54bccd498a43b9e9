"""The values among which flags choose: names alone, so that importing needs no torch."""

METHODS = ("ia3", "lora", "full", "none", "icl")  # methods.py says what each one trains
TRAINED = ("ia3", "lora", "full")
TRAINED_ALONE = ("lora", "full")  # these change the model itself, so cells cannot share one
OPTIMIZERS = ("adafactor", "adamw")
LOSSES = ("lm", "ul", "ln")  # see losses.py
DTYPES = ("float32", "bfloat16", "float16", "float64")  # float16: not for T5
QUANTIZED = ("int8", "nf4")  # see minia3/model/quantized.py
TRACKERS = ("tensorboard", "wandb", "mlflow")  # see trackers.py

# The name of a chat template among the checksums of config.json, whose other names are data files
CHAT_TEMPLATE = "--chat-template"
