"""Loading models by name, their checkpoints, and finding their parts."""

import re

import pytest
import torch
import transformers as tf
from families import FAMILIES, N, V
from torch import nn

from tensorlens_utils import models
from tensorlens_utils.data import digit_text, load_data
from tensorlens_utils.models import card, checkpoints, find_blocks, load_model, n_blocks, token_embedding, zoo
from tensorlens_utils.recipes import digits

# --- loading ---------------------------------------------------------------------------------------------------------


def tokenizer():
    return digits._token_processor()


SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
         "max_position_embeddings": 80}
PIXELS = {"image_size": 8, "patch_size": 2, "num_channels": 1, **SMALL}
CHECKPOINTS = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=20, n_positions=80, n_embd=16, n_layer=2, n_head=4)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "bert classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL, num_labels=3)),
    "bert masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
    "bert encoder": lambda: tf.BertModel(tf.BertConfig(**SMALL)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**PIXELS)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**PIXELS)),
    "deit with teacher": lambda: tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**PIXELS)),
    "vit encoder": lambda: tf.ViTModel(tf.ViTConfig(**PIXELS)),
}


def save(model, folder, processor=True):
    model.save_pretrained(folder)
    if processor:
        (digits._vit_build()[1] if model.main_input_name == "pixel_values" else tokenizer()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_local_checkpoint_comes_back_as_its_own_class(kind, tmp_path):
    torch.manual_seed(0)
    saved = CHECKPOINTS[kind]().eval()
    model, processor = load_model(save(saved, tmp_path))
    assert type(model) is type(saved) and not model.training
    image = load_data("digits")[0]["image"]
    pixels = saved.main_input_name == "pixel_values"
    inputs = processor(image if pixels else digit_text(image), return_tensors="pt")
    torch.testing.assert_close(model(**inputs)[0], saved(**inputs)[0], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in model.state_dict().items())


def test_task_dtype_and_options_are_heeded(tmp_path):
    save(CHECKPOINTS["gpt2"]().to(torch.bfloat16), tmp_path)
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16
    model, _ = load_model(tmp_path, task="encoder", dtype="float64", device="cpu", attn_implementation="eager")
    assert type(model) is tf.GPT2Model and model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    assert load_model("tiny-vit", dtype=torch.float64)[0].dtype == torch.float64


def test_a_zoo_model_is_float32_however_it_is_stored(tmp_path, monkeypatch):
    save(CHECKPOINTS["vit"]().half(), tmp_path / "tiny-half")
    monkeypatch.setattr(models, "ZOO", tmp_path)
    assert zoo() == ["tiny-half"] and load_model("tiny-half")[0].dtype == torch.float32


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_hub_model_loads_offline(offline):
    saved = CHECKPOINTS["bert classifier"]()
    save(saved, offline / "models--someone--reviews" / "snapshots" / ("a" * 40))
    refs = offline / "models--someone--reviews" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    model, processor = load_model("someone/reviews")
    assert type(model) is type(saved) and processor("0 16").input_ids == [1, 3, 19]


@pytest.mark.parametrize(("name", "task", "stand_in"), [
    ("google/vit-base-patch16-224", None, "tiny-vit"), ("facebook/deit-small-patch16-224", None, "tiny-vit"),
    ("someone/model", "image-classification", "tiny-vit"), ("textattack/bert-base-uncased-imdb", None, "tiny-bert"),
    ("bert-base-uncased", "masked-lm", "tiny-bert"), ("bert-base-uncased", "encoder", "tiny-bert"),
    ("gpt2", None, "tiny-gpt"), ("someone/model", "causal-lm", "tiny-gpt"), ("someone/bert", "causal-lm", "tiny-gpt"),
    ("meta-llama/Llama-3.2-1B", "causal-lm", "tiny-llama"), ("Qwen/Qwen3-0.6B", None, "tiny-llama"),
    ("someone/model", None, None)])
def test_an_uncached_hub_model_offline_names_its_stand_in(offline, name, task, stand_in):
    with pytest.raises(ConnectionError, match="not in the local cache, and the hub cannot be reached") as caught:
        load_model(name, task=task)
    says = f"load_model({stand_in!r}) stands in for it offline" if stand_in else "no model of the zoo is of its kind"
    assert says in str(caught.value) and stand_in in (None, *zoo())
    assert f"{name!r} is a hub model" in str(caught.value) and ", ".join(map(repr, zoo())) in str(caught.value)


def test_checkpoints_are_revisions_and_the_last_is_the_model(tmp_path):
    names = checkpoints("tiny-vit")
    assert len(names) == 8 and names[0] == "step0" and names[-1] == f"step{card('tiny-vit')['steps']}"
    shipped = load_model("tiny-vit", revision="main")[0].state_dict()
    images = load_data("digits")
    right = []
    for name in names:
        model, processor = load_model("tiny-vit", revision=name)
        assert model.dtype == torch.float32 and not model.training
        with torch.no_grad():
            answers = model(**processor(images[:]["image"], return_tensors="pt")).logits.argmax(-1)
        right.append((answers == torch.tensor(images["label"])).sum().item())
    print(dict(zip(names, right, strict=True)))
    assert all(torch.equal(value, shipped[key].half().float()) for key, value in model.state_dict().items())
    assert right[0] < 75 and right[-1] > 475 and right == sorted(right)  # of 500; a tenth by chance

    local = tmp_path / "mine"
    save(CHECKPOINTS["gpt2"](), local)
    save(CHECKPOINTS["gpt2"]().half(), local / "step10")
    save(CHECKPOINTS["gpt2"](), local / "step9")
    assert checkpoints(local) == ["step9", "step10"] and checkpoints("tiny-preln") == []
    assert load_model(local, revision="step10")[0].dtype == torch.float16


def test_an_unknown_checkpoint_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="revision must be one of 'step0', .*'main' for 'tiny-vit', not 'step5'"):
        load_model("tiny-vit", revision="step5")
    with pytest.raises(ValueError, match="revision must be one of 'main' for 'tiny-preln', not '../tiny-vit'"):
        load_model("tiny-preln", revision="../tiny-vit")
    with pytest.raises(ValueError, match="'gpt2' is a hub id: huggingface_hub.list_repo_refs"):
        checkpoints("gpt2")
    with pytest.raises(ValueError, match="No model is named 'tiny-vitt'"):
        checkpoints("tiny-vitt")


