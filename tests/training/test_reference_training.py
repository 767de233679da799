"""The PyTorch twin of the training is worth comparing with: it gives the official run's numbers, and resumes."""

import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch
from goldens.cases import golden
from goldens.seeded import seeded_array, seeded_weights
from reference.diffusion import Diffusion
from reference.dit import DiT
from reference.training import Trainer

CASE = golden("train_tiny")


def tiny_trainer(lr: float = 1e-3) -> Trainer:
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10)
    weights = seeded_weights({name: p.shape for name, p in model.named_parameters() if name != "pos_embed"})
    model.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()}, strict=False)
    return Trainer(model, lr, ema_decay=0.99)


def run(trainer: Trainer, steps: range) -> list[list[float]]:
    """Rows of loss, mse, vb and gradient norm."""
    rows = []
    for i in steps:
        x, noise = (seeded_array(f"train_tiny/{name}/{i}", (8, 4, 8, 8)) for name in ("x", "n"))
        metrics = trainer.step(x, CASE["y"][i], CASE["t"][i], noise, CASE["drop"][i])
        rows.append([metrics[name] for name in ("loss", "mse", "vb", "grad_norm")])
    return rows


def test_losses_equal_the_published_ones_at_the_first_and_the_last_step():
    case = golden("diffusion")
    x0, t, noise = (torch.from_numpy(case[f"loss/{name}"]) for name in ("x0", "t", "noise"))
    diffusion = Diffusion()
    x_t = diffusion.q_sample(x0, t, noise)
    s = t[:, None, None, None].float()
    output = torch.cat([0.9 * x_t + 0.1 * torch.cos(s / 50), torch.tanh(0.5 * x_t + s / 1000 - 0.5)], dim=1)
    for name, term in diffusion.losses(output, x0, x_t, t, noise).items():
        # Late steps have a vb of 1e-4 bits, the small difference of numbers near 1: it is sure to 1e-7 only.
        np.testing.assert_allclose(term, case[f"loss/mse/{name}"], rtol=2e-5, atol=1e-7, err_msg=name)


def test_eight_steps_give_the_losses_and_weights_of_the_official_training():
    trainer = tiny_trainer()
    np.testing.assert_allclose(run(trainer, range(8)), CASE["losses"], rtol=2e-5)
    for name, model in (("model", trainer.model), ("ema", trainer.ema)):
        for key, weight in model.state_dict().items():
            error = np.abs(weight.numpy() - CASE[f"{name}/{key}"])
            if key.endswith("qkv.bias"):  # a key's bias has no gradient but rounding, which AdamW scales up
                assert error[32:64].max() < 4e-4
                error[32:64] = 0
            assert error.max() < 2e-5, f"{name}/{key}"


def test_a_saved_run_goes_on_in_another_trainer_as_if_never_stopped(tmp_path):
    whole, first, second = tiny_trainer(), tiny_trainer(), tiny_trainer(lr=0.1)
    run(first, range(4))
    first.save(tmp_path / "0000004.pt")
    second.load(tmp_path / "0000004.pt")
    assert run(second, range(4, 8)) == run(whole, range(8))[4:]
    for key, mean in whole.ema.state_dict().items():
        assert torch.equal(mean, second.ema.state_dict()[key]), key


def test_the_file_is_laid_out_as_an_official_training_checkpoint(tmp_path):
    trainer = tiny_trainer()
    run(trainer, range(2))
    trainer.save(tmp_path / "0000002.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "0000002.pt", weights_only=True)
    file = torch.load(tmp_path / "0000002.pt", weights_only=False)
    assert list(file) == ["model", "ema", "opt", "args"] and isinstance(file["args"], Namespace)
    for name in ("model", "ema"):
        assert [f"{name}/{key}" for key in file[name]] == [key for key in CASE if key.startswith(f"{name}/")]
    shapes = [weight.shape for weight in file["model"].values()]
    assert file["opt"]["param_groups"][0]["params"] == list(range(len(shapes)))
    state = file["opt"]["state"]  # none for parameter 0, the fixed pos_embed
    assert {i: moments["exp_avg"].shape for i, moments in state.items()} == dict(enumerate(shapes[1:], start=1))
    assert {float(moments["step"]) for moments in state.values()} == {2.0}
