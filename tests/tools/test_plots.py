import pytest
from PIL import Image

from castling_jax.ops.errors import InputError
from castling_jax.tools.plots import draw_training
from castling_jax.training.metrics import MetricsWriter


def test_picture_is_drawn_from_the_metrics_alone(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=0, tensorboard=False)
    for step in range(1, 20):
        line = {"loss": 2 / step, "learning_rate": 1e-3, "mask_threshold": step / 20, "mask_density": [0.5, 1 / step]}
        if step % 5 == 0:
            line |= {"accuracy_train_form": 0.9, "accuracy_inference_form": 0.8, "eval_loss": 1.0}
        writer.write(step, line)
    writer.close()
    with Image.open(draw_training(tmp_path)) as picture:
        assert picture.size > (800, 500)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics to draw: metrics.jsonl is missing or empty"):
        draw_training(tmp_path)
