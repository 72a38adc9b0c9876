import json
import math
from pathlib import Path

import pytest

from castling_jax.convert.run_folder import exported_weights, mask_kind, model_arguments, start_threshold
from castling_jax.data.sources import Unread, load_dataset
from castling_jax.errors import InputError
from castling_jax.models.registry import abstract_model
from castling_jax.tasks.registry import TASKS
from castling_jax.training.config import FIELDS, check_config, check_unused, default_config
from castling_jax.training.config_files import join_run, load_config, run_config
from castling_jax.training.config_help import fields_page
from castling_jax.training.console import describe_boxes
from castling_jax.training.setup import _load_splits, load_split, named_splits, set_up
from tests.data.box_files import coco_content, write_coco

ROOT = Path(__file__).parents[2]


def changed(field, value):
    config = default_config()
    with config.unlocked():
        group, name = field.split(".")
        config[group][name] = value
    return config


def test_default_configuration_is_valid():
    check_config(default_config())


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("train.on_nonfinite", "skp", "unknown config.train.on_nonfinite 'skp': did you mean 'skip'?"),
        ("train.export", "avaraged", "unknown config.train.export 'avaraged': did you mean 'averaged'?"),
        ("train.export", "averaged", "config.train.export = 'averaged' needs an average: give config.train.ema_decay."),
    ],
)
def test_words_that_mean_nothing_are_refused(field, value, sentence, refuses):
    with refuses(sentence):
        check_config(changed(field, value))


@pytest.mark.parametrize(
    ("decay", "export", "expected"),
    [(None, None, "raw"), (0.9, None, "averaged"), (0.9, "raw", "raw"), (0.9, "averaged", "averaged")],
)
def test_averaged_weights_are_exported_where_they_are_kept_unless_the_field_says_otherwise(decay, export, expected):
    config = default_config()
    config.train.update({"ema_decay": decay, "export": export})
    check_config(config)
    assert exported_weights(config) == expected


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
    ("field", "value", "allowed"),
    [
        ("train.epochs", 0, "an integer of at least 1"),
        ("train.accumulate_steps", 0, "an integer of at least 1"),
        ("train.max_skips", 0, "an integer of at least 1"),
        ("checkpoint.every_minutes", 0.0, "a finite number above 0"),
        ("logging.every_steps", 0, "an integer of at least 1"),
        ("checkpoint.keep", 0, "an integer of at least 1"),
        ("optimizer.weight_decay", -0.1, "a finite number of at least 0"),
        ("optimizer.warmup_epochs", math.nan, "a finite number of at least 0"),
        ("optimizer.initial_learning_rate", -1.0, "a finite number of at least 0"),
        ("optimizer.final_learning_rate", math.inf, "a finite number of at least 0"),
        ("optimizer.clip_norm", 0.0, "a finite number above 0"),
        ("optimizer.b1", 1.5, "a number in [0, 1)"),
        ("optimizer.b2", -0.1, "a number in [0, 1)"),
        ("distillation.alpha", 1.0, "a number in (0, 1)"),
        ("train.ema_decay", 0.0, "a number in (0, 1)"),
        ("augment.mixup", math.nan, "a finite number of at least 0"),
        ("augment.cutmix", -1.0, "a finite number of at least 0"),
        ("augment.flip", 1.5, "a number in [0, 1]"),
        ("augment.mix_probability", -0.1, "a number in [0, 1]"),
        ("augment.shift_pixels", -1, "an integer of at least 0"),
        ("augment.repeats", 0, "an integer of at least 1"),
        ("augment.crop_scale", (0.5, 0.1), "two numbers with 0 < first <= second <= 1"),
        ("augment.crop_scale", (0.5,), "two numbers with 0 < first <= second <= 1"),
        ("dataset.workers", -1, "an integer of at least 0"),
        ("dataset.max_corrupt_share", 1.5, "a number in [0, 1]"),
        ("dataset.mean", (0.5, 0.5), "three finite numbers"),
        ("dataset.std", (0.5, 0.5, 0.0), "three finite numbers above 0"),
        ("dataset.crop_ratio", 0.0, "a number in (0, 1]"),
        ("loss.label_smoothing", 1.0, "a number in [0, 1)"),
        ("mask.start_threshold", -0.1, "a number in [0, 1]"),
        ("mask.start_threshold", math.nan, "a number in [0, 1]"),
        ("mask.end", 1.5, "a number in [0, 1]"),
        ("model.embed_dim", (8, 1.5), "an integer or a tuple of integers"),
        ("model.depth", 2.5, "an integer or a tuple of integers"),
    ],
)
def test_values_out_of_range_are_refused(refuses, field, value, allowed):
    with refuses(f"config.{field} must be {allowed}, not {value!r}"):
        check_config(changed(field, value))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("model.implementation", "palas", "unknown config.model.implementation 'palas': did you mean 'pallas'?"),
        ("mask.kind", "fad", "unknown config.mask.kind 'fad': did you mean 'fade'?"),
        ("mask.schedule", "cosin", "unknown config.mask.schedule 'cosin': did you mean 'cosine'?"),
        ("optimizer.scaled_rates", "al", "unknown config.optimizer.scaled_rates 'al': did you mean 'all'?"),
        ("distillation.kind", "sof", "unknown config.distillation.kind 'sof': did you mean 'soft'?"),
        ("mask.begin", 0.9, "config.mask.begin must be at most config.mask.end, 0.8, not 0.9."),
        ("augment.randaugment", "rand-m9", "'rand-m9'"),
    ],
)
def test_values_that_do_not_fit_are_refused(refuses, field, value, sentence):
    with refuses(sentence):
        check_config(changed(field, value))


