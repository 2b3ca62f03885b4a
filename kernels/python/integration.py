"""Makes transformers 5 load native checkpoints: `AutoModelForCausalLM.from_pretrained` after `import moepress_kernels`.

Two things are registered there: quantizer and configuration of `quant_method = "moepress"`, and the experts implementation `mq_moe`. The
quantizer takes the stacked parameters out of every experts module and puts arenas in their place (buffers, so that they travel with the
model); matrices outside the experts are packed while they load and plain `Linear` layers in the model's dtype from then on.
"""

import pathlib

import torch
import transformers
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import LAYOUT, Arena, decode_streams, experts_forward

METHOD, VERSION, EXPERTS = "moepress", 1, "mq_moe"
STREAM = ".weight_packed"


class MoepressConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint. `arenas` maps an arena's name to what lies in it, `constants` the
    name of a block of experts to those that are dropped, `linear` is compressed-tensors' own."""

    def __init__(self, layout=None, version=None, arenas=None, linear=None, constants=None, format="native", quant_method=METHOD):
        self.quant_method, self.format, self.layout, self.version = quant_method, format, layout, version
        self.arenas, self.linear, self.constants = arenas or {}, linear or {}, constants or {}
        if (format, layout, version) != ("native", LAYOUT, VERSION):
            raise ValueError(f"format {format!r}, layout {layout!r}, version {version!r}; this package reads 'native', {LAYOUT!r}, {VERSION}")


class Streams(torch.nn.Module):
    """A matrix that compressed-tensors packed, as it lies in the file: buffers `weight_packed`, `weight_scale` and so on."""

    def __init__(self, parts):
        super().__init__()
        for part, empty in parts.items():
            self.register_buffer(part, empty)

    def weight(self):
        return decode_streams({name.removeprefix("weight_"): tensor for name, tensor in self.named_buffers()})


class MoepressQuantizer(HfQuantizer):
    """Swaps modules before the weights load, and decodes what is no expert after they did."""

    requires_calibration = False

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError("moepress checkpoints are written by `moepress run`; transformers cannot quantize a model that way itself")
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"transformers {transformers.__version__} keeps every expert as a module of its own; moepress_kernels needs 5.0 or later")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, dtype=None, **kwargs):
        self.dtype = dtype or torch.get_default_dtype()
        found = headers(checkpoint_files)
        renamed = renamer(model)
        self.stand_ins = []
        blocks = {}
        for name, said in self.quantization_config.arenas.items():
            parts = [found.get(f"{name}.{part}") for part in ("arena", "table")]
            if None in parts:
                raise ValueError(f"{name}: config.json names this arena, and no file has {name}.arena and {name}.table; the checkpoint is not whole")
            arena = Arena(*parts, said["shape"])
            if said["of"] == "matrix":
                self.stand_in(model, renamed(name), arena, said["shape"])
            else:
                block, projection = name.rsplit(".", 1)
                blocks.setdefault(renamed(block), {})[projection] = arena
        for block, arenas in blocks.items():
            swap_experts(model, block, arenas)
        for block, said in self.quantization_config.constants.items():
            drop_experts(model, renamed(block), said, found.get(f"{block}.mean"))
        for name in [name.removesuffix(STREAM) for name in found if name.endswith(STREAM)]:
            parts = {part.removeprefix(f"{name}."): empty for part, empty in found.items() if part.startswith(f"{name}.weight_")}
            self.stand_in(model, renamed(name), Streams(parts))
        model.set_experts_implementation(EXPERTS)
        return model

    def stand_in(self, model, name, module, shape=None):
        linear = submodule(model, name)
        if linear is None:
            return
        if not isinstance(linear, torch.nn.Linear) or shape and tuple(shape) != tuple(linear.weight.shape):
            raise ValueError(f"{name}: packed as a matrix of {shape or 'codes'}, and transformers has {linear} there")
        module.bias = linear.bias
        module._is_hf_initialized = True
        model.set_submodule(name, module)
        self.stand_ins.append(name)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name in self.stand_ins:
            packed = model.get_submodule(name)
            weight = packed.weights(0)[0] if isinstance(packed, Arena) else packed.weight()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(weight.to(self.dtype), requires_grad=False)
            if packed.bias is not None:
                linear.bias = packed.bias
            model.set_submodule(name, linear)
        for name, module in model.named_modules():
            if isinstance(module, Arena):
                module.check(name)
        # transformers leaves what it renamed in the dtype of the file.
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.dtype != self.dtype:
                parameter.data = parameter.data.to(self.dtype)
        return model

    def is_serializable(self, *args, **kwargs):
        return False

    @property
    def is_trainable(self):
        return False


