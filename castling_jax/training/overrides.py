"""Applies --config.GROUP.FIELD=VALUE to a configuration, for main.py and all commands."""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from castling_jax.errors import InputError, Mistakes, check_known
from castling_jax.training.config import FIELDS, check_config
from castling_jax.training.config_files import load_config


def load_overridden(name: str, words: Sequence[str]) -> ConfigDict:
    """Loads a configuration, overrides its fields, and checks the result.

    Args:
      name: name or file of the configuration, as `load_config` takes it.
      words: the overrides: --config.GROUP.FIELD=VALUE, or --config.GROUP.FIELD and --noconfig.GROUP.FIELD for flags.

    Raises:
      InputError: there is no such configuration, fields are unknown, or values are wrong; the message names all
        mistakes.
    """
    config, _ = parse_overrides(name, words)
    check_config(config)
    return config


def parse_overrides(name: str, words: Sequence[str]) -> tuple[ConfigDict, dict[str, Any]]:
    """Loads a configuration and overrides its fields; returns it, and {dotted name: value} of the overridden fields.

    Raises:
      InputError: what `load_overridden` raises, but a value may be out of range.
    """
    mistakes = Mistakes()
    for word in words:
        with mistakes:
            check_known("config field", word.partition("=")[0].partition("config.")[2], FIELDS)
    with mistakes:
        config = load_config(name)
    mistakes.report()
    # absl would take None for a string or refuse it; a field whose default is None takes None.
    nones = [field for word in words if (field := _set_to_none(word))]
    words = [word for word in words if not _set_to_none(word)]
    config.update_from_flattened_dict(dict.fromkeys(nones))
    known = flags.FlagValues()  # not absl's global flags, which would keep the first configuration
    config_flags.DEFINE_config_dict("config", config, flag_values=known, sys_argv=list(words))
    try:
        known(["", *words])
    except (flags.Error, TypeError, ValueError) as error:
        for word in words:  # absl stops at the first mistake; parse each word alone to find all
            with mistakes:
                _parse_one(known, word)
        with mistakes:
            check_config(config)
        mistakes.report()
        raise InputError(str(error).strip()) from error
    return config, dict.fromkeys(nones) | config_flags.get_override_values(known["config"])


def _set_to_none(word: str) -> str | None:
    """The field that --config.GROUP.FIELD=None sets, if its default is None."""
    name, _, value = word.partition("config.")[2].partition("=")
    return name if value == "None" and FIELDS[name].default is None else None


def _parse_one(known: flags.FlagValues, word: str) -> None:
    try:
        known(["", word])
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error).strip()) from error
