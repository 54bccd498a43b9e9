"""What a model costs to run, by the rule that the paper uses."""


def flops(n_parameters, n_tokens, decoder_only, training=False):
    """Return the operations that `n_tokens` cost: a multiplication and an addition per parameter.

    Kaplan et al. 2020, arXiv 2001.08361. A token passes all N parameters of a decoder-only model:
    2N operations. It passes half of an encoder-decoder: N. The backward pass costs twice as much
    again, so training costs 6N and 3N.
    """
    per_token = 2 * n_parameters if decoder_only else n_parameters
    if training:
        per_token = 3 * per_token
    return per_token * n_tokens