def test_what_cannot_be_loaded_says_the_rule_the_offender_and_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="No model is named 'tiny-vitt'; did you mean 'tiny-vit'?"):
        load_model("tiny-vitt")
    with pytest.raises(ValueError, match="No model is named 'no such thing'. A model is a zoo name"):
        load_model("no such thing")
    with pytest.raises(ValueError, match="task must be one of causal-lm.*not 'poetry'"):
        load_model("tiny-vit", task="poetry")
    with pytest.raises(FileNotFoundError, match="No folder at './nowhere'"):
        load_model("./nowhere")
    with pytest.raises(FileNotFoundError, match="folder with a config.json"):
        load_model(tmp_path)
    save(CHECKPOINTS["gpt2"](), tmp_path / "bare", processor=False)
    with pytest.raises(FileNotFoundError, match=r"A model comes with its tokenizer.*tokenizer.save_pretrained"):
        load_model(tmp_path / "bare")
    save(CHECKPOINTS["vit"](), tmp_path / "blind", processor=False)
    tokenizer().save_pretrained(tmp_path / "blind")
    with pytest.raises(FileNotFoundError, match="A model comes with its image processor"):
        load_model(tmp_path / "blind")
    save(tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=1,
                                                   num_heads=2)), tmp_path / "t5")
    with pytest.raises(ValueError, match=r"'T5ForConditionalGeneration'.* tells none.*task="):
        load_model(tmp_path / "t5")
    with pytest.raises(ValueError, match="Only zoo models carry a card; 'gpt2' is none"):
        card("gpt2")