def test_colors_are_changed_once(refuses):
    config = changed("augment.randaugment", "rand-m9-inc1")
    config.augment.color_jitter = 0.4
    with refuses("config.augment.color_jitter must be 0", "not 0.4"):
        check_config(config)


def test_all_mistakes_are_told_at_once():
    config = changed("train.epochs", 0)
    config.mask.begin = 2.0
    with config.unlocked():
        config.sed = 1
    with pytest.raises(InputError) as caught:
        check_config(config)
    first, *sentences = str(caught.value).splitlines()
    assert first == "3 mistakes:"
    for sentence, part in zip(sentences, ("field 'sed'", "config.train.epochs", "config.mask.begin"), strict=True):
        assert part in sentence


def test_every_field_says_what_it_means_on_one_line():
    source = (ROOT / "castling_jax" / "training" / "config.py").read_text().splitlines()
    for name, field in FIELDS.items():
        assert field.meaning.endswith(".")
        assert sum(line.startswith(f'    "{name}": Field(') and line.endswith("),") for line in source) == 1
        field.check(name, field.default)


def test_the_page_of_the_documentation_is_of_these_fields():
    assert (ROOT / "docs" / "configuration.md").read_text() == fields_page()


def test_model_arguments_leave_out_what_is_the_models_own():
    assert model_arguments(default_config()) == {
        "name": "deit_tiny",
        "attention": "castling",
        "dtype": "float32",
        "implementation": "auto",
    }
    assert model_arguments(changed("model.token_conv", "none"))["token_conv"] is None


def test_model_arguments_of_a_detector_are_its_own_and_its_backbones():
    config = default_config()
    backbone = {
        "embed_dim": (16, 24, 32),
        "depth": (1, 1, 1),
        "num_heads": (2, 2, 2),
        "key_dim": 8,
        "token_conv": "none",
    }
    detector = {"name": "picodet_s", "backbone": "levit_128", "neck": "csp_pan", "neck_channels": 16, "num_convs": 1}
    config.model.update(detector | backbone | {"image_size": (160, 192)})
    config.mask.kind = "fade"
    arguments = model_arguments(config)
    common = {"attention": "castling", "dtype": "float32", "image_size": (160, 192)}
    of_the_backbone = backbone | {"token_conv": None, "mask_kind": "fade", "implementation": "auto"}
    assert arguments == detector | common | {"backbone_arguments": of_the_backbone}
    spec = abstract_model(num_classes=3, **arguments).spec
    assert (spec.image_size, spec.num_classes) == ((160, 192), 3)
    # A run's config.json has lists.
    saved = model_arguments(json.loads(json.dumps(config.to_dict())))
    assert abstract_model(num_classes=3, **saved).spec == spec


def test_sizes_may_be_a_number_or_one_a_stage():
    for value in (64, (8, 12)):
        config = changed("model.embed_dim", value)
        check_config(config)
        assert model_arguments(config)["embed_dim"] == value


