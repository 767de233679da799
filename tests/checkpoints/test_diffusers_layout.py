"""Beside the real diffusers: it takes what we write and computes the same, and we take what it writes."""

import dataclasses
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.test_torch_layout import ODD
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from flax import nnx
from goldens.cases import TINY, relative_error, seeded_dit
from safetensors.torch import load_file, save_file

from dit_jax import DiT, GaussianDiffusion, load_dit, save_dit
from dit_jax.checkpoints.files import open_weights, write_weights
from dit_jax.checkpoints.record import Record
from dit_jax.checkpoints.torch_layout import to_leaves
from dit_jax.errors import InputError

LABELS = {str(label): f"name {label}, other name {label}" for label in range(TINY.num_classes)}
SINCOS = {"downscale_freq_shift": 1}


@lru_cache
def near_constant_tokens() -> DiT:
    """One whose first token hardly varies over its channels, so that a LayerNorm's epsilon shows in the output."""
    weights = seeded_dit(TINY).to_state_dict()
    weights["x_embedder.proj.weight"] *= 0.01
    weights["x_embedder.proj.bias"] = -weights["pos_embed"][0, 0]
    for name in weights:
        if ".attn.proj." in name or ".mlp.fc2." in name:
            weights[name] *= 0.01
    return DiT.from_state_dict(TINY, weights)


def draws(config=TINY) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((6, config.input_size, config.input_size, config.in_channels))
    return x.astype(np.float32), np.array([0, 1, 250, 500, 998, 999]), np.array([0, 3, 5, 7, 9, 10])


def output_there(network: DiTTransformer2DModel, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        pictures, t, y = torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(t), torch.from_numpy(y)
        return np.moveaxis(network.eval()(pictures, timestep=t, class_labels=y).sample.numpy(), 1, -1)


def loaded_there(folder: Path) -> DiTTransformer2DModel:
    network, info = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
    assert not any(info.values()), info
    return network


@pytest.mark.parametrize("norm2_eps", [1e-6, 1e-5])
def test_diffusers_takes_what_we_write_and_computes_the_same(tmp_path, norm2_eps):
    config = dataclasses.replace(TINY, **SINCOS, norm2_eps=norm2_eps)
    model = DiT.from_state_dict(config, near_constant_tokens().to_state_dict())
    save_dit(model, f"diffusers:{tmp_path / 'pipeline'}")
    theirs = output_there(loaded_there(tmp_path / "pipeline"), *draws())
    assert relative_error(model(*draws()), theirs) < 2e-5

    for field, other in {"downscale_freq_shift": 0, "norm2_eps": 1.1e-5 - norm2_eps}.items():
        switched = DiT.from_state_dict(dataclasses.replace(config, **{field: other}), model.to_state_dict())
        assert relative_error(switched(*draws()), theirs) > 1e-3, field


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_diffusers_takes_other_sizes_and_gives_the_weights_back(tmp_path, config):
    model = seeded_dit(config)
    save_dit(model, f"diffusers:{tmp_path / 'ours'}")
    loaded_there(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same(model, load_dit(tmp_path / "theirs", num_classes=config.num_classes))


def network(**sizes: int) -> DiTTransformer2DModel:
    """Theirs, with one embedder copied into every block as in all that was ever released."""
    transformer = DiTTransformer2DModel(**sizes)
    for name, copy in transformer.named_parameters():
        if ".norm1.emb." in name:
            copy.data = transformer.get_parameter(name.replace(name.split(".")[1], "0", 1)).data.clone()
    return transformer


@pytest.fixture(scope="module")
def pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    transformer = network(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))


@pytest.fixture
def saved(tmp_path, pipeline) -> Path:
    """A pipeline as the Hub has DiT's."""
    pipeline.save_pretrained(tmp_path / "saved")
    edit(tmp_path / "saved" / "model_index.json", id2label=LABELS)
    return tmp_path / "saved"


@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("bare", [True, False], ids=["transformer", "pipeline"])
def test_we_take_what_diffusers_saves(tmp_path, pipeline, class_name, safe, bare):
    saved = pipeline.transformer if bare else pipeline
    saved.save_pretrained(tmp_path, safe_serialization=safe)
    transformer = tmp_path if bare else tmp_path / "transformer"
    assert (transformer / "diffusion_pytorch_model.bin").exists() != safe
    edit(transformer / "config.json", _class_name=class_name)
    model = load_dit(tmp_path)
    assert model.config == TINY
    as_there = DiT.from_state_dict(dataclasses.replace(TINY, **SINCOS, norm2_eps=1e-5), model.to_state_dict())
    assert relative_error(as_there(*draws()), output_there(pipeline.transformer, *draws())) < 2e-5


def test_a_pipeline_comes_back_whole_from_orbax(tmp_path, pipeline, saved):
    for source, destination in ((saved, tmp_path / "arrays"), (tmp_path / "arrays", f"diffusers:{tmp_path / 'back'}")):
        weights = open_weights(source)
        write_weights(destination, weights.record, weights.leaves, weights.vae)
    back = DiTPipeline.from_pretrained(tmp_path / "back")
    for part in ("transformer", "vae"):
        before, after = getattr(pipeline, part).state_dict(), getattr(back, part).state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    assert back.labels == DiTPipeline.from_pretrained(saved).labels and len(back.labels) == 20
    pictures = back(back.get_label_ids(["name 3"]), guidance_scale=1, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("steps", [1000, 200])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "x_start"])
