"""To be written."""


def flops(n_parameters, n_tokens, decoder_only, training=False):
    """Operations by Kaplan's rule (arXiv 2001.08361), as in the paper: a multiplication and an addition a parameter.

    A token passes all N parameters of a decoder-only model: 2N. Of an encoder-decoder, half: N. Training: 6N and 3N.
    """
    return n_parameters * n_tokens * (2 if decoder_only else 1) * (3 if training else 1)
