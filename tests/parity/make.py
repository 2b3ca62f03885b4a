#!/usr/bin/env python3
"""Makes the tiny checkpoints of this folder and the reference vectors beside them.

    make.py [NAME ...]        under transformers 5.17.0: every checkpoint, and the references that 5.17.0 is right about
    make.py [NAME ...]        under transformers 4.57.3: the references of phimoe_longrope alone

NAME/ is a checkpoint as the hub would hold it: config.json and tensors in bf16, drawn from a generator that is seeded by
the tensor's name. NAME.safetensors is what transformers makes of it in float32 with eager attention on the CPU. With
B = 2 rows of T tokens, H hidden, V vocabulary, E experts, K experts a token, L a layer:

    input_ids              [B, T]     i64
    logits                 [B, T, V]
    hidden.embed           [B, T, H]  input of layer 0
    hidden.L               [B, T, H]  output of decoder layer L
    hidden.norm            [B, T, H]  after the last norm
    attn.L                 [B, T, H]  output of attention, before the residual sum
    moe.L.in               [B·T, H]   input of router and experts
    moe.L.router_logits    [B·T, E]   before softmax or sigmoid
    moe.L.topk_index       [B·T, K]   i64, chosen experts in no order that means anything
    moe.L.topk_weight      [B·T, K]   what their outputs are multiplied by, in the order of topk_index
    moe.L.routed_out       [B·T, H]   weighted sum of the routed experts
    moe.L.out              [B·T, H]   the whole block, shared experts included; left out where it is routed_out
    generated              [B, 12]    i64, greedy continuation of the first 8 tokens of each row, without a cache

Metadata: `transformers` and `torch` (versions), `smallest_margin` (between the last chosen expert and the first one
left out, over all tokens: a comparison of choices means something above rounding), `smallest_lead` (of the greedy token).
"""

import json
import math
import sys
import tempfile
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from variants import VARIANTS, VOCAB, Variant

HERE = Path(__file__).resolve().parent
PROMPT, GENERATED = 8, 12
CLEAR_LEAD = 0.01
CLEAR_MARGIN = 0.001
"""Tokens are drawn again until every greedy choice and every router's choice is this clear in logits: another order of
summing must not change it."""
BLOCK = 128
E4M3_MAX = 448.0


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A lively random tensor, bf16-representable: gains near 1, biases not 0, projections that keep the scale of a row."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    x = torch.randn(shape, generator=generator)
    tensor = name.split("/")[1]
    if tensor.endswith("e_score_correction_bias"):
        return 0.3 * x
    if tensor.endswith(".bias"):
        x = 0.2 * x
    elif len(shape) == 1:
        x = 1.0 + 0.2 * x
    elif "embed_tokens" in tensor:
        x = 0.5 * x
    elif tensor.endswith("lm_head.weight") or tensor.endswith("shared_head.head.weight"):
        x = 2.0 * x / math.sqrt(shape[1])
    elif any(part in tensor for part in (".q_proj", ".k_proj", ".q_b_proj", ".kv_b_proj")):
        x = 1.5 * x / math.sqrt(shape[1])
    else:
        x = x / math.sqrt(shape[1])
    return x.to(torch.bfloat16)


