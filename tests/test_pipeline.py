"""The pipeline: what it draws, from which classes, and what it leaves alone."""

import numpy as np
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
)
from pipeline_helpers import ID2LABEL, LABELS, noise, seeded, tiny_pipeline, tiny_unet

from diffusers_cl.pipeline import ClassConditionalPipeline, to_uint8


def test_to_uint8_clamps_and_rounds():
    images = torch.tensor([-9.0, -1.0, -0.5, 0.0, 1.0, 9.0])
    assert to_uint8(images).tolist() == [0, 0, 64, 128, 255, 255]  # 63.75 and 127.5 before rounding
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    # In bfloat16 itself the sum and the product would be rounded, to 192.
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).item() == 191


def test_names_and_ids():
    pipe = tiny_pipeline()
    assert pipe.known_classes == ID2LABEL
    assert pipe.get_label_ids(LABELS) == [0, 3, 1, 1]
    assert pipe.get_label_ids("7") == pipe.get_label_ids(1) == pipe.get_label_ids(torch.tensor(1)) == [1]
    assert pipe.get_label_ids(torch.tensor([3, 0])) == pipe.get_label_ids(np.array([3, 0])) == [3, 0]

    by_name = pipe(["cat", "dog"], num_inference_steps=2, generator=seeded(), output_type="np").images
    by_id = pipe(torch.tensor([0, 3]), num_inference_steps=2, generator=seeded(), output_type="np").images
    assert np.array_equal(by_name, by_id)

    unnamed = tiny_pipeline(id2label=None)
    assert unnamed.known_classes == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert unnamed.get_label_ids(["2", 2]) == [2, 2]


@pytest.mark.parametrize("label", [2, 4, -1, 0.5, 1.0, "bird", "3", ["cat", "bird"], torch.tensor([0.0])])
def test_unknown_class_lists_the_known(label):
    with pytest.raises(ValueError, match=r"class_labels .*Known \(id: name\): 0: 'cat', 1: '7', 3: 'dog'$"):
        tiny_pipeline()(label)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"cat": 0}, "maps class ids to names"),
        ({-1: "cat"}, "maps class ids to names"),
        ({0: "cat", 1: "cat"}, "one name"),
        ({4: "cat"}, "beyond the model's 4 classes"),
    ],
)
def test_wrong_id2label(id2label, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(id2label=id2label)


def test_unconditional_model_is_refused():
    with pytest.raises(ValueError, match="num_class_embeds"):
        ClassConditionalPipeline(tiny_unet(num_class_embeds=None), DDIMScheduler())


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_diffusers_consistency_model_pipeline(channels):
    pipe = tiny_pipeline(channels)
    # A generator, not latents: it takes latents of three channels only.
    expected = ConsistencyModelPipeline(pipe.unet, DDIMScheduler())(
        batch_size=4, class_labels=[0, 3, 1, 1], generator=seeded(), num_inference_steps=5, output_type="np"
    ).images
    actual = pipe(LABELS, num_inference_steps=5, latents=noise(channels), output_type="np").images
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (DDIMScheduler(), 0.0),
        (DDIMScheduler(clip_sample=False), 1.0),
        (DDPMScheduler(), 0.0),
        (EulerDiscreteScheduler(), 0.0),
    ],
    ids=["ddim", "ddim-eta", "ddpm", "euler"],
)
def test_equal_to_a_handwritten_loop(scheduler, eta):
    pipe = tiny_pipeline(scheduler=scheduler)
    assert pipe.scheduler is scheduler
    actual = pipe(LABELS, 4, eta=eta, generator=seeded(1), latents=noise(), output_type="latent").images

    scheduler.set_timesteps(4)
    expected, step_generator = noise() * scheduler.init_noise_sigma, seeded(1)
    kwargs = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    for t in scheduler.timesteps:
        with torch.no_grad():
            sample = scheduler.scale_model_input(expected, t)
            model_output = pipe.unet(sample, t, class_labels=torch.tensor([0, 3, 1, 1])).sample
        expected = scheduler.step(model_output, t, expected, generator=step_generator, **kwargs).prev_sample
    assert torch.equal(actual, expected)