def test_the_scheduler_runs_the_process_of_the_record_and_tells_it(tmp_path, steps, schedule, prediction):
    record = Record.of(TINY)
    record.diffusion.update(steps=steps, schedule=schedule, prediction=prediction)
    write_weights(f"diffusers:{tmp_path / 'pipeline'}", record, to_leaves(TINY, near_constant_tokens().to_state_dict()))
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    ours = GaussianDiffusion.create(schedule=schedule, steps=steps)
    assert np.allclose(scheduler.alphas_cumprod, ours.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert scheduler.config.prediction_type == {"epsilon": "epsilon", "x_start": "sample"}[prediction]

    loaded_there(tmp_path / "pipeline").save_pretrained(tmp_path / "pipeline" / "transformer")  # without our record
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    assert open_weights(tmp_path / "pipeline").record.diffusion == record.diffusion


def test_heads_follow_the_folder_s_config_where_the_paper_has_this_size_with_others(tmp_path):
    sizes = dict(num_attention_heads=12, attention_head_dim=32, num_layers=12, patch_size=8, num_embeds_ada_norm=1)
    network(**sizes, out_channels=8).save_pretrained(tmp_path)
    assert load_dit(tmp_path).config.num_heads == 12


@pytest.mark.parametrize(
    "part",
    [
        "timestep_embedder.linear_1.weight",
        "timestep_embedder.linear_2.bias",
        "class_embedder.embedding_table.weight",
    ],
)
def test_embedders_trained_apart_are_refused_by_block(saved, part):
    name = f"transformer_blocks.2.norm1.emb.{part}"
    tensors = load_file(saved / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors[name].view(-1)[-1] += 1e-6
    edit_tensors(saved / "transformer", tensors)
    refuses(saved, rf"{name} differs from .*blocks\.0.*one for all blocks")


def test_a_missing_and_a_surplus_tensor_are_named(saved):
    file = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    edit_tensors(saved / "transformer", tensors | {"transformer_blocks.3.ff.net.2.bias": torch.zeros(64)})
    refuses(saved, r"holds transformer_blocks\.3\.ff\.net\.2\.bias")
    del tensors["transformer_blocks.1.attn1.to_k.bias"]
    edit_tensors(saved / "transformer", tensors)
    refuses(saved, r"lacks transformer_blocks\.1\.attn1\.to_k\.bias")
    file.unlink()
    refuses(saved, r"neither diffusion_pytorch_model\.safetensors nor diffusion_pytorch_model\.bin")


@pytest.mark.parametrize(
    ("file", "fields", "told"),
    [
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type='layer_norm'; a DiT has 'ada_norm_zero'"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "holds a UNet2DModel; expected one of DiT"),
        ("transformer/config.json", {"num_layers": 2}, r"holds transformer_blocks\.2.*a DiT of 2 layers"),
        ("transformer/config.json", {"num_layers": "two"}, r"config\.json has num_layers='two': expected int"),
        ("transformer/config.json", {"num_layers": 10**12}, "not those of 1000000000000 layers"),
        ("transformer/config.json", {"num_attention_heads": 0}, "pass --num_heads"),
        ("transformer/config.json", {"sample_size": None}, "has no 'sample_size'"),
        ("model_index.json", {"id2label": ["cat"]}, r"id2label=\['cat'\]: expected dict"),
        ("scheduler/scheduler_config.json", {"beta_end": "0.02"}, r"beta_end='0\.02': expected int \| float"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "and 0 steps: not one of DiT's"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule='scaled_linear'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("scheduler/scheduler_config.json", {"beta_start": 0.00085}, r"beta_start=0\.00085 over 1000 steps; a DiT has"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_or_a_process_that_is_not_dit_s_is_refused(saved, file, fields, told):
    edit(saved / file, **fields)
    refuses(saved, told)


@pytest.mark.parametrize("file", ["transformer/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_damaged_config_is_named(saved, file):
    (saved / file).write_text('{"_class_name": ')
    refuses(saved, f"{file} is not JSON")
    (saved / file).write_text("[1, 2]")
    refuses(saved, f"{file} holds a list: expected a JSON object")


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    refuses(tmp_path, r"holds no weights: no record\.json, checkpoints of a run, or diffusers' config\.json")


class Hostile:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_in_a_bin_is_named_and_not_run(saved, tmp_path):
    (saved / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"proj_out_1.weight": Hostile(tmp_path / "it-ran")}, saved / "transformer/diffusion_pytorch_model.bin")
    refuses(saved, r"diffusion_pytorch_model\.bin would run posix\.mkdir when loaded: refused")
    assert not (tmp_path / "it-ran").exists()


def test_what_diffusers_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    model = DiT(dataclasses.replace(TINY, mlp_ratio=3.0), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"mlp_ratio=3\.0: diffusers has 4 built in"):
        save_dit(model, f"diffusers:{tmp_path / 'pipeline'}")
    assert not list(tmp_path.iterdir())


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copied, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def same(one: DiT, other: DiT) -> None:
    assert one.config == other.config
    ours, theirs = one.to_state_dict(), other.to_state_dict()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def refuses(folder: Path, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_dit(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