def headers(files):
    """An empty tensor of its dtype and shape, on the meta device, for every tensor of the files."""
    from safetensors import safe_open

    files = [files] if isinstance(files, (str, pathlib.Path)) else files
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"a native checkpoint lies in .safetensors files, and transformers found {files or 'none'}")
    types = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                if part.get_dtype() in types:
                    found[name] = torch.empty(part.get_shape(), dtype=types[part.get_dtype()], device="meta")
    return found


def renamer(model):
    """What transformers calls a module of the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return lambda name: rename_source_key(f"{name}.arena", renamings, [])[0].removesuffix(".arena")


def submodule(model, name):
    """A module by name; `None` for what the model leaves out of every checkpoint, such as layers that predict several tokens ahead."""
    import re

    try:
        return model.get_submodule(name)
    except AttributeError:
        if any(re.search(pattern, name + ".") for pattern in model._keys_to_ignore_on_load_unexpected or ()):
            return None
        raise ValueError(f"{name}: {type(model).__name__} has no such module; this checkpoint belongs to another architecture") from None


def swap_experts(model, name, arenas):
    """Arenas in the place of the stacked parameters of one experts module."""
    module = submodule(model, name)
    if module is None:
        return
    if set(arenas) not in ({"gate_up", "down"}, {"gate", "up", "down"}):
        raise ValueError(f"{name}: arenas of {', '.join(sorted(arenas))}, where gate_up and down, or gate, up and down are needed")
    both, down = (getattr(module, part, None) for part in ("gate_up_proj", "down_proj"))
    first = arenas.get("gate_up") or arenas["gate"]
    (inner, hidden), experts = first.shape, down.shape[0] if down is not None else 0
    plain = getattr(module, "has_gate", False) and not module.has_bias and not module.is_transposed and module.is_concatenated
    if both is None or not plain or tuple(both.shape) != (experts, 2 * inner, hidden) or tuple(down.shape) != (experts, *arenas["down"].shape):
        what = "no stacked gate_up_proj and down_proj" if both is None or down is None else f"experts of {tuple(both.shape)} and {tuple(down.shape)}"
        raise ValueError(f"{name}: {type(module).__name__} has {what}; the arenas hold [{inner}, {hidden}] and {list(arenas['down'].shape)}")
    for part in ("gate_up_proj", "down_proj"):
        delattr(module, part)
    for projection, arena in arenas.items():
        arena.experts = experts
        arena._is_hf_initialized = True
        module.add_module(projection, arena)
    module._is_hf_initialized = True


def drop_experts(model, name, said, mean):
    """Constants in the place of some experts of a module whose others lie in arenas."""
    module = submodule(model, name)
    if module is None:
        return
    if not isinstance(getattr(module, "down", None), Arena):
        raise ValueError(f"{name}: config.json drops experts of it, and none of its others lie in arenas")
    experts, hidden = said["experts"], module.down.shape[0]
    if said["output"] not in ("zero", "mean") or not all(0 <= expert < module.down.experts for expert in experts):
        raise ValueError(f"{name}: config.json drops the experts {experts} for {said['output']!r}; this package knows 'mean' and 'zero'")
    if said["output"] == "mean":
        if mean is None or tuple(mean.shape) != (len(experts), hidden):
            raise ValueError(f"{name}.mean is {'missing' if mean is None else tuple(mean.shape)}; {len(experts)} experts put out {hidden} channels")
        module.register_buffer("mean", mean)
    module.dropped = list(experts)
    for arena in module.children():
        if isinstance(arena, Arena):
            arena.dropped = tuple(experts)


def mq_moe(module, hidden_states, top_k_index, top_k_weights):
    """`experts_implementation = "mq_moe"`: an experts module whose matrices lie in arenas."""
    arenas = {name: child for name, child in module.named_children() if isinstance(child, Arena)}
    if not arenas:
        raise ValueError(f"experts_implementation={EXPERTS!r} wants packed experts, and {type(module).__name__} has none; load a native checkpoint")
    constants = getattr(module, "dropped", ()), getattr(module, "mean", None)
    return experts_forward(arenas, module.act_fn, hidden_states, top_k_index, top_k_weights, *constants)


def register():
    """Tells transformers; an earlier import of this package, beside another checkpoint, gives way."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    register_quantization_config(METHOD)(MoepressConfig)
    register_quantizer(METHOD)(MoepressQuantizer)
    if int(transformers.__version__.split(".")[0]) >= 5:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, mq_moe)