def test_transformer_denoiser():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=4,
    )
    pipe = ClassConditionalPipeline(transformer, DDIMScheduler())
    assert list(pipe.known_classes) == [0, 1, 2, 3]
    images = pipe([0, 3], num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_generators():
    pipe = tiny_pipeline()
    kwargs = {"num_inference_steps": 3, "output_type": "latent"}
    drawn = pipe(LABELS, generator=seeded(), **kwargs).images
    assert torch.equal(drawn, pipe(LABELS, latents=noise(), **kwargs).images)

    # One generator an image: the image does not depend on its batch. The tolerance is for a convolution that sums in
    # another order for another batch size.
    together = pipe(LABELS, eta=1.0, generator=[seeded(i) for i in range(4)], **kwargs).images
    alone = pipe(LABELS[2], eta=1.0, generator=[seeded(2)], **kwargs).images
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = tiny_pipeline(channels, DDIMScheduler(clip_sample=False))
    kwargs = {"num_inference_steps": 3, "latents": noise(channels)}
    raw = pipe(LABELS, output_type="latent", **kwargs).images
    assert raw.shape == (4, channels, 8, 8) and raw.abs().max() > 1
    pt = pipe(LABELS, output_type="pt", **kwargs).images
    assert torch.equal(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(pipe(LABELS, output_type="np", **kwargs).images, pt.permute(0, 2, 3, 1).numpy())

    (images,) = pipe(LABELS, return_dict=False, **kwargs)
    assert [image.mode for image in images] == [mode] * 4
    pixels = np.stack([np.asarray(image).reshape(8, 8, channels) for image in images])
    assert np.array_equal(pixels, to_uint8(raw).permute(0, 2, 3, 1).numpy())


def test_modes_are_restored():
    unet = tiny_unet(dropout=0.5)
    pipe = ClassConditionalPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    unet.eval()
    expected = pipe([0], 2, latents=noise(num_images=1), output_type="latent").images
    assert not any(module.training for module in unet.modules())

    unet.train()
    unet.mid_block.eval()
    modes = [module.training for module in unet.modules()]
    actual = pipe([0], 2, latents=noise(num_images=1), output_type="latent").images
    assert torch.equal(actual, expected), "dropout was active"
    assert [module.training for module in unet.modules()] == modes
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe([0], 2000, latents=noise(num_images=1))
    assert [module.training for module in unet.modules()] == modes
    assert not actual.requires_grad


def test_global_rng_is_untouched():
    latents = noise()
    before = torch.get_rng_state()
    tiny = tiny_pipeline()
    torch.set_rng_state(before)
    tiny(LABELS, 2, latents=latents)
    tiny(LABELS, 2, eta=1.0, latents=latents, generator=seeded())
    tiny(LABELS, 2, eta=1.0, generator=seeded())
    with pytest.raises(ValueError, match="latents without generator"):
        tiny(LABELS, 2, eta=1.0, latents=latents)
    tiny.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="DDPMScheduler may draw noise"):
        tiny(LABELS, 2, latents=latents)
    tiny(LABELS, 2, latents=latents, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(latents, noise()), "latents were changed in place"


def test_eta_is_ignored_with_a_warning(caplog):
    pipe = tiny_pipeline(scheduler=DDPMScheduler())
    expected = pipe(LABELS, 2, generator=seeded(), output_type="latent").images
    actual = pipe(LABELS, 2, eta=0.5, generator=seeded(), output_type="latent").images
    assert torch.equal(actual, expected)
    assert "eta=0.5 is ignored: DDPMScheduler" in caplog.text


def test_wrong_arguments():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="output_type 'jpg'"):
        pipe(LABELS, output_type="jpg")
    with pytest.raises(ValueError, match=r"latents are of shape \(3, 1, 8, 8\), expected \(4, 1, 8, 8\)"):
        pipe(LABELS, latents=noise(num_images=3))
    with pytest.raises(ValueError, match="generator is a list of 1, class_labels has 4"):
        pipe(LABELS, generator=[seeded()])


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_do_not_wait_for_the_gpu():
    pipe = tiny_pipeline().to("cuda")
    num_waits = []
    for num_inference_steps in (2, 2, 8):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as warned:
                pipe(LABELS, num_inference_steps, latents=noise(), output_type="latent")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        num_waits.append(len(warned))
    # The first call also sets up.
    assert num_waits[1] == num_waits[2]
