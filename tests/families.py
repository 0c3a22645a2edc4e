"""Tiny random models of every family that the README's table names, built from configurations, without a download.

``FAMILIES[name]() -> (model, inputs)``: float64, two sequences, the second padded where the family takes a mask.
``python -m tests.families`` measures them all and prints the table.
"""

import copy
from collections import Counter

import torch
import transformers as tf

from tensorlens_utils.linearize import linearize
from tensorlens_utils.linearize.values import UnsupportedOperation

V, L, N = 16, 6, 2
TINY = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA = {**TINY, "num_key_value_heads": 2}
GPT = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 4, "intermediate_size": 24}  # fmt: skip


@torch.no_grad()
def _random(cls, config):
    """A model with random weights large enough that every nonlinearity is met away from 0."""
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).double().eval()  # a model writes its attention implementation into its config
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    return model


def _text(cls, config, L=L, **inputs):
    def build():
        model = _random(cls, config)
        ids = torch.randint(3, V, (N, L))
        mask = torch.ones(N, L, dtype=torch.long)
        mask[1, L - 2 :] = 0
        return model, {"input_ids": ids, "attention_mask": mask, **inputs}

    return build


def _vision(cls, config):
    def build():
        model, size = _random(cls, config), config.image_size
        return model, {"pixel_values": torch.randn(N, 3, size, size, dtype=torch.float64)}

    return build


EAGER_EXPERTS = {"experts_implementation": "eager"}  # the grouped kernels have no float64

FAMILIES = {
    "gpt2": _text(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT)),
    "gpt_neo": _text(tf.GPTNeoForCausalLM, tf.GPTNeoConfig(vocab_size=V, max_position_embeddings=32, hidden_size=16,
                     num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
                     bos_token_id=1, eos_token_id=2)),
    "gptj": _text(tf.GPTJForCausalLM, tf.GPTJConfig(**{**GPT, "rotary_dim": 4})),
    "gpt_neox": _text(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**TINY)),
    "opt": _text(tf.OPTForCausalLM, tf.OPTConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
                 num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=0,
                 bos_token_id=1, eos_token_id=2)),
    "bloom": _text(tf.BloomForCausalLM, tf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=4,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "mpt": _text(tf.MptForCausalLM, tf.MptConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=V, max_seq_len=32)),
    "falcon": _text(tf.FalconForCausalLM, tf.FalconConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2,
                    num_attention_heads=4, bos_token_id=1, eos_token_id=2)),
    "llama": _text(tf.LlamaForCausalLM, tf.LlamaConfig(**GQA)),
    "mistral": _text(tf.MistralForCausalLM, tf.MistralConfig(**GQA, sliding_window=4)),
    "qwen2": _text(tf.Qwen2ForCausalLM, tf.Qwen2Config(**GQA)),
    "qwen3": _text(tf.Qwen3ForCausalLM, tf.Qwen3Config(**GQA, head_dim=4)),
    "gemma": _text(tf.GemmaForCausalLM, tf.GemmaConfig(**GQA, head_dim=4)),
    "gemma2": _text(tf.Gemma2ForCausalLM, tf.Gemma2Config(**GQA, head_dim=4, sliding_window=4,
                    query_pre_attn_scalar=4)),
    "gemma3": _text(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**GQA, head_dim=4, sliding_window=4)),
    "phi": _text(tf.PhiForCausalLM, tf.PhiConfig(**GQA)),
    "phi3": _text(tf.Phi3ForCausalLM, tf.Phi3Config(**GQA)),
    "olmo": _text(tf.OlmoForCausalLM, tf.OlmoConfig(**GQA)),
    "olmo2": _text(tf.Olmo2ForCausalLM, tf.Olmo2Config(**GQA)),
    "cohere": _text(tf.CohereForCausalLM, tf.CohereConfig(**GQA)),
    "starcoder2": _text(tf.Starcoder2ForCausalLM, tf.Starcoder2Config(**GQA)),
    "nemotron": _text(tf.NemotronForCausalLM, tf.NemotronConfig(**GQA)),
    "mixtral": _text(tf.MixtralForCausalLM, tf.MixtralConfig(**GQA, num_local_experts=4, **EAGER_EXPERTS)),
    "qwen3_moe": _text(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**GQA, head_dim=4, num_experts=4,
                       num_experts_per_tok=2, moe_intermediate_size=12, **EAGER_EXPERTS)),
    "bert": _text(tf.BertForSequenceClassification, tf.BertConfig(**TINY)),
    "roberta": _text(tf.RobertaForSequenceClassification, tf.RobertaConfig(**TINY)),
    "distilbert": _text(tf.DistilBertForSequenceClassification, tf.DistilBertConfig(vocab_size=V, dim=16, n_layers=2,
                        n_heads=4, hidden_dim=24, max_position_embeddings=32, pad_token_id=0)),
    "albert": _text(tf.AlbertForSequenceClassification, tf.AlbertConfig(**TINY, embedding_size=8)),
    "deberta-v2": _text(tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**TINY, relative_attention=True,
                        pos_att_type=["p2c", "c2p"], position_buckets=4, norm_rel_ebd="layer_norm",
                        share_att_key=True)),
    "modernbert": _text(tf.ModernBertForSequenceClassification, tf.ModernBertConfig(**TINY, cls_token_id=1,
                        sep_token_id=2, global_attn_every_n_layers=2, local_attention=4)),
    "vit": _vision(tf.ViTForImageClassification, tf.ViTConfig(**VIT)),
    "deit": _vision(tf.DeiTForImageClassification, tf.DeiTConfig(**VIT)),
    "beit": _vision(tf.BeitForImageClassification, tf.BeitConfig(**VIT, use_relative_position_bias=True)),
    "dinov2": _vision(tf.Dinov2ForImageClassification, tf.Dinov2Config(**VIT, mlp_ratio=2)),
    "clip": _vision(tf.CLIPVisionModel, tf.CLIPVisionConfig(**VIT)),
    "siglip": _vision(tf.SiglipVisionModel, tf.SiglipVisionConfig(**VIT)),
    "longformer": _text(tf.LongformerForSequenceClassification, tf.LongformerConfig(**TINY, attention_window=4), L=8,
                        global_attention_mask=torch.eye(8, dtype=torch.long)[:1].expand(N, 8)),
    "big_bird": _text(tf.BigBirdForSequenceClassification, tf.BigBirdConfig(**TINY, sep_token_id=2,
                      attention_type="original_full")),
    "rwkv": _text(tf.RwkvForCausalLM, tf.RwkvConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2,
                  attention_hidden_size=16, intermediate_size=24, context_length=32, bos_token_id=1, eos_token_id=2)),
    "mamba": _text(tf.MambaForCausalLM, tf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4,
                   intermediate_size=24, time_step_rank=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
}  # fmt: skip

