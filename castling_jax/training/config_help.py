"""What main.py says of a configuration without training, and docs/configuration.md."""

import itertools
from argparse import Namespace

from ml_collections import ConfigDict

from castling_jax.tables import markdown
from castling_jax.training.config import FIELDS, default_config
from castling_jax.training.config_files import DEFAULT_CONFIG
from castling_jax.training.overrides import load_overridden, parse_overrides


def show(options: Namespace) -> None:
    """Prints the configuration's fields for `main.py --help-config`, or for --check that the configuration is valid."""
    name = options.config or DEFAULT_CONFIG
    if options.help_config:
        print(describe_fields(parse_overrides(name, options.fields)[0]))
    else:
        load_overridden(name, options.fields)
        print("The configuration is valid.")


def describe_fields(config: ConfigDict) -> str:
    """A line for each field: its value in `config`, the values it takes, its meaning."""
    rows = [
        (f"--config.{name}={_value(config, name)}", field.values.text, field.meaning) for name, field in FIELDS.items()
    ]
    return "\n".join(f"{flag}\n    {meaning} Takes {values}." for flag, values, meaning in rows)


def fields_page() -> str:
    """The text of docs/configuration.md."""
    config = default_config()
    lines = [
        "# Configuration",
        "",
        "Every field, with its default. `python main.py --config=NAME --help-config` prints this list with the values",
        "of the configuration NAME. A field is overridden by `--config.GROUP.FIELD=VALUE`, and in Python by",
        "`config.GROUP.FIELD = VALUE`. If the default is None, None is allowed too.",
    ]
    for group, fields in itertools.groupby(FIELDS.items(), key=lambda item: item[0].rpartition(".")[0]):
        rows = [(f"`{name}`", str(_value(config, name)), field.values.text, field.meaning) for name, field in fields]
        lines += ["", f"## {group or 'The run'}", "", *markdown(("field", "default", "takes", "meaning"), rows, "l")]
    return "\n".join([*lines, ""])


def _value(config: ConfigDict, name: str) -> object:
    for part in name.split("."):
        config = config[part]
    return config
