"""The keys of config.json that do not change what a model computes, each with the reason.

Every key of a config is used or refused (config_t5.py, config_llama.py), or harmless (here). A key
that is none of these may change the model in a way that we do not know, so we warn of it by name.
"""

import warnings

FOR_REFERENCE = "it says where the files come from"
FOR_CLASSIFIERS = "it names the classes of a classifier, and these models have no such head"
FOR_GENERATION = "it is a default of transformers' generate(); here, decoding has its own arguments"
FOR_PYTHON = "it says what a call in transformers returns, and not what it computes"
FOR_SPEED = "it chooses another way to compute the same numbers"
FOR_TRAINING = "it is used only before or during the first training"
NEVER_READ = "transformers reads it for other architectures, and never for these"
N_SHOWN = 20  # unknown keys that a warning names

# fmt: off
HARMLESS = {
    "_name_or_path":                    FOR_REFERENCE,
    "_commit_hash":                     FOR_REFERENCE,
    "architectures":                    "model_type decides, and the tensors must fit",
    "auto_map":                         "code that comes with a checkpoint is never executed",
    "custom_pipelines":                 "code that comes with a checkpoint is never executed",
    "dtype":                            "each tensor says how it is stored",
    "torch_dtype":                      "each tensor says how it is stored",
    "finetuning_task":                  FOR_REFERENCE,
    "transformers_version":             FOR_REFERENCE,
    "adapters":                         FOR_REFERENCE,
    "unsloth_version":                  FOR_REFERENCE,
    "unsloth_fixed":                    FOR_REFERENCE,
    "transformers.js_config":           "it is read by another program",
    "tokenizer_class":                  "the tokenizer's own files say what it is",
    "sep_token_id":                     NEVER_READ,
    "prefix":                           "it is a text for pipelines of transformers",
    "task_specific_params":             "it holds prompts and arguments for pipelines of transformers",

    "id2label":                         FOR_CLASSIFIERS,
    "label2id":                         FOR_CLASSIFIERS,
    "num_labels":                       FOR_CLASSIFIERS,
    "_num_labels":                      FOR_CLASSIFIERS,
    "problem_type":                     FOR_CLASSIFIERS,
    "classifier_dropout":               FOR_CLASSIFIERS,

    "output_attentions":                FOR_PYTHON,
    "output_hidden_states":             FOR_PYTHON,
    "output_past":                      FOR_PYTHON,
    "output_scores":                    FOR_PYTHON,
    "return_dict":                      FOR_PYTHON,
    "return_dict_in_generate":          FOR_PYTHON,
    "use_return_dict":                  FOR_PYTHON,
    "torchscript":                      FOR_PYTHON,
    "use_cache":                        "a cache changes the speed, and not the numbers",

    "attn_implementation":              FOR_SPEED,
    "_attn_implementation":             FOR_SPEED,
    "_attn_implementation_internal":    FOR_SPEED,
    "_attn_implementation_autoset":     FOR_SPEED,
    "_experts_implementation":          FOR_SPEED,
    "chunk_size_feed_forward":          FOR_SPEED,
    "pretraining_tp":                   FOR_SPEED,
    "gradient_checkpointing":           FOR_SPEED,
    "use_bfloat16":                     "each tensor says how it is stored",
    "tf_legacy_loss":                   FOR_TRAINING,

    "initializer_range":                FOR_TRAINING,
    "initializer_factor":               FOR_TRAINING,

    "is_decoder":                       NEVER_READ,
    "add_cross_attention":              NEVER_READ,
    "cross_attention_hidden_size":      NEVER_READ,
    "tie_encoder_decoder":              NEVER_READ,

    "max_length":                       FOR_GENERATION,
    "min_length":                       FOR_GENERATION,
    "do_sample":                        FOR_GENERATION,
    "early_stopping":                   FOR_GENERATION,
    "num_beams":                        FOR_GENERATION,
    "num_beam_groups":                  FOR_GENERATION,
    "diversity_penalty":                FOR_GENERATION,
    "temperature":                      FOR_GENERATION,
    "top_k":                            FOR_GENERATION,
    "top_p":                            FOR_GENERATION,
    "typical_p":                        FOR_GENERATION,
    "repetition_penalty":               FOR_GENERATION,
    "length_penalty":                   FOR_GENERATION,
    "no_repeat_ngram_size":             FOR_GENERATION,
    "encoder_no_repeat_ngram_size":     FOR_GENERATION,
    "bad_words_ids":                    FOR_GENERATION,
    "num_return_sequences":             FOR_GENERATION,
    "forced_bos_token_id":              FOR_GENERATION,
    "forced_eos_token_id":              FOR_GENERATION,
    "remove_invalid_values":            FOR_GENERATION,
    "exponential_decay_length_penalty": FOR_GENERATION,
    "suppress_tokens":                  FOR_GENERATION,
    "begin_suppress_tokens":            FOR_GENERATION,
}
# fmt: on


def warn_of_unknown(raw, known):
    """Warn, by name, of the keys of a config.json that are neither `known` nor harmless."""
    unknown = [key for key in raw if key not in known and key not in HARMLESS]
    if unknown:
        shown = ", ".join(f"{key:.80}" for key in unknown[:N_SHOWN])
        found = f"config.json: unknown keys, which are passed over: {shown}"
        advice = "if one of them changes the model, the results are wrong"
        warnings.warn(f"{found}; {advice}", stacklevel=2)