FLOAT32 = set("llama mistral qwen2 qwen3 gemma gemma2 gemma3 phi3 olmo olmo2 cohere mixtral qwen3_moe rwkv".split())
"""Families in which transformers itself computes norms, routers or decays in float32, in a float64 model too."""

UNSUPPORTED = {"mamba"}  # its scan multiplies what the state holds by what X selects, both bare: exact, or raise

ADDED = ("bias", "position_embedding", "position_embeddings", "wpe", "embed_positions", "token_type_embeddings",
         "cls_token", "distillation_token", "mask_token", "class_embedding")  # fmt: skip


def tolerance(name: str) -> float:
    """What is asked of a family: 1e-13 in float64 (measured: below 4e-15), 3e-6 where float32 is met (below 4e-7)."""
    return 3e-6 if name in FLOAT32 else 1e-13


@torch.no_grad()
def without_additions(model):
    """``model`` with all that it adds set to zero: biases, β, position and type embeddings, class tokens.

    Told by name alone. Scales stay, one-dimensional as they are (norm weights, Gemma's 1 + w, dinov2's layer_scale,
    beit's lambda), and so does all that only reaches the scores, which a softmax holds constant: rotary and ALiBi
    positions, beit's relative_position_bias_table, deberta's rel_embeddings, swallowed biases. RWKV's time_mix are
    factors, its time_first and time_decay exponents inside weights that are constant at X.
    """
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in ADDED or part.endswith("_bias") for part in name.split(".")):
            p.zero_()
    return model


def model_output(model, inputs):
    """F(X) by the model alone, (N, M, D'); M = 1 where it is a class vector."""
    with torch.no_grad():
        out = model(**inputs)
    Y = out.logits if "logits" in out else out.last_hidden_state
    return Y if Y.dim() == 3 else Y.unsqueeze(1)


def law_error(model, inputs, T) -> float:
    """How far ⟨U, F(X)⟩ is from ⟨Uᵀ·T, X⟩, and B from 0, in a model that adds nothing; F is the model's own forward."""
    F = model_output(model, inputs)
    U = torch.randn(3, *F.shape, generator=torch.Generator().manual_seed(1), dtype=F.dtype)
    gap = (U * F).flatten(1).sum(1) - (T.rmatvec(U) * T.input).flatten(1).sum(1)
    return float(max((gap.abs() / U.flatten(1).norm(dim=1)).max(), T.bias.norm()) / F.norm())


def measured(name: str) -> dict:
    """One family's errors: of the frozen forward, of the adjoint, of the law; and what was held constant at X."""
    model, inputs = FAMILIES[name]()
    row = {"family": name, "model class": type(model).__name__}
    try:
        T = linearize(model, inputs)
    except UnsupportedOperation:
        return {**row, "held constant": "raises UnsupportedOperation"}
    c, F = T.certificate(), model_output(model, inputs)
    forward = max(c.forward, float((T.replay(T.input) - F).norm() / F.norm()))
    held = ", ".join(f"{n} {rule}" for rule, n in sorted(Counter(cut.rule for cut in T.cuts).items()))
    model = without_additions(model)
    return {**row, "forward": forward, "adjoint": max(c.adjoint_x, c.adjoint_v),
            "law": law_error(model, inputs, linearize(model, inputs)), "held constant": held}  # fmt: skip


def families_table() -> str:
    """The README's table, measured on this machine."""
    lines = ["| family | model class | forward error | adjoint error | law of zero biases | held constant at X |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in map(measured, FAMILIES):
        errors = [f"{row[key]:.0e}" if key in row else "–" for key in ("forward", "adjoint", "law")]
        lines.append(" | ".join(["| " + row["family"], row["model class"], *errors, row["held constant"] + " |"]))
    return "\n".join(lines)


if __name__ == "__main__":
    tf.logging.set_verbosity_error()
    print(families_table())
