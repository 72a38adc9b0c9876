"""Tables for a person: a model's parts with their costs, and the model's cost with each attention."""

import ast
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from castling_jax.errors import InputError, takes
from castling_jax.models.attention.kinds import BUILT_IN, FORMS
from castling_jax.models.macs import Cost, count_costs
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model, attentions_of, list_models
from castling_jax.models.variables import MODEL, count_parameters, flatten, get_variables
from castling_jax.sizes import image_shape
from castling_jax.tables import aligned

# The tables' names for the parts; a registered attention's part has the attention's name.
PART_NAMES = {
    "patch_embed": "patch embedding",
    "stem": "stem",
    "shortcut": "skip path's projections",
    "qkv": "projections to q, k and v",
    "pool": "pooling of q, k and v",
    "relative_positions": "relative positions of the softmax",
    "masked_softmax": "softmax branch: Q K^T and (M * P) V",
    "linear_angular": "linear-angular: K^T V and Q (K^T V)",
    "softmax": "softmax: Q K^T and P V",
    "angular": "exact kernel: Q K^T and Sim V",
    "relu_linear": "ReLU linear: K^T V and Q (K^T V)",
    "separable": "separable: context vector",
    "focused_linear": "focused linear: K^T V and Q (K^T V)",
    "taylor_branch": "Taylor's sparse branch: Q K^T and (M * (P - T)) V",
    "linear_taylor": "linear Taylor: K^T V and Q (K^T V)",
    "performer": "performer: features, K^T V and Q (K^T V)",
    "token_kernel": "token kernel's taps",
    "proj": "output projections",
    "mlp": "MLPs",
    "pyramid": "pyramid of one map",
    "neck": "neck",
    "head": "heads",
    "decoder": "decoder, without its blocks",
    "other": "other",
}
SIZE_HEADER = ("parameters", "MACs", "activations")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's number of parameters, and the costs of its parts, from `count_costs`."""

    parameters: int
    parts: dict[str, Cost]

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())


def measure(model: Model) -> Size:
    """The model's number of parameters, and the cost of one image of the model's size."""
    return Size(count_parameters(get_variables(model)), count_costs(model))


def compare(name: str, chosen: str, **arguments: Any) -> dict[tuple[str, tuple[str, ...]], Size]:
    """A model's size with every attention that fits it and its arguments: (attention, forms of this size) -> size.

    What the attention `chosen` raises is raised; others that raise are left out.
    """
    sizes: dict[tuple[str, tuple[str, ...]], Size] = {}
    for attention in attentions_of(name):
        try:
            models = [abstract_model(name, attention=attention, form=form, **arguments) for form in FORMS]
            train, inference = map(measure, models)
        except Exception as error:
            # An attention may not take one of the arguments, such as mask_kind. One that a user has registered may be
            # for another backbone, and raise anything.
            if attention != chosen and (isinstance(error, InputError) or attention not in BUILT_IN):
                continue
            raise
        # Most kinds compute the same in both forms: they get one row.
        if train == inference:
            sizes[attention, FORMS] = train
        else:
            sizes |= {(attention, ("train",)): train, (attention, ("inference",)): inference}
    return sizes


@dataclasses.dataclass(frozen=True)
class Module:
    """The parameters of modules with the same shapes; in `path` a range, such as 0-11, replaces the block's number."""

    path: str
    arrays: dict[str, tuple[int, ...]]
    parameters: int


def list_modules(model: Model) -> list[Module]:
    """The parameters by module. Modules of several blocks with the same shapes share one entry."""
    shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for path, leaf in flatten(get_variables(model)["params"]).items():
        *parents, array = path.split("/")
        shapes.setdefault(tuple(parents), {})[array] = leaf.shape
    alike: dict[Any, list[tuple[str, ...]]] = {}
    for holder, arrays in shapes.items():
        block = _block_position(holder)
        rest = holder if block is None else (holder[:block], holder[block + 1 :])  # all but the block's number
        alike.setdefault((rest, tuple(arrays.items())), []).append(holder)
    modules = []
    for holders in alike.values():
        arrays = shapes[holders[0]]
        modules.append(Module(_joint_path(holders), arrays, len(holders) * sum(map(math.prod, arrays.values()))))
    return sorted(modules, key=lambda module: module.path)


