"""How linear the network is at one timestep: what a scalar and a linear map of its input leave unexplained of its prediction."""

import numpy as np
import torch

from .draws import FisherBatches


# Ridge regression has so many samples a dimension of its input, at least.
SAMPLES_PER_DIMENSION = 4
ALPHAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


def predicted_noise(model: torch.nn.Module, scheduler, noisy_images, timesteps, class_labels) -> torch.Tensor:
    """
    Returns eps_theta(x_t, t, y), whatever the network predicts.

    Args:
        model (`torch.nn.Module`): called as `model(noisy_images, timesteps, class_labels=class_labels).sample`.
        scheduler: a diffusers scheduler with `alphas_cumprod` and `config.prediction_type`.
        noisy_images (`torch.Tensor` of shape `(batch, channels, height, width)`), timesteps, class_labels (`torch.Tensor` of
            shape `(batch,)`).
    """
    prediction = model(noisy_images, timesteps, class_labels=class_labels).sample
    kept = scheduler.alphas_cumprod.to(noisy_images.device)[timesteps].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "sample":
        return (noisy_images - kept.sqrt() * prediction) / (1 - kept).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return kept.sqrt() * prediction + (1 - kept).sqrt() * noisy_images
    return prediction


@torch.no_grad()
def _pairs(model, scheduler, draws: FisherBatches) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and predictions of all draws, `(draws, pixels)` float64."""
    inputs, outputs = [], []
    for noisy_images, timesteps, class_labels, _ in draws:
        inputs.append(noisy_images.flatten(1).double().cpu())
        outputs.append(
            predicted_noise(model, scheduler, noisy_images, timesteps, class_labels).flatten(1).double().cpu()
        )
    return torch.cat(inputs).numpy(), torch.cat(outputs).numpy()


def scaled_prediction_error(model: torch.nn.Module, scheduler, draws: FisherBatches) -> float:
    """
    Returns the mean squared error between the input x_t and the scaled prediction `sqrt(1 - alpha_bar_t) eps_theta`, of
    arXiv 2509.23593, Sec. 3.2 and Figure 1.
    """
    inputs, outputs = _pairs(model, scheduler, draws)
    (timestep,) = range(*draws.timesteps)
    scale = (1 - scheduler.alphas_cumprod[timestep].double().item()) ** 0.5
    return float(np.square(inputs - scale * outputs).mean())


def linear_residuals(model: torch.nn.Module, scheduler, train: FisherBatches, held_out: FisherBatches) -> dict:
    """
    Returns what is left of the prediction's square on held-out draws, as a share, by two surrogates that were fitted to others.

    The paper's Assumption 1 has the network linear, and a scalar times its input (arXiv 2509.23593, Sec. 3.1); a critique of it
    asks for the residual. One map serves all classes.

    Args:
        model (`torch.nn.Module`), scheduler: as for [`predicted_noise`], in eval mode.
        train, held_out ([`FisherBatches`]): of one timestep and of different images; `train` has
            `SAMPLES_PER_DIMENSION` draws a dimension at least.

    Returns:
        `dict`: `scalar` and `linear` (shares of `|eps_theta|^2`), the fitted `scale`, the ridge's `alpha` (by leave-one-out error
        among the draws that it is fitted to), `samples` and `held_out_samples`.
    """
    from sklearn.linear_model import RidgeCV

    inputs, outputs = _pairs(model, scheduler, train)
    others, expected = _pairs(model, scheduler, held_out)
    assert len(inputs) >= SAMPLES_PER_DIMENSION * inputs.shape[1]
    scale = float((inputs * outputs).sum() / np.square(inputs).sum())
    ridge = RidgeCV(alphas=ALPHAS).fit(inputs, outputs)
    total = np.square(expected).sum()
    return {
        "scalar": float(np.square(expected - scale * others).sum() / total),
        "linear": float(np.square(expected - ridge.predict(others)).sum() / total),
        "scale": scale,
        "alpha": float(ridge.alpha_),
        "samples": len(inputs),
        "held_out_samples": len(others),
    }