def test_runtime_fields_may_differ_and_others_may_not(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(default_config().to_dict()))
    join_run(changed("logging.every_steps", 7), path)
    join_run(changed("checkpoint.every_steps", 7), path)
    join_run(changed("mesh.fsdp", 2), path)
    join_run(changed("evaluation.every_epochs", 2), path)
    join_run(changed("dataset.workers", 2), path)
    join_run(changed("model.implementation", "xla"), path)
    config = changed("optimizer.b1", 0.5)
    config.seed = 3
    with pytest.raises(InputError, match=r"b1 = 0.9, not 0.5; config.seed = 0, not 3: choose another --workdir"):
        join_run(config, path)


def test_what_the_run_found_is_kept_where_nothing_is_given(tmp_path, refuses):
    found = default_config()
    found.dataset.update({"train_split": "train without 10%", "eval_split": "10% of train"})
    found.train.batch_size, found.optimizer.warmup_epochs = 32, 0.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found.to_dict()))
    joined = join_run(default_config(), path)
    assert joined.to_dict() == found.to_dict()
    with refuses("config.train.batch_size = 32, not 64"):
        join_run(changed("train.batch_size", 64), path)


@pytest.mark.parametrize(
    ("images", "epochs", "expected"),
    [(10**6, 300, (128, 5.0)), (1024, 20, (128, 2.0)), (1000, 5, (64, 0.5)), (7, 2, (1, 0.2))],
)
def test_batch_and_warm_up_fit_data_and_length(images, epochs, expected):
    config = changed("train.epochs", epochs)
    made = set_up(config, datasets=(Unread(images, 3), Unread(10, 3))).config
    assert (made.train.batch_size, made.optimizer.warmup_epochs) == expected
    assert config.train.batch_size is None  # the caller's own is left alone


def test_what_is_held_out_is_not_learnt_from(refuses):
    def data(**fields):
        config = default_config().dataset
        config.update({"name": "folder:PATH"} | fields)
        return config

    assert named_splits(data(eval_split="20% of train")) == ("train without 20%", "20% of train")
    assert named_splits(data(eval_split="val")) == ("train", "val")
    for train_split in ("train", "train without 10%"):
        with refuses(f"{train_split!r} must be 'train without 20%'", "no image is in both"):
            named_splits(data(eval_split="20% of train", train_split=train_split))
    # A part to test on is held out too, if it is a part of the split to learn from.
    assert named_splits(data(eval_split="val", test_split="20% of train")) == ("train without 20%", "val")
    assert named_splits(data(eval_split="val without 50%", test_split="50% of val", train_split="train"))[0] == "train"
    assert named_splits(data(eval_split="20% of train", test_split="20% of train"))[0] == "train without 20%"
    with refuses("train_split = 'train' must be 'train without 20%' where test_split is '20% of train'"):
        named_splits(data(eval_split="val", test_split="20% of train", train_split="train"))
    with refuses("train_split = 'train without 20%' must be 'train without 10%' where test_split is '10% of train'"):
        named_splits(data(eval_split="20% of train", test_split="10% of train"))
    # tensorflow-datasets' notation.
    parts = {"name": "cifar10", "eval_split": "train[90%:]"}
    assert named_splits(data(train_split="train[:90%]", **parts)) == ("train[:90%]", "train[90%:]")
    for fields in ({}, {"train_split": "train"}):
        with refuses("train_split = 'train' must leave out eval_split = 'train[90%:]'", "'train[:90%]' leaves out"):
            named_splits(data(**fields, **parts))
    with refuses("train_split = 'train' must leave out test_split = 'train[:5%]'"):
        named_splits(data(name="cifar10", eval_split="test", test_split="train[:5%]"))


def test_a_split_to_learn_from_may_be_named_alone_where_there_is_one_to_evaluate_on(tmp_path, refuses):
    def data(**fields):
        config = default_config().dataset
        config.update({"name": f"coco:{tmp_path}", "train_split": "train2017"} | fields)
        return config

    write_coco(tmp_path)
    with refuses("has no split val, valid, validation, test: give config.dataset.eval_split, or leave out"):
        named_splits(data())
    write_coco(tmp_path, "val2017")
    assert named_splits(data()) == ("train2017", "val2017")
    assert named_splits(data(train_split=None, test_split="10% of train2017")) == ("train2017 without 10%", "val2017")


def test_a_configuration_is_a_config_dict(refuses):
    with refuses("a configuration must be a ConfigDict, as load_config gives it, not str"):
        check_config("digits")


