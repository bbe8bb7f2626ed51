"""LoRA (arXiv 2106.09685): train two thin matrices beside every linear layer of the blocks, and nothing else.

    y = W x + (alpha / rank) B A x        A (rank, in), B (out, rank); W is frozen, B begins at 0

What is trained, and what its optimiser keeps, shrinks to a few hundredths of the model. W may be rounded to
bfloat16; A and B are float32. With its adapters off the model is the starting model, for a KL term or a pair
loss. One process samples with the adapters as they are if W has the sampler's dtype. out_dir/model has
W + (alpha / rank) B A, out_dir/adapter A and B as peft reads them.

FSDP shards W only, and rollouts use a merged copy. average_gradients() makes the adapters' gradients means
over the processes, as FSDP does with those of its own parameters.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. add_adapters() converts a layer in place."""

    lora_A: nn.Parameter  # (rank, in)
    lora_B: nn.Parameter  # (out, rank)
    scale: float  # alpha / rank
    adapter_on: bool = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        y = super().forward(x)
        if not self.adapter_on:
            return y
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y.add_(F.linear(F.linear(x, a), b), alpha=self.scale)


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze the model and give every linear layer of its blocks an adapter.

    A is drawn from U(-1 / sqrt(in), 1 / sqrt(in)), as in peft, from the seed alone; B is 0.
    """
    model.requires_grad_(False)
    adapt_layers(model.model.layers, rank, alpha, seed)
    # The residual stream is float32, as it is in training without adapters, whatever the embedding's dtype.
    model.model.embed_tokens.register_forward_hook(lambda _layer, _ids, output: output.float())


def adapt_layers(module: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Give every linear layer of a module an adapter."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if type(layer) is not nn.Linear:
            continue
        a = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        # Converted in place, since FSDP keeps references to the module.
        layer.__class__ = LoRALinear
        layer.scale = alpha / rank
        layer.lora_A = nn.Parameter(a.to(layer.weight.device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter by name, such as model.layers.0.self_attn.q_proj; empty without LoRA."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model without its adapters, by their names in a checkpoint."""
    return {n: p for n, p in model.named_parameters() if not n.endswith((".lora_A", ".lora_B"))}


def merged_weight(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """`weight`, the unsharded parameter `name`, with its adapter, if any, added: W + (alpha / rank) B A."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if not (isinstance(layer, LoRALinear) and name.endswith(".weight")):
        return weight
    return weight.float() + layer.scale * (layer.lora_B @ layer.lora_A).detach()


def average_gradients(model: nn.Module) -> None:
    """Replace the adapters' gradients by their means over all processes. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for layer in adapted_layers(model).values():
            for matrix in (layer.lora_A, layer.lora_B):
                dist.all_reduce(matrix.grad)
                matrix.grad /= dist.get_world_size()


# ---- the starting model as the reference -------------------------------------------------------------------


class StartingModel:
    """The trained model with its adapters off, as a frozen reference. No weight is copied."""

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, list(adapted_layers(model).values())

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    def hidden(self, *args, **options) -> Tensor:
        for layer in self.layers:
            layer.adapter_on = False
        try:
            return self.model.hidden(*args, **options)
        finally:
            for layer in self.layers:
                layer.adapter_on = True

    def run(self, function, *args):
        """The model's own, adapters on: a pair loss runs both models in it, and hidden() turns them off."""
        return self.model.run(function, *args)


# ---- peft's files ------------------------------------------------------------------------------------------


def adapter_files(model: nn.Module, base: str) -> tuple[dict, dict[str, Tensor]]:
    """The content of adapter_config.json and adapter_model.safetensors. base: the starting model."""
    layers, tensors = adapted_layers(model), {}
    for name, layer in layers.items():
        for part, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"base_model.model.{name}.{part}.weight"] = matrix.detach().to("cpu").contiguous()
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": len(one.lora_A), "lora_alpha": one.scale * len(one.lora_A), "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "inference_mode": True,
    }  # fmt: skip
    return config, tensors
