"""Where configurations come from: configs/NAME.py, which builds one, and a run's config.json."""

import importlib
import inspect
import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import CONFIG_FILE, read_config, start_threshold
from castling_jax.errors import InputError, check_known, refusing
from castling_jax.models.variables import flatten
from castling_jax.storage import as_path
from castling_jax.training.config import FOUND_FIELDS, RUNTIME_FIELDS, RUNTIME_GROUPS, check_config, default_config

_PACKAGE = Path(__file__).parents[1]
# A wheel has configs/ inside the package; a checkout has it beside the package.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
DEFAULT_CONFIG = "digits"  # main.py's, where none is named
_LOADING = threading.Lock()  # the package _LOADED is in sys.modules, which all threads share
_LOADED = "_castling_jax_configs"  # a configuration's folder is imported as a package of this name


def config_names() -> list[str]:
    """Names of the configurations that come with the project: digits, deit, ..."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def find_config(name: str | os.PathLike) -> tuple[Path, str]:
    """Splits `NAME[:ARGUMENT]` into (file, argument); NAME is a path, or one of `config_names`.

    Raises:
      InputError: there is no such file, or the name is no string or path.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a configuration must be a string or a path, not {name!r}.")
    path, _, argument = os.fspath(name).partition(":")
    if path and (file := Path(as_path(path))).is_file():
        return file, argument
    if "/" in path or path.endswith(".py"):
        raise InputError(f"there is no configuration file '{path}'.")
    check_known("configuration", path, config_names())
    return CONFIGS / f"{path}.py", argument


def load_config(name: str | os.PathLike) -> ConfigDict:
    """Loads a configuration by calling `get_config` in its file.

    Args:
      name: "digits", "deit:small,softmax", or a path, "path/to/file.py:ARGUMENT". The file interprets the argument.

    Raises:
      InputError: there is no such file, it makes no configuration, or a field is wrong.
    """
    path, argument = find_config(name)
    with refusing(Exception, f"'{path}' makes no configuration"):  # the file is the user's code, and may raise anything
        get_config = getattr(_load_module(path), "get_config", None)
        if get_config is None:
            raise InputError(f"'{path}' is no configuration: it has no function get_config.")
        if argument and not inspect.signature(get_config).parameters:
            raise InputError(f"'{path}' has no variants: leave out {':' + argument!r}.")
        config = get_config(argument) if argument else get_config()
    check_config(config)
    return config


def _load_module(path: Path) -> types.ModuleType:
    """Imports a file anew, with its folder as its package, so that `from ._base import ...` works in any folder."""
    with _LOADING:
        # Forget the last folder's modules: another folder may have a file of the same name, and an edited file counts.
        for name in [name for name in sys.modules if name.partition(".")[0] == _LOADED]:
            del sys.modules[name]
        package = types.ModuleType(_LOADED)
        package.__path__ = [str(path.resolve().parent)]
        sys.modules[_LOADED] = package
        importlib.invalidate_caches()
        return importlib.import_module(f"{_LOADED}.{path.stem}")


def run_config(fields: dict[str, Any] | None) -> ConfigDict:
    """The configuration of a run from its config.json's fields; None gives the default configuration.

    Fields that an earlier version's config.json lacks get their defaults; fields that it has and this version does not
    are kept.

    Raises:
      InputError: a field has another type, or a group of fields is unknown.
    """
    config = default_config()
    for group in fields or {}:
        check_known(f"group of fields in the run's {CONFIG_FILE}", group, config)
    with refusing((TypeError, ValueError, AttributeError), f"the run's {CONFIG_FILE} is damaged"), config.unlocked():
        config.update(fields or {})
    return config


def join_run(config: ConfigDict, path: epath.Path, *, is_finished: bool = False, extend: bool = False) -> ConfigDict:
    """The configuration for resuming the run whose config.json is at `path`.

    It is `config`, and FOUND_FIELDS that `config` leaves open get the run's values. A field that the run's config.json
    lacks, because an earlier version wrote it, counts as its default.

    Args:
      config: the configuration as the user gives it.
      path: RUN/config.json.
      is_finished: whether the run is finished.
      extend: whether train.epochs may be larger than the run's; the run must then be finished.

    Raises:
      InputError: the file is damaged; fields other than RUNTIME_GROUPS and RUNTIME_FIELDS differ (the message names
        them); or there is nothing to extend.
    """
    try:
        earlier = read_config(path.parent)
        run = run_config(earlier)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; choose another --workdir or remove it.") from error
    config = config.copy_and_resolve_references()
    for group, field in (name.split(".") for name in FOUND_FIELDS):
        if config[group][field] is None:
            config[group][field] = run[group][field]
    epochs, run_epochs = config.train.epochs, run.train.epochs
    # Before the comparison, so that a larger number of epochs is no difference when the run is extended.
    if extend:
        run.train.epochs = max(epochs, run_epochs)
    if different := _differences(run.to_dict(), config.to_dict()):
        is_longer = not extend and epochs > run_epochs and len(different) == 1
        raise InputError(
            f"'{path.parent}' holds a run with {'; '.join(different)}: "
            + ("add --extend to train it further, " if is_longer else "")
            + f"choose another --workdir (--config.init_from={path.parent} starts there from this run's weights), or "
            "remove that folder to start anew."
        )
    if extend and epochs > run_epochs:
        if not is_finished:
            raise InputError(
                f"--extend is for a finished run, and '{path.parent}' holds one that is not: finish it first."
            )
        config.train.extended_from = (*(config.train.extended_from or ()), run_epochs)
    elif extend and not config.train.extended_from:
        raise InputError(f"--extend needs config.train.epochs above {run_epochs}, those of the run in '{path.parent}'.")
    return config


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields that tell two runs apart, as sentences with both values; from their nested configurations."""
    # Through JSON, so that a tuple in the one and a list in the other compare equal.
    defaults, earlier, now = (
        {path.replace("/", "."): value for path, value in flatten(json.loads(json.dumps(tree))).items()}
        for tree in (default_config().to_dict(), earlier, now)
    )
    earlier = defaults | earlier
    for fields in (earlier, now):  # None means the same run as the number that it stands for
        mask = {name: fields[f"mask.{name}"] for name in ("kind", "start_threshold")}
        fields["mask.start_threshold"] = start_threshold(mask)
    return [
        f"config.{name} = {earlier.get(name)!r}, not {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if name.split(".")[0] not in RUNTIME_GROUPS
        and name not in RUNTIME_FIELDS
        and earlier.get(name) != now.get(name)
    ]
