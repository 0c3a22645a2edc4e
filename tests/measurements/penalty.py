"""tiny-vit fine-tuned to be nearer to its own tensor: what a penalty on ‖(J − T)ε‖ costs, and what it gains.

    python tests/measurements/penalty.py            # writes penalty.json beside this file, in some minutes

J is the model's Jacobian from what enters the first block to the logits, T the operator of TensorLens, in which
attention, the scales of norms and the ratios of activations are constant; ε is normal noise. To the loss comes

    λ · Σ‖(J − T)ε‖² / Σ‖Jε‖²,

relative, lest the weights shrink in place of the gap. Both products are of forward mode, so that they have derivatives
by the weights: T·ε is the same run, with the tangents of what is constant left out. λ = 0 is the same fine-tuning
without the penalty. Notebook 08 draws what the file holds: for each λ and seed whether each test image is named
rightly, the gap there, and for each of some maps the area under the curve of the probability while patches are painted
black, image by image, from which paired intervals can be taken (of the first images alone).
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tensorlens_utils import baselines, collapse, load_data, load_model
from tensorlens_utils.perturbation import FRACTIONS, area, curves, evaluate
from tensorlens_utils.recipes.digits import RECIPES

OUT = Path(__file__).resolve().with_suffix(".json")
METHODS = {name: (collapse.METHODS | baselines.METHODS)[name]
           for name in ("class", "in_out", "gradient × input", "random")}
PENALTIES, SEEDS, STEPS, BATCH, RATE, IMAGES = (0, 0.1, 1, 10, 100), (0, 1, 2), 200, 32, 3e-4, 200


class Held(TorchFunctionMode):
    """While a model runs in forward mode: what T holds constant keeps its value and its derivative by the weights, and
    loses its tangent. Attention is written out, which torch's fused kernels have no forward mode for."""

    def __init__(self, frozen: bool):
        super().__init__()
        self.frozen = frozen

    def held(self, x):
        return forward_ad.unpack_dual(x).primal if self.frozen else x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            scores = self.held(q @ k.mT * scale)
            weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
            return weights / weights.sum(-1, keepdim=True) @ v  # softmax's own forward mode has no second derivative
        if func is F.layer_norm:
            x = args[0]
            sigma = (self.held(x).var(-1, correction=0, keepdim=True) + kwargs["eps"]).sqrt()
            return (x - x.mean(-1, keepdim=True)) / sigma * kwargs["weight"] + kwargs["bias"]
        if func is F.gelu:
            return args[0] * torch.special.ndtr(self.held(args[0]))  # gelu(z)/z = Φ(z)
        return func(*args, **kwargs)


def pushed(model: nn.Module, pixels, epsilon, frozen: bool):
    """The logits, and J·ε, or T·ε where frozen, ε (N, L, D) being added to what enters the first block."""
    with forward_ad.dual_level(), Held(frozen):
        hook = model.vit.embeddings.register_forward_hook(lambda *of: forward_ad.make_dual(of[-1], epsilon))
        try:
            return forward_ad.unpack_dual(model(pixels).logits)
        finally:
            hook.remove()


def gap(model, pixels, generator):
    """The logits, Σ‖(J − T)ε‖² and Σ‖Jε‖², each over the images."""
    config = model.config
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    epsilon = torch.randn(len(pixels), tokens, config.hidden_size, generator=generator)
    logits, J = pushed(model, pixels, epsilon, False)
    _, T = pushed(model, pixels, epsilon, True)
    return logits, (J - T).square().sum(), J.square().sum()


def tuned(penalty: float, seed: int, steps: int = STEPS) -> nn.Module:
    """tiny-vit after so many further steps of its own recipe's data, at a falling rate."""
    recipe, generator = RECIPES[0], torch.Generator().manual_seed(seed)
    model = load_model(recipe.name)[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=recipe.weight_decay)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        batch = recipe.batch(BATCH, generator)
        logits, missed, whole = gap(model, batch["pixel_values"], generator)
        loss = F.cross_entropy(logits, batch["labels"]) + penalty * missed / whole
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
    return model.eval()


def measure(model, processor, data, images: int):
    """Of a model: which of all images it names rightly, the relative gap there, and for each map its areas on some."""
    pixels = processor(data[:]["image"], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits, missed, whole = gap(model, pixels, torch.Generator().manual_seed(0))
    table = evaluate(model, processor, data.select(range(images)), METHODS, removers=["zero"], orders=["morf", "lerf"],
                     batch_size=256, progress=False)
    areas = {order: {name: area(values, FRACTIONS).round(3).tolist()
                     for name, values in curves(table, "probability", order=order).items()}
             for order in ("morf", "lerf")}
    return {"right": (logits.argmax(1) == torch.tensor(data["label"])).int().tolist(),
            "gap": round(float(missed / whole) ** 0.5, 4), "areas": areas}


def main(penalties=PENALTIES, seeds=SEEDS, steps=STEPS, images=IMAGES, out=OUT):
    torch.set_num_threads(1)
    data, processor = load_data("digits", "test"), load_model("tiny-vit")[1]
    runs = [{"penalty": None, "seed": None, **measure(load_model("tiny-vit")[0], processor, data, images)}]
    for penalty in penalties:
        for seed in seeds:
            measured = measure(tuned(penalty, seed, steps), processor, data, images)
            runs.append({"penalty": penalty, "seed": seed, **measured})
            lerf, morf = (np.mean(measured["areas"][order]["in_out"]) for order in ("lerf", "morf"))
            print(f"λ = {penalty:g}, seed {seed}: right {np.mean(measured['right']):.3f}, gap {measured['gap']:.3f}, "
                  f"In+Out: lerf {lerf:.3f}, morf {morf:.3f}", flush=True)
    found = {"model": "tiny-vit", "data": "digits, test", "images": len(data), "images_of_areas": images,
             "steps": steps, "batch": BATCH, "rate": RATE, "torch": torch.__version__.partition("+")[0], "runs": runs}
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])),  # a list on a line
                  json.dumps(found, indent=1, ensure_ascii=False))
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
