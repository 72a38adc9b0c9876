import json
import math
import re

import pytest

from castling_jax.errors import InputError
from castling_jax.training.config import (
    check_config,
    check_same_run,
    default_config,
    field_names,
    load_config,
    model_arguments,
)


def changed(field, value):
    config = default_config()
    with config.unlocked():
        group, name = field.split(".")
        config[group][name] = value
    return config


def test_default_configuration_is_valid():
    check_config(default_config())
    assert "optimizer.learning_rate" in field_names()
    assert "mask.schedule" in field_names()


def test_unknown_field_names_the_nearest():
    with pytest.raises(InputError, match=r"'optimizer.learning_rte': did you mean 'optimizer.learning_rate'"):
        check_config(changed("optimizer.learning_rte", 1.0))


def test_missing_field_is_named():
    config = default_config()
    with config.unlocked():
        del config.mask.begin
    with pytest.raises(InputError, match="lacks the field 'mask.begin'"):
        check_config(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.epochs", 0),
        ("train.accumulate_steps", 0),
        ("logging.every_steps", 0),
        ("checkpoint.keep", 0),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.warmup_epochs", math.nan),
        ("optimizer.initial_learning_rate", -1.0),
        ("optimizer.final_learning_rate", math.inf),
        ("optimizer.b1", 1.5),
        ("optimizer.b2", -0.1),
        ("augment.mixup", math.nan),
        ("augment.shift_pixels", -1),
        ("dataset.workers", -1),
        ("dataset.max_corrupt_share", 1.5),
        ("loss.label_smoothing", 1.0),
        ("model.embed_dim", (8, 1.5)),
        ("model.depth", 2.5),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=f"config.{field} must be .* not {re.escape(str(value))}"):
        check_config(changed(field, value))


def test_model_arguments_leave_out_what_is_the_models_own():
    assert model_arguments(default_config()) == {"name": "deit_tiny", "attention": "castling", "dtype": "float32"}
    assert model_arguments(changed("model.token_conv", "none"))["token_conv"] is None


def test_sizes_may_be_a_number_or_one_a_stage():
    for value in (64, (8, 12)):
        config = changed("model.embed_dim", value)
        check_config(config)
        assert model_arguments(config)["embed_dim"] == value


def test_runtime_fields_may_differ_and_others_may_not(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(default_config().to_dict()))
    check_same_run(changed("logging.every_steps", 7), path)
    check_same_run(changed("checkpoint.every_steps", 7), path)
    check_same_run(changed("mesh.fsdp", 2), path)
    check_same_run(changed("evaluation.every_epochs", 2), path)
    check_same_run(changed("dataset.workers", 2), path)
    config = changed("optimizer.b1", 0.5)
    config.seed = 3
    with pytest.raises(InputError, match=r"b1 = 0.9, not 0.5; config.seed = 0, not 3: choose another --workdir"):
        check_same_run(config, path)


def test_a_field_that_an_earlier_version_did_not_have_is_its_default(tmp_path):
    earlier = default_config().to_dict()
    del earlier["reset_head"], earlier["mesh"], earlier["train"]["accumulate_steps"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(earlier))
    check_same_run(default_config(), path)
    with pytest.raises(InputError, match=r"config.train.accumulate_steps = 1, not 2"):
        check_same_run(changed("train.accumulate_steps", 2), path)


def test_damaged_config_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": ')
    for _ in range(2):
        with pytest.raises(InputError, match="is missing or damaged"):
            check_same_run(default_config(), path)
        path.unlink(missing_ok=True)


def test_configurations_are_read_as_main_reads_them(refuses):
    assert load_config("configs/digits.py").model.name == "deit_micro"
    assert load_config("configs/deit.py:base,softmax").model.name == "deit_base"
    with refuses("there is no configuration file 'configs/nothing.py'"):
        load_config("configs/nothing.py:base")
