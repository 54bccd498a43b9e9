"""What a model costs: the fields of its config that count layers, and FLOPs by the paper's rule."""

# The fields of a config that say how many layers each stack has. All layers of a stack cost the
# same, so what a deep model takes is extrapolated from shallow ones.
LAYER_FIELDS = ("n_layers", "n_decoder_layers")


def flops(n_parameters, n_tokens, decoder_only, training=False):
    """Return the number of floating-point operations for `n_tokens` tokens.

    A token takes a multiplication and an addition for each parameter that it passes (Kaplan et al.
    2020, arXiv 2001.08361). It passes all N parameters of a decoder-only model, which makes 2N
    operations, but only half of an encoder-decoder, which makes N. The backward pass takes twice as
    many as the forward pass, so training takes 6N and 3N.
    """
    per_token = 2 * n_parameters if decoder_only else n_parameters
    if training:
        per_token = 3 * per_token
    return per_token * n_tokens
