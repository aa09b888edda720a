"""
What an adapted step and an adapted forward pass cost, against the network as it is, on the network of the digits.

    python scripts/experiments/funlora_cost.py --output results/funlora/cost.json

A step is forward and backward pass and AdamW on a batch of `configs/digits.yaml`; all are taken in turns, and ratios are of the same
turn. Adapted are all convolutions, as there.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

from diffusers_cl.adapters import AdaptedUNet
from diffusers_cl.files import write_json
from diffusers_cl.funlora import FunLoRA
from diffusers_cl.record import versions


sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.networks import batches, losses, network
from benchmarks.timing import in_turns, row


FIRST_CLASSES = 2


def adapted(unet, num_classes: int) -> AdaptedUNet:
    """Returns a copy of a network, frozen, with adapters for so many classes, all in training."""
    model = AdaptedUNet(copy.deepcopy(unet))
    model.adapters = FunLoRA.from_unet(model.unet, range(FIRST_CLASSES))
    class_ids = range(FIRST_CLASSES, FIRST_CLASSES + num_classes)
    for class_id in class_ids:
        model.adapters.add_class(class_id, model.unet)
    model.adapters.train_only(class_ids)
    return model


def lines(device: torch.device, repetitions: int, classes: tuple[int, ...] = (1, 2, 8)) -> list[dict]:
    """Returns the lines of the table: a step, and a forward pass without gradients, with so many classes in a batch."""
    unet = network("digits", device)
    (batch,) = batches("digits", 32, 32, device)
    models = {"plain": unet, **{f"{count} classes": adapted(unet, count) for count in classes}}
    steps, passes = {}, {}
    for name, model in models.items():
        count = int(name.split()[0]) if name != "plain" else classes[0]
        labels = FIRST_CLASSES + torch.arange(32, device=device) % count
        rows = (batch[0], batch[1], labels, batch[3])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def step(model=model, optimizer=optimizer, rows=rows) -> None:
            optimizer.zero_grad()
            losses(model, rows).mean().backward()
            optimizer.step()

        # As all steps of a sample share them, what depends on the classes alone is not measured.
        sampling = model if name == "plain" else model.adapters.for_rows(model.unet, labels.tolist())

        def forward(sampling=sampling, rows=rows) -> None:
            with torch.no_grad():
                losses(sampling, rows)

        steps[name], passes[name] = step, forward
    found = []
    for what, functions in (("a step", steps), ("a forward pass without gradients", passes)):
        times = in_turns(functions, device, repetitions, warmup=3)
        for name in list(models)[1:]:
            target = "<= 2.0" if what == "a step" else None
            found.append(
                row(
                    f"{what}, {name} in the batch, against the plain network's", "digits", times, name, "plain", target
                )
            )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--num_threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.num_threads)
    found = lines(torch.device("cpu"), args.repetitions)
    command = (
        f"python scripts/experiments/funlora_cost.py --repetitions {args.repetitions} --num_threads {args.num_threads}"
    )
    write_json(args.output, {"schema": 1, "made_by": command, "versions": versions(), "device": "cpu", "rows": found})
    for line in found:
        print(f"{line['what']}: {line['ratio']:.2f} ({line['least']:.2f} to {line['largest']:.2f})")


if __name__ == "__main__":
    main()
