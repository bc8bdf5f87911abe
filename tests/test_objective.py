"""The training target against diffusers' schedulers."""

import pytest
import torch
from controlnet.model.control.prompt import Prompt
from controlnet.model.training.objective import Batch, NoiseSchedule
from diffusers import DDPMScheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_equals_diffusers(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    torch.manual_seed(0)
    z0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    diffusion = NoiseSchedule(scheduler)
    torch.testing.assert_close(diffusion.add_noise(z0, eps, t), scheduler.add_noise(z0, eps, t))
    expected = {"epsilon": eps, "v_prediction": scheduler.get_velocity(z0, eps, t), "sample": z0}[prediction]
    torch.testing.assert_close(diffusion.target(z0, eps, t), expected)
    assert torch.equal(diffusion.loss(expected, z0, eps, t), torch.zeros(3))
    plain = diffusion.loss(expected + 1, z0, eps, t)
    torch.testing.assert_close(plain, torch.ones(3))


def test_min_snr_weights_are_those_of_one_clean_estimate():
    """min(SNR, 5) on the error of z_0, whatever is predicted: the three weights differ by the known factors."""
    losses = {}
    z0, eps, t = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([300])
    for prediction in ("epsilon", "v_prediction", "sample"):
        diffusion = NoiseSchedule(DDPMScheduler(prediction_type=prediction))
        losses[prediction] = diffusion.loss(torch.ones_like(z0), z0, eps, t, min_snr=5.0).item()
    snr = (diffusion.alpha[300] / diffusion.sigma[300]).item() ** 2
    assert losses["epsilon"] == pytest.approx(min(snr, 5) / snr)
    assert losses["v_prediction"] == pytest.approx(min(snr, 5) / (snr + 1))
    assert losses["sample"] == pytest.approx(min(snr, 5))


def test_unknown_prediction():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        NoiseSchedule(scheduler)


def test_a_batch_is_its_tensors():
    prompt = Prompt(torch.randn(2, 4, 5), torch.randn(2, 6))
    batch = Batch(*(torch.randn(2, 3) for _ in range(3)), prompt, torch.ones(2, 3))
    again = Batch.of(*batch.tensors)
    assert all(a is b for a, b in zip(batch.tensors, again.tensors, strict=True)) and again.prompt.ids is None
