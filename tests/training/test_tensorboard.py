import io
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from castling_jax.training.tensorboard import TensorBoard

RECORD = struct.Struct("<Q4x")  # TFRecord: the length and its checksum, the data, and 4 bytes of checksum


def read_events(workdir):
    """The events of all files of a run, in the order that they were written."""
    for path in sorted((workdir / "tensorboard").rglob("events*")):
        file = io.BytesIO(path.read_bytes())
        while header := file.read(RECORD.size):
            (length,) = RECORD.unpack(header)
            yield Event.FromString(file.read(length))
            file.seek(4, io.SEEK_CUR)


def scalars_of(workdir):
    """{tag: [(step, value)]}."""
    found = {}
    for event in read_events(workdir):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def images_of(workdir):
    """[(tag, step, pixels)]."""
    return [
        (value.tag, event.step, np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))))
        for event in read_events(workdir)
        for value in event.summary.value
        if value.HasField("image")
    ]


def hparams_of(workdir):
    """The configuration that the page HPARAMS shows, and the tags of its figures."""
    contents = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in read_events(workdir)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    fields = contents["_hparams_/session_start_info"].session_start_info.hparams
    metrics = contents["_hparams_/experiment"].experiment.metric_infos
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in fields.items()}, {
        metric.name.tag for metric in metrics
    }


@pytest.fixture
def board(tmp_path):
    return TensorBoard(tmp_path, first_step=0, exported="averaged")


def test_figures_are_in_groups_and_none_is_there_twice(tmp_path, board):
    board.write(7, {"loss": 0.5, "mask_density": [0.25, 0.125], "mfu": 0.5, "skipped_steps": 1})
    board.write(8, {"accuracy": 0.5, "accuracy_train_form": 0.5, "eval_loss": 2.0, "mask_threshold": 1.0})
    board.write(9, {"averaged_eval_loss": 2.0, "raw_eval_loss": 4.0, "top5_accuracy_train_form": 1.0})
    board.close()
    assert scalars_of(tmp_path) == {
        "train/loss": [(7, 0.5)],
        "train/mask_density/layer_0": [(7, 0.25)],
        "train/mask_density/layer_1": [(7, 0.125)],
        "throughput/mfu": [(7, 0.5)],
        "train/skipped_steps": [(7, 1)],
        "eval/accuracy_train_form": [(8, 0.5)],
        "eval/loss": [(8, 2)],
        "train/mask_threshold": [(8, 1)],
        "eval/raw_loss": [(9, 4)],
        "eval/top5_accuracy_train_form": [(9, 1)],
    }


def test_what_a_run_is_made_of_is_shown_once(tmp_path, board):
    board.describe({"config.json": '{"seed": 0}', "parameters.txt": "head/bias  (10,)"})
    board.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    assert b'{"seed": 0}' in events.read_bytes()
    assert b"head/bias  (10,)" in events.read_bytes()


@pytest.mark.parametrize("first_step", [0, 5])
def test_what_lies_ahead_of_a_run_that_goes_on_is_hidden(tmp_path, first_step):
    TensorBoard(tmp_path, first_step=first_step, exported="raw").close()
    (start,) = (event for event in read_events(tmp_path) if event.HasField("session_log"))
    assert (start.session_log.status, start.step) == (start.session_log.START, first_step and first_step + 1)


@pytest.mark.parametrize(("group", "scalars"), [("eval", {}), ("test", {"test/loss": [(9, 0.5)]})])
def test_the_configuration_stands_beside_the_final_figures(tmp_path, board, group, scalars):
    config = {"seed": 3, "model": {"name": "deit", "drop": 0.5}, "exif": True, "mean": (0.5, 1), "init_from": None}
    config["name"] = "folder:/\udcff"  # a path that is not UTF-8
    board.finish(9, config, {"eval_loss": 0.5, "averaged_eval_loss": 0.5}, group=group)
    board.close()
    fields, tags = hparams_of(tmp_path)
    assert fields == {"seed": 3, "model.name": "deit", "model.drop": 0.5, "exif": True, "mean": "[0.5, 1]"} | {
        "name": r"folder:/\udcff"
    }
    assert tags == {f"{group}/loss"}
    assert scalars_of(tmp_path) == scalars
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # one run


def test_images_are_shown_side_by_side(tmp_path, board):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    board.show(images)
    board.close()
    ((tag, step, shown),) = images_of(tmp_path)
    assert (tag, step) == ("train/first_batch", 0)
    np.testing.assert_array_equal(shown[:4, :15], np.concatenate(images, axis=1))