def _block_position(holder: tuple[str, ...]) -> int | None:
    """The place of the innermost number in the path."""
    return next((i for i in reversed(range(len(holder))) if holder[i].isdigit()), None)


def _joint_path(holders: list[tuple[str, ...]]) -> str:
    first, block = holders[0], _block_position(holders[0])
    if block is None or len(holders) == 1:
        return "/".join(first)
    # A range only where it names no block of another shape.
    numbers = sorted(int(holder[block]) for holder in holders)
    in_a_row = numbers[-1] - numbers[0] == len(numbers) - 1
    span = f"{numbers[0]}-{numbers[-1]}" if in_a_row else ",".join(map(str, numbers))
    return "/".join([*first[:block], span, *first[block + 1 :]])


@takes(model=MODEL)
def describe(model: Model) -> str:
    """A model's parameters, MACs and activations, in three tables for a person.

    The first table compares the attentions that take the model's arguments, the second lists the model's parts, and the
    third its modules. The model is traced, and nothing is computed.
    """
    arguments = model.spec.arguments()
    name, attention, form = (arguments.pop(word) for word in ("name", "attention", "form"))
    sizes = compare(name, attention, **arguments)
    comparison = [("attention", "form", *SIZE_HEADER)]
    for (kind, forms), size in sizes.items():
        comparison.append((kind, " and ".join(forms), *_size_cells(size)))

    chosen = next(size for (kind, forms), size in sizes.items() if kind == attention and form in forms)
    parts = [("part", "MACs", "share", "activations")]
    for part, cost in [*chosen.parts.items(), ("all", chosen.total)]:
        share = f"{100 * cost.macs / chosen.total.macs:.1f} %"
        parts.append((PART_NAMES.get(part, part), _millions(cost.macs), share, _millions(cost.activations)))

    parameters = [("module", "arrays", "parameters")]
    for module in list_modules(model):
        arrays = ", ".join(f"{array} {list(shape)}" for array, shape in module.arrays.items())
        parameters.append((module.path, arrays, f"{module.parameters:,}"))
    parameters.append(("all", "", f"{chosen.parameters:,}"))

    spec, variables = model.spec, get_variables(model)
    height, width = image_shape(spec.image_size)
    text = [
        f"{name}, {height} x {width} pixels, {spec.num_classes:,} classes"
        + "".join(f", {word}={value!r}" for word, value in spec.overrides),
        "\n".join(aligned(comparison, "llr")),
        f"{attention}, form {form}: one image's forward pass",
        "\n".join(aligned(parts, "lr")),
        f"{attention}, form {form}: parameters",
        "\n".join(aligned(parameters, "llr")),
    ]
    branch = sum(leaf.size for path, leaf in flatten(variables).items() if "softmax_branch" in path.split("/"))
    if branch:
        text.append(f"The switch drops {branch:,} of these, under softmax_branch.")
    if statistics := sum(leaf.size for leaf in flatten(variables.get("batch_stats", {})).values()):
        text.append(f"Beside them are {statistics:,} running statistics of batch norm.")
    return "\n\n".join(text)


def describe_all() -> Iterator[str]:
    """A header, then three lines for each model: with softmax attention, and in castling's two forms."""
    widths = (14, 22, 14, 14, 14)
    yield from aligned([("model", "attention", *SIZE_HEADER)], "llr", widths=widths)
    for name in list_models():
        for attention, form in [("softmax", "train"), ("castling", "train"), ("castling", "inference")]:
            size = measure(abstract_model(name, attention=attention, form=form))
            kind = f"castling, {form}" if attention == "castling" else attention
            yield from aligned([(name, kind, *_size_cells(size))], "llr", widths=widths)


def _size_cells(size: Size) -> tuple[str, str, str]:
    return f"{size.parameters:,}", _millions(size.total.macs), _millions(size.total.activations)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """Turns KEY=VALUE settings into arguments; a value that is not a Python literal is a string.

    Raises:
      InputError: a setting has no "=".
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes KEY=VALUE, such as distilled=True, not {setting!r}.")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key] = value
    return overrides
