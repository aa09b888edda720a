"""The configuration of a run: one flat dataclass. [`parse_config`] in arguments.py fills it, [`validate`] checks it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal


# Keys that may differ when a run is continued: they move no number in metrics.json.
OPERATIONAL_KEYS = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "logging_steps",
    "logging_dir",
    "cache_dir",
    "dataloader_num_workers",
    "allow_inexact",
    "skip_nonfinite",
    "ddp_timeout",
    "debug",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
    "hub_revision",
    "hub_push_timeout",
)
# Never written anywhere.
SECRET_KEYS = ("hub_token",)
NUM_TRAIN_TIMESTEPS = 1000
# arXiv 2510.02631, Sec. 5.3: the layers 40 to 54 of its network, by the names that they have in `UNet2DModel`.
FUNLORA_LAYERS = (
    "up_blocks.1.resnets.1.conv_shortcut",
    "up_blocks.1.resnets.2.*",
    "up_blocks.1.upsamplers.0.*",
    "up_blocks.2.*",
)


@dataclass
class TrainingConfig:
    """Trains a class-conditional diffusion model on a stream of class sets."""

    # Data
    dataset_name: str | None = None
    """A dataset on the Hub, a folder that `datasets` can load, or `digits` (scikit-learn's, no download)."""
    dataset_config_name: str | None = None
    """The configuration of the dataset, if it has more than one."""
    train_data_dir: str | None = None
    """A folder of images, one sub-folder a class (`imagefolder`). Give this or `dataset_name`."""
    image_column: str | None = None
    """The column with the images; found by itself if there is one `Image` column, `image` or `img`."""
    label_column: str | None = None
    """The column with the classes; found by itself if it is `label`, `fine_label` or the only `ClassLabel` column."""
    train_split: str = "train"
    """The split to train on."""
    eval_split: str | None = None
    """The split to evaluate on; by default `test`, else `validation`, else a stratified 20 % of the training split."""
    max_train_samples: int | None = None
    """Use at most so many training images, chosen by the seed."""
    resolution: int = 32
    """Height and width of the images that the model sees, in pixels."""
    resize_mode: Literal["pad", "resize"] = "resize"
    """`pad` smaller images with black (-1) to the resolution, or `resize` the shorter side and crop the centre."""
    random_flip: bool = False
    """Flip training images horizontally at random."""
    cache_dir: str | None = None
    """Where downloads and the feature classifier are kept; by default the Hugging Face cache."""
    dataloader_num_workers: int = 0
    """Processes that load images where a task's do not fit in memory, decoded once; 0 loads in the main process."""

    # Stream
    tasks: list[list[str | int]] | None = None  # Text first: jsonargparse tries types in order, and '01' is no 1.
    """The classes of every task: lists of class names (or of label ids). Give this or `classes_per_task`."""
    classes_per_task: int | None = None
    """Cut all classes, in `class_order`, into tasks of so many."""
    class_order: int | list[str | int] | None = None
    """For `classes_per_task`: a list of class names or ids, or a number that seeds a shuffle; by default label order."""
    stream: Literal["sequential", "joint", "cumulative"] = "sequential"
    """`sequential`: a task sees its own classes; `joint`: one phase over all (upper bound); `cumulative`: a task sees all
    so far. The last two refuse replay and penalty."""
    num_class_embeds: int | None = None
    """Rows of the class embedding; by default the number of classes in all tasks."""

    # Method
    replay: Literal["none", "generative_replay", "generative_distillation", "lwf", "memory"] = "none"
    """Rows of earlier classes in every batch: drawn by the last task's model, with the noise (`generative_replay`) or its
    prediction as target (`generative_distillation`); the new images as earlier classes, with its prediction (`lwf`); or
    real images that are kept (`memory`)."""
    replay_weighting: Literal["sum", "by_task"] = "sum"
    """`sum`: new rows weigh 1, replayed rows `distillation_weight`; `by_task`: 1/k and 1 - 1/k in task k."""
    distillation_weight: float = 1.0
    """Weight of the replayed rows' mean loss, for `replay_weighting: sum`."""
    replay_images_per_class: int = 5000
    """How many images of every earlier class are generated."""
    replay_num_inference_steps: int = 50
    """Steps for a replayed image, of DDIM or, for a flow, of Euler."""
    replay_batch_size: int = 256
    """Images a forward pass when generating replay; another value changes images by about 1e-4."""
    replay_refresh: Literal["latest", "once"] = "latest"
    """`latest`: all classes are generated anew before each task; `once`: each right after it was learned, and kept."""
    memory_images_per_class: int = 10
    """For `replay: memory`: how many real images of every class are kept."""
    memory_bytes: int | None = None
    """In place of that, bytes for the kept images of all classes together: each class's share shrinks as they come."""
    penalty: Literal["none", "ewc", "rank1_ewc", "lowrank_ewc", "l2", "random_direction"] = "none"
    """A quadratic penalty around finished tasks' weights, with a Fisher that is diagonal, rank-1 or of rank `fisher_rank`;
    `l2` (all parameters alike) and `random_direction` (as stiff as `rank1_ewc`) are there to judge them by."""
    penalty_mode: Literal["loss", "decoupled"] = "loss"
    """`loss`: added to the loss (the paper); `decoupled`: an exact proximal step after the optimizer's (not the paper)."""
    ewc_lambda: str | float = 15_000.0
    """Weight of the penalty, or `auto`: the measured curvature of the old task's loss in its place; `10xauto` is ten times
    that."""
    fisher_rank: int = 8
    """For `penalty: lowrank_ewc`: directions a task, each of which costs one parameter vector."""
    fisher_samples: int | None = None
    """Draws of image, timestep and noise for the Fisher; by default one for every training image of the task."""
    fisher_batch_size: int = 128
    """Draws a pass through the network takes at once for the Fisher; another value changes it by about 1e-5, a curvature by
    1e-3."""
    fisher_timesteps: list[int] = dataclasses.field(default_factory=lambda: [0, NUM_TRAIN_TIMESTEPS])
    """Timesteps `[start, end)` that the Fisher is averaged over; low SNR is [667, 1000]."""
    fisher_diagnostics: bool = True
    """Also measure the trace, the direction's share of it and the curvature along it."""

    # Model
    pretrained_model_name_or_path: str | None = None
    """Go on from this task: a Hub repo or a task folder. Its method, training and evaluation settings hold where nothing
    else is given."""
    revision: str | None = None
    """Branch, tag or commit of that repo."""
    allow_known_classes: bool = False
    """Let new data have classes that the model knows already, to refine them."""
    model_config_name_or_path: str | None = None
    """A `UNet2DModel` config (JSON file, folder or Hub id); by default the paper's network (37 M parameters). The script
    sets sample_size, in_channels, out_channels and num_class_embeds."""
    objective: Literal["diffusion", "flow_matching"] = "diffusion"
    """`diffusion`: DDIM's noise schedule, and `prediction_type`; `flow_matching`: straight paths from image to noise, and the
    velocity along them."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts, for `objective: diffusion`."""
    adapter: Literal["none", "funlora"] = "none"
    """`funlora`: after the first task, or the model that the run goes on from, the network is frozen, and every new class
    gets a few parameters of its own: no replay, no penalty, nothing forgotten."""
    adapter_layers: list[str] = dataclasses.field(default_factory=lambda: list(FUNLORA_LAYERS))
    """The convolutions that a class adapts, by name or pattern (`up_blocks.*`)."""
    adapter_ratio: int = 1
    """A class's vectors are shorter by this ratio, and each of their numbers stands for so many channels."""
    adapter_learning_rate: float | None = None
    """Peak learning rate of tasks in which a frozen network is adapted; by default `learning_rate`."""
    funlora_function: Literal["cosine", "power", "shift", "vanilla"] = "cosine"
    """What raises the rank of a class's factor; `vanilla` leaves it at 1."""
    funlora_terms: int = 10
    """How many functions are summed up."""
    funlora_learn_terms: bool = True
    """Train the frequencies (`cosine`) or powers (`power`) too, and not the weights of the sum alone."""
    train_class_embedding: bool = False
    """Train an adapted class's embedding row as well, which is else the mean of the first task's rows."""

    # Training
    output_dir: str = "continual-model"
    """Where the run leaves its files. The same command in the same folder goes on where it was."""
    overwrite_output_dir: bool = False
    """Delete the run in `output_dir` and start over."""
    seed: int = 0
    """Every random draw of the run is a function of it."""
    num_threads: int | None = None
    """CPU threads a process; by default the available cores divided by the processes on this machine."""
    train_batch_size: int = 128
    """Images of the current task in a batch, per process; as many replayed ones are added."""
    num_train_epochs: int = 200
    """Epochs a task."""
    max_train_steps: int | list[int] | None = None
    """Optimizer steps a task, in place of epochs; a list gives every task its own and repeats its last entry. With
    `stream: joint` the one phase takes the sum over all tasks."""
    gradient_accumulation_steps: int = 1
    """Batches an optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Schedule of the learning rate over a task, in optimizer steps."""
    lr_warmup_steps: int = 0
    """Optimizer steps of warm-up, in every task."""
    adam_beta1: float = 0.9
    """Adam's beta1."""
    adam_beta2: float = 0.999
    """Adam's beta2."""
    adam_weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; by default not clipped."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of training; by default what `accelerate` was told. Fisher and sampling are always float32."""
    dynamo_backend: Literal["no", "inductor"] | None = None
    """`inductor` compiles student and teacher with `torch.compile` for training; by default what `accelerate` was told."""
    channels_last: bool = False
    """Keep the network's weights in channels-last memory format."""
    allow_tf32: bool = False
    """Let training and sampling use TF32 on GPUs; the Fisher never does."""
    use_ema: bool = False
    """Train with an exponential moving average, which becomes the model when a task ends."""
    ema_inv_gamma: float = 1.0
    """Inverse gamma of the EMA's warm-up."""
    ema_power: float = 0.75
    """Power of the EMA's warm-up."""
    ema_max_decay: float = 0.9999
    """Largest decay of the EMA."""
    checkpointing_steps: int = 500
    """Save a checkpoint for resuming every so many optimizer steps."""
    checkpoints_total_limit: int | None = None
    """Keep at most so many checkpoints, two at least."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to go back to: what was made after it is deleted. By default the newest valid one in
    `output_dir`."""
    allow_inexact: bool = False
    """Go on with another number of processes or threads, device or versions than before; the numbers then differ, and
    `run.json` records it."""
    skip_nonfinite: int = 0
    """Skip at most so many steps with a loss or gradient that is not finite, and note their images in `run.json`; then
    the run stops."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others before it takes them for lost; more than the main one needs alone, for
    downloads, checking images and the feature classifier."""
    debug: bool = False
    """Print the traceback of faults that end with one sentence."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where to send losses and images while training."""
    logging_steps: int = 10
    """Send losses there every so many optimizer steps; `logs/train_log.jsonl` has every one."""
    logging_dir: str = "logs"
    """Folder for the trackers' files, inside `output_dir`."""
    license: str = "apache-2.0"
    """License of the published models, for their cards."""

    # Hub
    push_to_hub: bool = False
    """Publish every finished task as a model repo, while the next one trains."""
    hub_model_id: str | None = None
    """Name of the repos, to which `-task-00`, ... is added; by default that of `output_dir`."""
    hub_private_repo: bool | None = None
    """Make the repos private; by default as the account has it."""
    hub_token: str | None = None
    """A write token; by default that of `hf auth login`. It is never written to a file."""
    hub_revision: str | None = None
    """Branch to push to; by default the main one."""
    hub_push_timeout: float = 300.0
    """Seconds to wait at the end for what is not pushed yet; then the run ends with exit code 8."""

    # Evaluation
    eval_images_per_class: int | None = None
    """Cap on test images a class, and so on generated ones; by default as many as the test split has."""
    eval_num_inference_steps: int = 50
    """Steps for an evaluated image, of DDIM or, for a flow, of Euler."""
    eval_batch_size: int = 256
    """Images a forward pass when generating for evaluation."""
    feature_extractor: str = "inception"
    """`inception` (FID, KID), `classifier` (a small CNN trained here on the real training split: fd_classifier,
    accuracy), or a transformers image classifier (Hub id or folder)."""
    generated_classifier_images: int | None = None
    """After every task train a classifier on so many generated images of every class so far, and test it on the real test
    images: LA and AIA of arXiv 2510.02631; by default not."""
    eval_classifier: str | None = None
    """A transformers image classifier (Hub id or folder) for accuracy, in place of the feature extractor's own."""
    feature_extractor_weights_path: str | None = None
    """Inception weights that are already on this machine (torch-fidelity's file)."""

    def num_steps_for_task(self, task: int) -> int | None:
        """Returns `max_train_steps` of one task, `None` if epochs decide."""
        if isinstance(self.max_train_steps, list):
            return self.max_train_steps[min(task, len(self.max_train_steps) - 1)]
        return self.max_train_steps