def test_a_name_the_hub_does_not_know_is_not_called_a_network_failure():
    from huggingface_hub import errors

    missing = OSError("no such model")
    missing.__cause__ = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert isinstance(models._hub_error("someone/tiny-vit", None, missing), ValueError)
    assert "nor the hub has a model 'someone/tiny-vit'" in str(models._hub_error("someone/tiny-vit", None, missing))
    other = OSError("disk full")
    assert models._hub_error("someone/model", None, other) is other


# --- inside a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_token_embedding_of(family):
    model, inputs = FAMILIES[family]()
    name, blocks = find_blocks(model)
    assert model.get_submodule(name) is blocks and not re.search(r"\.\d", name)  # never a list inside a block
    calls, embedded = [], []
    handles = [block.register_forward_pre_hook(lambda module, args: calls.append(module)) for block in blocks]
    handles.append(token_embedding(model).register_forward_hook(lambda module, args, output: embedded.append(output)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert len(calls) == n_blocks(model) == 2 and len(blocks) == (1 if family == "albert" else 2)
    (tokens,), d = embedded, 8 if family == "albert" else 16
    if "pixel_values" in inputs:
        if family in ("clip", "siglip"):
            assert tokens.shape == (N, d, 2, 2)
            tokens = tokens.flatten(2).transpose(1, 2)
        # the patch embedding is one linear map of each patch: nothing added but its own bias
        convolution, = (m for m in token_embedding(model).modules() if isinstance(m, nn.Conv2d))
        expected = nn.functional.unfold(inputs["pixel_values"], 4, stride=4).mT @ convolution.weight.flatten(1).mT
        expected = expected + (0 if convolution.bias is None else convolution.bias)
    else:
        scale = 16**0.5 if family.startswith("gemma") else 1
        expected = token_embedding(model).weight[inputs["input_ids"]] * scale
        tokens = tokens[:, : expected.shape[1]]  # longformer pads its input to a multiple of its window
        assert token_embedding(model).weight.shape == (V, d)
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-6)


def test_blocks_of_plain_torch_models():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    assert find_blocks(encoder) == ("layers", encoder.layers) and n_blocks(encoder) == 3
    written_out = nn.ModuleDict({"embed": nn.Embedding(100, 8), "blocks": nn.Sequential(*encoder.layers),
                                 "heads": nn.ModuleList([nn.Linear(8, 1000)] * 2)})
    assert find_blocks(written_out) == ("blocks", written_out["blocks"]) and n_blocks(written_out) == 3
    whole = nn.Sequential(nn.Sequential(nn.Embedding(100, 8)), encoder, nn.Linear(8, 10))
    assert find_blocks(whole)[0] == "1.layers"
    with pytest.raises(ValueError, match="and Linear has none"):
        find_blocks(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="TransformerEncoder has none that answers"):
        token_embedding(encoder)


def test_blocks_where_experts_outnumber_them():
    experts = tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=16))
    assert find_blocks(experts)[0] == "model.layers" and n_blocks(experts) == 2


def test_albert_calls_one_group_many_times():
    model = tf.AlbertModel(tf.AlbertConfig(**{**SMALL, "num_hidden_layers": 5}, embedding_size=8))
    assert len(find_blocks(model)[1]) == 1 and n_blocks(model) == 5


def test_two_streams_have_no_one_token_embedding():
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_heads=2,
                                                   num_layers=1, num_decoder_layers=3))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has two, encoder and decoder"):
        token_embedding(t5)
    assert find_blocks(t5)[0] == "decoder.block" and n_blocks(t5) == 3
    clip = tf.CLIPModel(tf.CLIPConfig(text_config={**SMALL, "num_hidden_layers": 1}, vision_config={
        "image_size": 8, "patch_size": 4, "num_channels": 3, **SMALL, "num_hidden_layers": 4}))
    assert "vision" in find_blocks(clip)[0] and n_blocks(clip) == 4
    with pytest.raises(ValueError, match="CLIPModel has none that answers.*one tower"):
        token_embedding(clip)
