"""
The class-conditional pipeline. This file is part of diffusers-cl (Apache-2.0) and is published with every model, so
that a model can be sampled where diffusers-cl is not installed: it needs torch and diffusers and nothing else.
"""

import inspect
import json
import numbers
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """
    Returns images as they are stored and measured: -1 becomes 0, 1 becomes 255.

    Args:
        images (`torch.Tensor` of any shape): floating point, in [-1, 1]; what lies outside is clamped.

    Returns:
        `torch.Tensor` of the same shape, `torch.uint8`, rounded to the nearest value.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Returns stored images (`torch.uint8`) as the network sees them: float32 in [-1, 1], the inverse of [`to_uint8`]."""
    return images.float() / 127.5 - 1


class ClassConditionalPipeline(DiffusionPipeline):
    r"""
    Pipeline that generates images of given classes, without guidance.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.). `save_pretrained` puts
    this file into the folder, which `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then loads
    without diffusers-cl; `ClassConditionalPipeline.from_pretrained(folder)` never runs a folder's code. (A model with
    adapters has code of theirs: diffusers-cl's `load_pipeline` loads it without running any.)

    Args:
        unet ([`UNet2DModel`] or [`DiTTransformer2DModel`]):
            A class-conditional denoiser, called as `unet(sample, timesteps, class_labels=class_labels).sample`.
        scheduler ([`SchedulerMixin`]):
            Steps from noise to images. It is kept as it is: its class and its `clip_sample` are the model's.
        id2label (`dict[str, str]` or `dict[int, str]`, *optional*):
            Class id to class name, of the classes that the model has seen: no others can be asked for. By default all
            rows of the model's class embedding, each named after its number.
        adapters ([`FunLoRA`], *optional*):
            Parameters of single classes, with which the frozen network is called in its place.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import DiffusionPipeline

    >>> pipe = DiffusionPipeline.from_pretrained("path/to/task-04", trust_remote_code=True)
    >>> pipe.known_classes
    {0: 'airplane', 1: 'automobile', 2: 'bird', 3: 'cat'}
    >>> images = pipe(class_labels=["cat", 0], generator=torch.Generator().manual_seed(0)).images
    ```
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["adapters"]

    # How model_index.json names a class that lies in the file pipeline.py beside it.
    _name_in_folder = ["pipeline", "ClassConditionalPipeline"]
    # Read while the class is made, and kept with it. A custom pipeline from a folder runs from one file in the modules
    # cache that the next one from any folder overwrites; so at the time of saving `__file__` can be another's code,
    # and so can the module's globals.
    _source = Path(__file__).read_bytes()

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | dict[int, str] | None = None,
        adapters: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, adapters=adapters)

        num_classes = self._num_classes
        if id2label is not None:
            if not all(str(class_id).isdecimal() and isinstance(name, str) for class_id, name in id2label.items()):
                raise ValueError(f"id2label maps class ids to names, got {dict(id2label)}")
            id2label = {str(int(class_id)): id2label[class_id] for class_id in sorted(id2label, key=int)}
            if len(set(id2label.values())) < len(id2label):
                raise ValueError(f"id2label gives two classes one name: {id2label}")
            own = [] if adapters is None else adapters.class_ids
            if num_classes is not None and any(int(id) >= num_classes and int(id) not in own for id in id2label):
                raise ValueError(f"id2label has ids beyond the model's {num_classes} classes: {id2label}")
        elif num_classes is None:
            raise ValueError("unet has no class embedding (num_class_embeds is not set): pass id2label")
        # A dict, not a list: a Hub load takes every list in model_index.json for a component.
        self.register_to_config(id2label=id2label)

    @property
    def _num_classes(self) -> int | None:
        """Rows of the class embedding, by the name that it has in UNet2DModel or in DiTTransformer2DModel."""
        return self.unet.config.get("num_class_embeds") or self.unet.config.get("num_embeds_ada_norm")

    @property
    def known_classes(self) -> dict[int, str]:
        """Class id to class name of the classes that can be asked for, in the order of the ids."""
        if self.config.id2label is None:
            return {class_id: str(class_id) for class_id in range(self._num_classes)}
        return {int(class_id): name for class_id, name in self.config.id2label.items()}

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """
        Returns the class ids that classes are given to the model as.

        Args:
            class_labels (`int`, `str`, a list of these, or an integer `torch.Tensor` of shape `(batch,)`):
                Integers are ids and strings are names: `"7"` is the class named 7, whatever its id.

        Returns:
            `list[int]`: one id for each.

        Raises:
            ValueError: for classes that the model has not seen; it lists those that it has.
        """
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, (str, numbers.Number)):
            class_labels = [class_labels]

        known = self.known_classes
        ids_by_name = {name: class_id for class_id, name in known.items()}
        class_ids, unknown = [], []
        for label in class_labels:
            class_id = ids_by_name.get(label) if isinstance(label, str) else label
            if isinstance(class_id, numbers.Integral) and class_id in known:
                class_ids.append(int(class_id))
            else:
                unknown.append(label)
        if unknown:
            raise ValueError(
                f"class_labels {', '.join(map(repr, unknown))}: not known to this model. Known (id: name): "
                + ", ".join(f"{class_id}: {name!r}" for class_id, name in known.items())
            )
        return class_ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            class_labels (`int`, `str`, a list of these, or an integer `torch.Tensor` of shape `(batch,)`):
                The class of each image. Integers are ids, strings are names.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps, each of which is one evaluation of the model with most schedulers
                ([`FlowMatchHeunDiscreteScheduler`] takes two in every step but the last).
            eta (`float`, *optional*, defaults to 0.0):
                Corresponds to parameter eta of the DDIM paper (arXiv 2010.02502, Eq. 16): 0 is DDIM, 1 is DDPM. It is
                passed to schedulers that take it, such as [`DDIMScheduler`].
            generator (`torch.Generator` or a list of one for each image, *optional*):
                Makes generation deterministic. The global one by default.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*):
                The noise to start from, standard normal. Drawn with `generator` by default. Where it is given the
                global generator is not touched.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`: a list of `PIL.Image.Image`, of mode L where the model has one channel and RGB where it has
                three. `"np"`: an array of shape `(batch, height, width, channels)` in [0, 1]. `"pt"`: a tensor of
                shape `(batch, channels, height, width)` in [0, 1]. `"latent"`: what the last step gave, in the [-1, 1]
                of training and not clamped.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~pipelines.ImagePipelineOutput`] instead of a plain tuple.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`~pipelines.ImagePipelineOutput`] is returned, otherwise a `tuple` whose
                first element is the images.

        Raises:
            ValueError: for classes that the model has not seen (it lists those that it has), another `output_type`,
                latents or generators that are not one for each image, and for latents without a generator where the
                steps draw noise too.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is not one of 'pil', 'np', 'pt', 'latent'")
        class_ids = self.get_label_ids(class_labels)
        if isinstance(generator, list) and len(generator) != len(class_ids):
            raise ValueError(f"generator is a list of {len(generator)}, class_labels has {len(class_ids)}")

        step_parameters = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {}
        # That they take a generator is for noise that they draw only if they are told to.
        is_flow = isinstance(self.scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler))
        draws_noise = not is_flow or self.scheduler.config.get("stochastic_sampling", False)
        if "eta" in step_parameters:
            step_kwargs["eta"] = eta
        elif eta:
            logger.warning(f"eta={eta} is ignored: {type(self.scheduler).__name__} does not take it.")
        if "generator" in step_parameters:
            step_kwargs["generator"] = generator
            if latents is not None and generator is None and step_kwargs.get("eta") != 0 and draws_noise:
                raise ValueError(
                    f"latents without generator: {type(self.scheduler).__name__} may draw noise in its steps, pass"
                    " the generator to draw it with"
                )

        device = self._execution_device
        sample_size = self.unet.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        shape = (len(class_ids), self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents are of shape {tuple(latents.shape)}, expected {shape}")

        # Not all modules need be in the same mode.
        training_modules = [module for module in self.unet.modules() if module.training]
        self.unet.eval()
        try:
            images = self._denoise(latents.to(device, self.unet.dtype), class_ids, num_inference_steps, step_kwargs)
        finally:
            for module in training_modules:
                module.training = True

        if output_type == "pil":
            # numpy_to_pil multiplies by 255 and rounds, which gives the uint8 values back.
            images = self.numpy_to_pil(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy() / 255)
        elif output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
            if output_type == "np":
                images = images.permute(0, 2, 3, 1).float().cpu().numpy()

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _denoise(self, images, class_ids, num_inference_steps, step_kwargs):
        """Returns the images that the scheduler arrives at from noise, in [-1, 1] up to the scheduler's clipping."""
        class_labels = torch.tensor(class_ids, device=images.device)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # By default the last of the steps would be that from sigma 0.001 to 0.
            sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
            self.scheduler.set_timesteps(sigmas=sigmas)
        else:
            self.scheduler.set_timesteps(num_inference_steps)
        # Schedulers of flow matching have neither: their noise is standard normal, and the model sees it as it is.
        images = images * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        # Schedulers branch on the timestep and so keep it on the host, the model takes it on the device: one copy of
        # all timesteps, or else every step waits for the device.
        timesteps = self.scheduler.timesteps.to(images.device)
        model = self.unet if self.adapters is None else self.adapters.for_rows(self.unet, class_ids)
        for t, timestep in zip(self.progress_bar(self.scheduler.timesteps), timesteps, strict=True):
            sample = scale_model_input(images, t)
            model_output = model(sample, timestep.expand(len(class_ids)), class_labels=class_labels).sample
            images = self.scheduler.step(model_output, t, images, **step_kwargs).prev_sample
        return images

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """What model_index.json holds, with this class for the one in the folder: no code of the folder is run."""
        config = super()._dict_from_json_file(json_file)
        if config.get("_class_name") == cls._name_in_folder:
            config["_class_name"] = cls.__name__
        return config

    def to_json_string(self) -> str:
        """Returns the text of model_index.json, which names this class as the one in the folder's pipeline.py."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._name_in_folder
        if self.adapters is None:
            del config["adapters"]
        else:
            # diffusers looks for the code of a component of its own in the component's folder.
            config["adapters"] = ["funlora", "FunLoRA"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves model_index.json, and this file as pipeline.py, which model_index.json refers to.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to. Will be created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                As in [`~ConfigMixin.save_config`], together with `kwargs`.
        """
        os.makedirs(save_directory, exist_ok=True)
        (Path(save_directory) / f"{self._name_in_folder[0]}.py").write_bytes(self._source)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