def test_an_extension_needs_a_finished_run_and_a_later_end(tmp_path, refuses):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed("train.epochs", 10).to_dict()))
    longer = changed("train.epochs", 20)
    with refuses("--extend is for a finished run", "finish it first"):
        join_run(longer, path, extend=True)
    assert join_run(longer, path, extend=True, is_finished=True).train.extended_from == (10,)
    longer.seed = 3
    with refuses("config.seed = 0, not 3: choose another --workdir (--config.init_from="):
        join_run(longer, path, extend=True, is_finished=True)
    for wrong in ((10, 10), (0, 3), (1.5,)):
        with refuses("config.train.extended_from must be a tuple of ascending positive integers"):
            check_config(changed("train.extended_from", wrong))
    with refuses("config.train.extended_from = (100,) must end below train.epochs = 100"):
        check_config(changed("train.extended_from", (100,)))


def test_a_field_that_an_earlier_version_did_not_have_is_its_default(tmp_path):
    earlier = default_config().to_dict()
    del earlier["reset_head"], earlier["mesh"], earlier["train"]["accumulate_steps"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(earlier))
    join_run(default_config(), path)
    with pytest.raises(InputError, match=r"config.train.accumulate_steps = 1, not 2"):
        join_run(changed("train.accumulate_steps", 2), path)


def test_an_earlier_runs_start_threshold_is_the_default_that_it_had(tmp_path):
    earlier = default_config().to_dict()
    del earlier["mask"]["kind"]
    earlier["mask"]["start_threshold"] = 0.02
    path = tmp_path / "config.json"
    path.write_text(json.dumps(earlier))
    join_run(default_config(), path)
    assert (mask_kind(earlier), start_threshold(earlier["mask"])) == ("threshold", 0.02)
    for field, value, said in (
        ("mask.start_threshold", 0.05, r"config.mask.start_threshold = 0.02, not 0.05"),
        (
            "mask.kind",
            "fade",
            r"config.mask.kind = 'threshold', not 'fade'; config.mask.start_threshold = 0.02, not 0.0",
        ),
    ):
        with pytest.raises(InputError, match=said):
            join_run(changed(field, value), path)


def test_a_fade_is_an_argument_of_the_model_that_starts_with_the_whole_softmax():
    assert start_threshold(default_config().mask) == 0.02
    config = changed("mask.kind", "fade")
    check_config(config)
    assert model_arguments(config)["mask_kind"] == "fade"
    assert start_threshold(config.mask) == 0.0
    config.mask.start_threshold = 0.3
    assert start_threshold(config.mask) == 0.3


def test_damaged_config_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": ')
    for _ in range(2):
        with pytest.raises(InputError, match="is missing or damaged"):
            join_run(default_config(), path)
        path.unlink(missing_ok=True)


def test_a_runs_fields_become_a_configuration(refuses):
    assert run_config(None) == default_config()
    fields = json.loads(json.dumps(changed("optimizer.b1", 0.5).to_dict()))
    del fields["mesh"], fields["train"]["accumulate_steps"]
    fields["model"]["of_another_version"] = 3
    config = run_config(fields)
    assert (config.optimizer.b1, config.mesh.data, config.train.accumulate_steps) == (0.5, -1, 1)
    assert config.dataset.mean == (0.5, 0.5, 0.5)
    assert config.model.of_another_version == 3
    for wrong in ({"dataset": 3}, {"evaluation": {"batch_size": "many"}}):
        with refuses("the run's config.json is damaged"):
            run_config(fields | wrong)


def test_a_config_file_of_another_format_is_refused(refuses, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 2} | default_config().to_dict()))
    with refuses(f"'{path}' has format 2; this version reads format 1; choose another --workdir or remove it."):
        join_run(default_config(), path)


def test_configurations_are_found_by_name_and_by_path(refuses, tmp_path, monkeypatch):
    assert load_config("configs/digits.py").model.name == "deit_micro"
    assert load_config(Path("configs/digits.py")).model.name == "deit_micro"
    for other in (None, 3, b"digits"):
        with refuses("a configuration must be a string or a path, not "):
            load_config(other)
    assert load_config("configs/deit.py:base,softmax").model.name == "deit_base"
    with refuses("there is no configuration file 'configs/nothing.py'"):
        load_config("configs/nothing.py:base")
    with refuses("unknown configuration 'deits': did you mean 'deit'?"):
        load_config("deits")
    monkeypatch.chdir(tmp_path)
    assert load_config("levit:128s").model.name == "levit_128s"


