"""Choose which vectors train, and add vectors that the paper does not have.

    l_q * (W_q x)        l_o * (W_o x)        l_up * (W_up x)        l_gate * (W_gate x)

These scale the outputs of the other linear layers, for users who need more capacity. A block
has an `Unscaled` in each of these places, and `add_vectors` puts an IA3 there.
"""

import re

import torch

from minia3.model.blocks import Unscaled
from minia3.model.ia3 import IA3, vectors
from minia3.model.site_names import SITE_NAMES, SITES


def possible_vectors(model):
    """Return a dict from the name of each vector that the paper does not have to its width.

    A block may have the vector already, or only a place for it.
    """
    widths = {}
    for name, _ in model.named_modules():
        parent_name, _, attribute = name.rpartition(".")
        if attribute in ("l_q", "l_o", "l_up", "l_gate", "l_wi"):
            linear = getattr(model.get_submodule(parent_name), SITES[attribute.removeprefix("l_")])
            widths[name] = linear.out_features
    return widths


@torch.inference_mode(False)  # see `load_model`
def add_vectors(model, names):
    """Add each vector in `names` that is possible and missing, with a row of ones per adapter."""
    example = next(iter(vectors(model).values()))
    for name, width in possible_vectors(model).items():
        if name in names and isinstance(model.get_submodule(name), Unscaled):
            parent_name, _, attribute = name.rpartition(".")
            vector = IA3(width, model.n_adapters)
            # Not by `vector.to`, which fails if the plan of a step makes fake tensors.
            scale = vector.scale.detach().to(example)
            vector.scale = torch.nn.Parameter(scale, example.requires_grad)
            setattr(model.get_submodule(parent_name), attribute, vector)


def choose_vectors(model, sites, layers, cross=True):
    """Let only the vectors of these sites and layers train, and return name -> parameter for them.

    sites: a list such as "k,v,ff". layers: a list such as "0-5,20-". The encoder and the decoder
    each count from 0. cross: False leaves out the vectors of cross-attention.

    Vectors that the model does not have yet are added. Raise ValueError if a site or a span of
    layers has no vectors, if `layers` has another form, or if there is no cross-attention to leave
    out.
    """
    chosen = matching_names(model, sites, layers, cross)
    add_vectors(model, chosen)
    trained = {}
    for name, vector in vectors(model).items():
        vector.requires_grad_(name in chosen)
        if name in chosen:
            trained[name] = vector
    return trained


def matching_names(model, sites, layers, cross):
    """Return the names of the vectors that `choose_vectors` lets train. Raise its errors."""
    spans = parse_layers(layers)
    check_spans(model, spans)
    asked_sites = sites.split(",")
    chosen = set()
    used_sites = set()
    has_cross = False
    for name in {**vectors(model), **possible_vectors(model)}:
        layer, part, site = re.search(r"blocks\.(\d+)\.(\w+)\.l_(\w+)$", name).groups()
        site = "gate" if site == "wi" else site
        has_cross = has_cross or part == "cross"
        is_in_span = any(int(layer) in span for span in spans.values())
        is_left_out = part == "cross" and not cross
        if is_in_span and site in asked_sites and not is_left_out:
            chosen.add(name)
            used_sites.add(site)

    # Every layer that exists has every site of the model, so no span is without vectors.
    missing = sorted(set(asked_sites) - used_sites)
    if missing:
        found = f"--sites {sites!r} --layers {layers!r}: this model has no vectors for"
        expected = f"expected sites from {','.join(SITE_NAMES)}, and layers as in 0-5,20-"
        raise ValueError(f"{found} {','.join(missing)!r}; {expected}")
    if not cross and not has_cross:
        raise ValueError("--no-cross is for models with cross-attention, and this one has none")
    return chosen


def check_spans(model, spans):
    """Raise ValueError if a span (text -> layers) lies beyond the last layer of the model."""
    names = {**vectors(model), **possible_vectors(model)}
    last = max(int(re.search(r"blocks\.(\d+)", name)[1]) for name in names)
    beyond = [text for text, span in spans.items() if span.start > last]
    if beyond:
        found = f"--layers names {','.join(beyond)}, but this model has layers 0 to {last}"
        raise ValueError(f"{found}: expected some of these, as in 0-{last}")


def parse_layers(text):
    """Return span -> layers, as a range, for each span of a text such as "0-5,8,20-".

    Raise ValueError if the text has another form, or if a span has no layers.
    """
    spans = {}
    for span in text.split(","):
        match = re.fullmatch(r"(\d+)(-?)(\d*)", span)
        if match is None:
            raise ValueError(f"--layers {text!r}: expected layers and spans, as in 0-5,20-")
        first, dash, last = match.groups()
        if last:
            if int(last) < int(first):
                found = f"--layers {text!r}: {span} ends before it begins"
                raise ValueError(f"{found}: did you mean {last}-{first}?")
            spans[span] = range(int(first), int(last) + 1)
        elif dash:
            spans[span] = range(int(first), 10**9)  # up to the last layer
        else:
            spans[span] = range(int(first), int(first) + 1)
    return spans