def save_config(config: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """One file, or several with an index, as the hub names them."""
    for old in folder.glob("model*"):
        old.unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# ---- the stand-in for `deepseek`, which transformers does not have ----


def as_qwen2_moe(config: dict) -> dict:
    """The same arithmetic in qwen2_moe's words."""
    kept = {key: value for key, value in config.items() if key in (
        "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
        "moe_intermediate_size", "norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "torch_dtype", "vocab_size")}
    return kept | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "mlp_only_layers": list(range(config["first_k_dense_replace"])),
        "model_type": "qwen2_moe",
        "num_experts": config["n_routed_experts"],
        "qkv_bias": False,
        "shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
    }


def to_deepseek(name: str) -> str | None:
    """A name of qwen2_moe in the 16B's words; None for the gate, which the 16B has not."""
    return None if "shared_expert_gate" in name else name.replace(".shared_expert.", ".shared_experts.")


def stand_in(tensors: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """A gate of zero halves the shared expert, a doubled down projection gives it back: both are exact in float32."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        doubled = tensor * 2 if ".shared_experts.down_proj." in name else tensor
        out[name.replace(".shared_experts.", ".shared_expert.")] = doubled
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        out[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = torch.zeros(1, config["hidden_size"], dtype=torch.bfloat16)
    return out


# ---- checkpoints ----


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as transformers stores this config, which is how the hub has them."""
    stored = as_qwen2_moe(config) if config["model_type"] == "deepseek" else config
    stored = {key: value for key, value in stored.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        save_config(stored, Path(folder))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        model.save_pretrained(folder)
        found = {name: tuple(tensor.shape) for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    if config["model_type"] == "deepseek":
        return {to_deepseek(name): shape for name, shape in found.items() if to_deepseek(name)}
    return found


def mtp_shapes(config: dict, found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The layer after the last: an ordinary one and what ties it to the model."""
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    before, here = f"model.layers.{last - 1}.", f"model.layers.{last}."
    layer = {here + name.removeprefix(before): shape for name, shape in found.items() if name.startswith(before)}
    return layer | {
        here + "eh_proj.weight": (hidden, 2 * hidden),
        here + "embed_tokens.weight": (VOCAB, hidden),
        here + "enorm.weight": (hidden,),
        here + "hnorm.weight": (hidden,),
        here + "shared_head.head.weight": (VOCAB, hidden),
        here + "shared_head.norm.weight": (hidden,),
    }


def is_fp8(name: str, tensor: torch.Tensor) -> bool:
    """What DeepSeek-V3 stores as FP8: the Linear matrices of the layers, without the router and what MTP adds."""
    rest = ("mlp.gate.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "lm_head.weight")
    return tensor.dim() == 2 and not name.endswith(rest)


def blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One scale a block, spread over the block's elements."""
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weight` in e4m3 and `weight_scale_inv` in f32, one a block of 128 × 128, the blocks at the edges partial."""
    out = {}
    for name, tensor in tensors.items():
        if not is_fp8(name, tensor):
            out[name] = tensor
            continue
        rows, columns = (-(-n // BLOCK) for n in tensor.shape)
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                block = tensor[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].float()
                scale[i, j] = block.abs().max() / E4M3_MAX
        out[name] = (tensor.float() / blocks(scale, tensor.shape)).to(torch.float8_e4m3fn)
        out[name + "_scale_inv"] = scale
    return out


def from_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 values that the FP8 checkpoint means."""
    out = {}
    for name, tensor in tensors.items():
        if name + "_scale_inv" in tensors:
            out[name] = tensor.float() * blocks(tensors[name + "_scale_inv"], tensor.shape)
        elif not name.endswith("_scale_inv"):
            out[name] = tensor
    return out


def make_checkpoint(name: str, variant: Variant) -> None:
    found = shapes(variant.config)
    if "mtp" in variant.extra:
        found |= mtp_shapes(variant.config, found)
    tensors = {tensor: draw(f"{name}/{tensor}", shape) for tensor, shape in found.items()}
    if "fp8" in variant.extra:
        tensors = to_fp8(tensors)
    if "buffers" in variant.extra:
        half = variant.config["hidden_size"] // variant.config["num_attention_heads"] // 2
        frequencies = variant.config["rope_theta"] ** (-torch.arange(half) / half)
        for layer in range(variant.config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()
    save_config(variant.config, HERE / name)
    save_tensors(tensors, HERE / name, variant.shards)


# ---- references ----


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def load(name: str, variant: Variant):
    """The reference model; fails if a key is missing, or unexpected other than of an MTP layer."""
    folder, config = HERE / name, variant.config
    with tempfile.TemporaryDirectory() as other:
        if config["model_type"] == "deepseek":
            save_config(as_qwen2_moe(config), Path(other))
            save_tensors(stand_in(stored_tensors(folder), config), Path(other), 1)
            folder = Path(other)
        elif "fp8" in variant.extra:
            save_config({key: value for key, value in config.items() if key != "quantization_config"}, Path(other))
            save_tensors(from_fp8(stored_tensors(folder)), Path(other), 1)
            folder = Path(other)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    strange = [key for key in info["unexpected_keys"] if not ("mtp" in variant.extra and key.startswith(mtp))]
    assert not strange and not info["missing_keys"] and not info["mismatched_keys"], (name, info)
    return model.eval()


class Recorder:
    """Hooks that keep what one forward pass computes."""

    def __init__(self, model):
        self.kept: dict[str, torch.Tensor] = {}
        self.moe_layers: list[int] = []
        model.model.layers[0].register_forward_pre_hook(self._embedding, with_kwargs=True)
        model.model.norm.register_forward_hook(lambda _m, _x, out: self.keep("hidden.norm", out))
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda _m, _x, out, i=index: self.keep(f"hidden.{i}", out))
            layer.self_attn.register_forward_hook(lambda _m, _x, out, i=index: self.keep(f"attn.{i}", out))
            for block in layer.children():
                if hasattr(block, "experts"):
                    self.moe_layers.append(index)
                    self._block(index, block)

    def keep(self, name: str, value) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if name.startswith("moe."):
            value = value.reshape(-1, value.shape[-1])
        self.kept[name] = value.detach().clone().contiguous()

    def _embedding(self, _module, args, kwargs) -> None:
        self.keep("hidden.embed", args[0] if args else kwargs["hidden_states"])

    def _block(self, layer: int, block) -> None:
        router = block.router if hasattr(block, "router") else block.gate
        router.register_forward_hook(lambda _m, _x, out: self.keep(f"moe.{layer}.router_logits", out))
        block.register_forward_pre_hook(lambda _m, args: self.keep(f"moe.{layer}.in", args[0]))
        block.register_forward_hook(lambda _m, _x, out: self.keep(f"moe.{layer}.out", out))
        if isinstance(block.experts, torch.nn.ModuleList):  # transformers 4: the choice is a function's result
            self._watch_sparsemixer()
            return
        block.experts.register_forward_hook(lambda _m, args, out: self._experts(layer, args, out))

    def _experts(self, layer: int, args, out) -> None:
        _, index, weight = args
        self.keep(f"moe.{layer}.topk_index", index)
        self.keep(f"moe.{layer}.topk_weight", weight)
        self.keep(f"moe.{layer}.routed_out", out)

    def _watch_sparsemixer(self) -> None:
        from transformers.models.phimoe import modeling_phimoe
        if getattr(modeling_phimoe.sparsemixer, "watched", False):
            return
        original = modeling_phimoe.sparsemixer

        def watched(*args, **kwargs):
            weight, index = original(*args, **kwargs)
            layer = self.moe_layers[sum(name.endswith("topk_index") for name in self.kept)]
            self.keep(f"moe.{layer}.topk_index", index)
            self.keep(f"moe.{layer}.topk_weight", weight)
            return weight, index

        watched.watched = True
        modeling_phimoe.sparsemixer = watched

    def finish(self) -> dict[str, torch.Tensor]:
        """Without what is there twice."""
        for layer in self.moe_layers:
            whole = self.kept[f"moe.{layer}.out"]
            routed = self.kept.setdefault(f"moe.{layer}.routed_out", whole)
            if torch.equal(whole, routed):
                del self.kept[f"moe.{layer}.out"]
        return self.kept


def smallest_margin(kept: dict[str, torch.Tensor], layers: list[int]) -> float:
    """The least distance in router logits between an expert that was chosen and one that was not."""
    least = math.inf
    for layer in layers:
        logits, index = kept[f"moe.{layer}.router_logits"], kept[f"moe.{layer}.topk_index"]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        gap = (logits[:, :, None] - logits[:, None, :]).abs()
        gap = gap.masked_fill(~(chosen[:, :, None] & ~chosen[:, None, :]), math.inf)
        least = min(least, float(gap.min()))
    return least


def greedy(model, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Continues `ids` by full passes; also the least lead of a taken token over the runner-up."""
    start, lead = ids.shape[1], math.inf
    for _ in range(GENERATED):
        best = model(ids, use_cache=False).logits[:, -1].topk(2)
        lead = min(lead, float((best.values[:, 0] - best.values[:, 1]).min()))
        ids = torch.cat([ids, best.indices[:, :1]], 1)
    return ids[:, start:].contiguous(), lead


@torch.no_grad()
def make_reference(name: str, variant: Variant) -> None:
    model = load(name, variant)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    recorder = Recorder(model)
    lead = margin = 0.0
    while lead < CLEAR_LEAD or margin < CLEAR_MARGIN:
        ids = torch.randint(3, VOCAB, (2, variant.tokens), generator=generator)
        more, lead = {"input_ids": ids}, math.inf
        if variant.generates:
            more["generated"], lead = greedy(model, ids[:, :PROMPT])
        recorder.kept.clear()
        more["logits"] = model(ids, use_cache=False).logits
        kept = recorder.finish() | more
        margin = smallest_margin(kept, recorder.moe_layers)
    metadata = {"smallest_lead": f"{lead:.3g}", "smallest_margin": f"{margin:.3g}", "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__}
    save_file({key: kept[key] for key in sorted(kept)}, HERE / f"{name}.safetensors", metadata)
    spread = kept["logits"].std()
    weights = torch.cat([kept[f"moe.{i}.topk_weight"].flatten() for i in recorder.moe_layers])
    print(f"{name}: logits ± {spread:.2f}, margin {margin:.1e}, lead {lead:.1e}, weights {weights.min():.2f}–{weights.max():.2f}")


def main(names: list[str]) -> int:
    version = transformers.__version__
    if version not in ("5.17.0", "4.57.3") or not torch.__version__.startswith("2.14.0"):
        print(f"needs the versions of requirements.txt, found transformers {version} and torch {torch.__version__}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in names or list(VARIANTS):
        if version == "5.17.0":
            make_checkpoint(name, VARIANTS[name])
        if version == VARIANTS[name].reference:
            make_reference(name, VARIANTS[name])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