def test_configurations_of_a_folder_import_one_another(tmp_path):
    (tmp_path / "_base.py").write_text(
        "from castling_jax.training.config import default_config\n\ndef base():\n    return default_config()\n"
    )
    for epochs in (3, 4):  # a file that was changed is read again
        (tmp_path / "my-own.py").write_text(
            "from ._base import base\n\ndef get_config():\n    config = base()\n"
            f"    config.train.epochs = {epochs}{' ' * epochs}\n    return config\n"
        )
        assert load_config(str(tmp_path / "my-own.py")).train.epochs == epochs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.trian.epochs = 3", "trian"),
        ("config.train.epochs = 'many'", "many"),
        ("import nothing_there", "nothing_there"),
    ],
)
def test_a_configuration_that_cannot_be_made(refuses, tmp_path, line, said):
    lines = ["from castling_jax.training.config import default_config", "", "def get_config():"]
    lines += ["    config = default_config()", f"    {line}", "    return config", ""]
    (tmp_path / "own.py").write_text("\n".join(lines))
    with refuses(f"'{tmp_path}/own.py' makes no configuration", said):
        load_config(str(tmp_path / "own.py"))


def test_fields_that_the_model_does_not_use_are_refused(refuses):
    config = changed("augment.box_crop", True)
    config.loss.atss_epochs = 2.0
    with refuses("this deit_tiny does not use config.augment.box_crop, config.loss.atss_epochs: keep the default."):
        set_up(config)
    check_unused(config, {"augment.flip", "loss.label_smoothing"}, "nobody")
    # A field that no task names is not refused by any.
    named = {name for task in TASKS.values() for name in task.fields}
    groups = ("augment.", "loss.", "distillation.", "evaluation.")
    every_task = {"evaluation.every_epochs", "evaluation.batch_size"}
    of_other_groups = {"dataset.ignore_label", "dataset.first_label"}
    assert named - of_other_groups == {name for name in FIELDS if name.startswith(groups)} - every_task


@pytest.mark.parametrize("value", [(), (0,), (32, 48.0), 32, (True,), "32"])
def test_image_sizes_are_a_tuple_of_positive_integers(refuses, value):
    with refuses("config.augment.image_sizes must be a tuple of positive integers"):
        config = default_config()
        with config.unlocked():
            config.augment = {**config.augment.to_dict(), "image_sizes": value}
        check_config(config)


def test_splits_with_boxes_have_the_classes_of_training(tmp_path):
    """Though the held-out split's file numbers its categories in another order."""
    write_coco(tmp_path)
    write_coco(tmp_path, "val2017", coco_content(category_ids=(3, 2, 1)))
    config = changed("dataset.name", f"coco:{tmp_path}")
    data = config.dataset
    train_set, eval_set, test_set = _load_splits(config)
    assert (data.train_split, data.eval_split, test_set) == ("train2017", "val2017", None)
    assert train_set.classes == eval_set.classes == ("dog", "cat", "owl")
    assert eval_set.category_ids.tolist() == [2, 3, 1]
    data.eval_split, data.train_split = "25% of train2017", None
    assert [len(split) for split in _load_splits(config)[:2]] == [3, 1]
    assert data.train_split == "train2017 without 25%"


def test_splits_without_a_use_for_labels_may_have_any_classes(tmp_path, refuses):
    write_coco(tmp_path)
    config = changed("dataset.name", f"coco:{tmp_path}")
    with refuses("does not have"):
        load_split(config, "train2017", ["zebra"])
    config.model.update(name="mae", backbone="deit_micro")
    assert load_split(config, "train2017", ["zebra"]).classes == ("dog", "cat", "owl")


def test_a_run_says_how_many_boxes_there_are_and_which_it_does_not_take(tmp_path):
    content = coco_content(counts=(3, 0, 2, 1))
    # The first image has two boxes and a crowd, the third one a box and one without area, the last one a crowd.
    first, third, last = ([a for a in content["annotations"] if a["image_id"] == number] for number in (100, 94, 91))
    for one in content["annotations"]:
        one["iscrowd"] = int(one in (first[0], last[0]))
    third[0]["bbox"][2] = 0
    dataset = load_dataset(f"coco:{write_coco(tmp_path, content=content)}", "train2017")
    said = "3 to learn from, at most 2 in an image; 2 that are crowds or difficult objects are passed over"
    said += "; 1 that have no area in their image are left out"
    assert describe_boxes(dataset, 2) == said
    assert describe_boxes(dataset, 1) == f"{said}; 1 are beyond the 1 of an image that training takes"
