"""Suggests the known name for one that is mistyped, or that another library uses."""

import difflib
import re
from collections.abc import Iterable

# A name in timm, Keras, torch, torchvision, Transformers or Optax -> our names for it; `suggest` takes the first one
# that is known. The names of models are translated by `_as_ours`.
SYNONYMS: dict[str, tuple[str, ...]] = {
    theirs: tuple(ours.split())
    for ours, all_theirs in {
        # models and their arguments
        "image_size": "img_size input_size input_shape size resolution image_resolution img_dim crop_size res",
        "num_classes": "classes n_classes nb_classes num_labels n_labels class_num output_dim",
        "in_chans": "channels in_channels num_channels input_channels in_dim",
        "embed_dim": "dim hidden_size hidden_dim width embed_dims d_model embedding_dim",
        "depth depths": "layers num_layers n_layers num_hidden_layers n_layer blocks num_blocks",
        "num_heads": "heads n_heads nhead num_attention_heads n_head",
        "mlp_ratio": "mlp_dim intermediate_size mlp_expansion",
        "drop_path_rate": "drop_path stochastic_depth stochastic_depth_prob stochastic_depth_rate droppath drop_rate",
        "remat": "grad_checkpointing gradient_checkpointing checkpointing use_checkpoint",
        "dtype": "precision mixed_precision amp half_precision compute_dtype",
        "rngs": "rng seed key",
        "window_size": "window win_size",
        "attention": "attn attention_type attn_type attn_layer mixer token_mixer",
        "form": "mode stage phase",
        "castling": "castle castling_vit",
        "linear_angular": "linear angular_linear linear_attention lin_angular",
        "softmax": "mha mhsa full vanilla standard dot_product scaled_dot_product sdpa self_attention vit attention",
        "window": "swin windowed shifted_window",
        "performer": "favor favor_plus",
        "deit": "vit",
        "inference": "eval test deploy infer predict evaluation",
        "train": "training fit",
        "bfloat16": "bf16 fp16 half float16 f16",
        "float32": "fp32 float f32 single float64 double full",
        # configuration
        "learning_rate": "lr base_lr peak_lr max_lr init_lr learningrate peak_value",
        "final_learning_rate": "min_lr end_lr lr_min eta_min end_value",
        "initial_learning_rate": "warmup_lr start_lr init_value",
        "weight_decay": "wd decay adamw_weight_decay l2",
        "warmup_epochs": "warmup warmup_steps num_warmup_steps warmup_length",
        "b1": "beta1 adam_beta1 momentum beta_1",
        "b2": "beta2 adam_beta2 beta_2 betas",
        "clip_norm": "clip_grad max_grad_norm grad_clip gradient_clip clip_grad_norm grad_clip_norm clipnorm max_norm",
        "adaptive_clip": "agc",
        "batch_size": "bs batch global_batch_size train_batch_size per_device_train_batch_size",
        "epochs": "num_epochs n_epochs max_epochs num_train_epochs nb_epochs epoch",
        "accumulate_steps": "grad_accum grad_accum_steps accum_iter gradient_accumulation_steps",
        "label_smoothing": "smoothing",
        "ema_decay": "model_ema_decay ema model_ema polyak",
        "randaugment": "aa auto_augment autoaugment rand_augment ra",
        "erasing": "reprob random_erasing re_prob",
        "flip": "hflip horizontal_flip random_flip",
        "crop_scale": "scale random_resized_crop rrc",
        "crop_ratio": "crop_pct test_crop_ratio",
        "interpolation": "train_interpolation test_interpolation resample",
        "mix_switch": "mixup_switch_prob",
        "mix_probability": "mixup_prob",
        "repeats": "repeated_aug aug_repeats num_repeats",
        "workers": "num_workers dataloader_num_workers",
        "init_from": "pretrained finetune weights checkpoint_path init load_from",
        "workdir": "output_dir out_dir output save_dir exp_dir run_dir results_dir",
        "every_steps": "save_every save_steps log_every logging_steps save_interval log_interval",
        "every_epochs": "eval_every eval_interval val_interval",
        "keep": "max_to_keep save_total_limit checkpoint_hist",
        "name": "data_path dataset path model arch",
    }.items()
    for theirs in all_theirs.split()
}
THEIR_MODEL_NAMES = {  # pattern -> replacement, applied in this order
    r"^(facebook|google|microsoft|timm)_": "",
    r"\..*|_(distilled|conv)(?=_|$)|_patch\d+.*|_in\d+k.*": "",
    r"^(vit|deit3)_": "deit_",
    r"^mvit_v2_": "mvitv2_",
    r"^(deit_\w+)_\d+$": r"\1",
    r"_(t|ti)$": "_tiny",
    r"_s$": "_small",
    r"_b$": "_base",
}
CUTOFF = 0.5  # names that difflib finds less similar are not suggested


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely stands for, or None.

    In a dotted name such as `optimizer.lr`, the last word counts most: among the known names that end in it, or in our
    word for it, the nearest one is suggested; without such a name, the group that `name` mentions is searched.
    """
    choices = list(known)
    plain = re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")
    as_ours = _as_ours(plain)
    for candidate in (plain, as_ours):
        if candidate in choices:
            return candidate
    group, _, word = plain.rpartition(".")
    words: dict[str, list[str]] = {}  # last word -> the known names that end in it
    for choice in choices:
        words.setdefault(choice.rpartition(".")[2], []).append(choice)
    for meant in (word, *SYNONYMS.get(word, ())):
        if meant in words:
            # Cutoff 0: the word fits, so a far-off group must not hide it.
            return _nearest(f"{group}.{meant}", words[meant], 0)
    if group:
        # The whole name is compared only among names whose last word is similar: groups are long and alike.
        return _nearest(
            plain, [choice for choice in group_of(name, choices) if _nearest(word, [choice.rpartition(".")[2]])]
        )
    return _nearest(as_ours, choices)


def group_of(name: str, known: Iterable[str]) -> list[str]:
    """The known names in a dotted name's group, or in the most similar group; all known names if it has no group."""
    choices = list(known)
    group = name.rpartition(".")[0]
    nearest = _nearest(group, sorted({choice.rpartition(".")[0] for choice in choices} - {""})) if group else None
    return [choice for choice in choices if choice.startswith(f"{nearest}.")] if nearest else choices


def _as_ours(model: str) -> str:
    """A model's name in timm, torchvision or Transformers -> ours: facebook_deit_base_patch16_224 -> deit_base."""
    for theirs, ours in THEIR_MODEL_NAMES.items():
        model = re.sub(theirs, ours, model)
    return model


def _nearest(name: str, choices: list[str], cutoff: float = CUTOFF) -> str | None:
    return next(iter(difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)), None)
