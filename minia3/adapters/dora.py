"""Write an adapter as a DoRA, for programs that apply DoRA but not (IA)^3.

    (IA)^3    l * (W x)
    DoRA      m / |W + B A| * (W x + B A x)

m is a vector, and |W| has the norm of each row of W. So with B = 0 and m = l * |W|, both are the
same function: this loses nothing but rounding. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv 2402.09353, equation 5; PEFT's `DoraLinearLayer`.

A DoRA scales outputs. So l_ff, which scales the input of the down projection, becomes a factor of
the output of `up`: on a gated feed-forward both are factors of one product. Without a gate there is
no such place.

An adapter cannot be written as a plain LoRA, because diag(l) W - W has full rank.

Shapes: (out, in) of a linear's weight, A is (1, in) and B is (out, 1).
"""

from minia3.adapters.lora import PLAIN
from minia3.adapters.peft_files import any_of, task_type, write_peft
from minia3.adapters.rows import fitting_vectors, warn_of_bases
from minia3.adapters.vector_names import PREFIX
from minia3.checkpoints.known_models import public_name
from minia3.checkpoints.load import open_checkpoint
from minia3.checkpoints.nf4_files import read_as
from minia3.model.site_names import SITES


def write_dora(folder, adapter_file, base, origin):
    """Write an adapter as the PEFT folder of a DoRA.

    adapter_file: an AdapterFile that was read from `origin`. base: the name or path of its model,
    whose weights are read one after the other. Raise ValueError if the adapter does not fit the
    model, or if no DoRA does what the adapter does.
    """
    model, stored, dtype = open_checkpoint(base)
    vectors = fitting_vectors(model, adapter_file, origin)
    warn_of_bases(model, {origin: adapter_file.base})
    factors = factors_of_linears(model, vectors)
    tensors = {}
    linears = []
    for name, factor_out in factors.items():
        stored_name, entry = stored[f"{name}.weight"]
        weight = read_as(entry, dtype)
        linear = stored_name.removesuffix(".weight")
        linears.append(linear)
        magnitude_out = magnitude(weight, factor_out, linear).float()
        tensors[f"{PREFIX}{linear}.lora_A.weight"] = magnitude_out.new_zeros(1, weight.shape[1])
        tensors[f"{PREFIX}{linear}.lora_B.weight"] = magnitude_out.new_zeros(weight.shape[0], 1)
        tensors[f"{PREFIX}{linear}.lora_magnitude_vector"] = magnitude_out
    config = {
        **PLAIN,
        "use_dora": True,
        "r": 1,
        "lora_alpha": 1,
        "inference_mode": True,
        "base_model_name_or_path": public_name(base),
        "task_type": task_type(tensors),
        "target_modules": target_modules(linears, [name for name, _ in stored.values()]),
    }
    write_peft(folder, tensors, config)


def factors_of_linears(model, vectors):
    """Return a dict from the name of each linear to the factor of its outputs (out,).

    vectors: name -> (D,). Raise ValueError if a vector scales something else.
    """
    names = {name for name, _ in model.named_parameters()}
    factors = {}
    for name, vector in vectors.items():
        place, _, site = name.rpartition(".l_")
        linear = f"{place}.{SITES[site]}"
        if site == "ff":
            linear = f"{place}.up"
        if f"{linear}.weight" not in names:
            raise ValueError(
                f"{name} scales the input of a linear, because the feed-forward of this model has "
                "no gate, and a DoRA scales outputs: merge the adapter instead"
            )
        if f"{linear}.bias" in names:
            raise ValueError(
                f"{name} scales the bias of {linear}, too, and PEFT's DoRA does not: merge the "
                "adapter instead"
            )
        factors[linear] = factors.get(linear, 1) * vector.double()
    return factors


def magnitude(weight, factor_out, name):
    """Return (out,) in float64: factor * |W|.

    Raise ValueError if a row of W is zero, because DoRA divides by its norm, or if a magnitude
    exceeds float32, in which the file has it.
    """
    norm_out = weight.double().norm(dim=1)
    if not norm_out.all():
        row = norm_out.tolist().index(0.0)
        raise ValueError(
            f"row {row} of {name} is zero, and a DoRA divides by its norm: "
            "merge the adapter instead"
        )
    magnitude_out = factor_out * norm_out
    is_finite_out = magnitude_out.float().isfinite()
    if not is_finite_out.all():
        row = is_finite_out.tolist().index(False)
        raise ValueError(
            f"row {row} of {name} has a magnitude of {magnitude_out[row]:.3g}, which exceeds "
            "float32: merge the adapter instead"
        )
    return magnitude_out


def target_modules(linears, stored_names):
    """Return PEFT's target_modules: kinds of linears, or an expression if some of a kind have none.

    stored_names: the names of all tensors in the checkpoint.
    """
    kinds = sorted({linear.rpartition(".")[2] for linear in linears})
    endings = tuple(f".{kind}.weight" for kind in kinds)
    n_linears = sum(name.endswith(endings) for name in stored_names)
    return kinds if n_linears == len(linears) else any_of(linears)
