"""Loading models by name, finding their parts, and the zoo: its measured numbers and its recipes."""

import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from families import FAMILIES, N, V
from torch import nn

from tensorlens_utils import models, training
from tensorlens_utils.data import digit_text, load_data
from tensorlens_utils.models import card, find_blocks, load_model, n_blocks, token_embedding, zoo

FLOOR = {"tiny-vit": 0.96, "tiny-preln": 0.93, "tiny-postln": 0.93}


# --- the zoo ---------------------------------------------------------------------------------------------------------


def test_each_recipe_is_shipped_with_a_card_and_all_of_it_is_small():
    assert set(zoo()) == set(training.RECIPES) == set(FLOOR)
    assert sum(file.stat().st_size for file in models.ZOO.rglob("*") if file.is_file()) < 20e6
    for name in zoo():
        recipe, numbers = training.RECIPES[name], card(name)
        stated = [numbers[key] for key in ("steps", "seed", "batch_size", "learning_rate", "weight_decay")]
        assert stated == [recipe.steps, recipe.seed, recipe.batch_size, recipe.lr, recipe.weight_decay]
        assert numbers["cpu_minutes"] > 0 and numbers["parameters"] == load_model(name)[0].num_parameters()


@pytest.mark.parametrize("name", FLOOR)
def test_card_states_what_a_fresh_evaluation_measures(name):
    model, processor = load_model(name)
    fresh = training.RECIPES[name].measure(model, processor)
    print(name, {key: measure["value"] for key, measure in fresh.items()})
    assert fresh["accuracy"]["n"] == 500 and fresh["accuracy"]["value"] >= FLOOR[name]
    stated = {key: value for key, value in card(name).items() if isinstance(value, dict)}
    assert fresh.keys() == stated.keys()
    for key, measure in fresh.items():  # to one digit of 500: another machine may round a tie the other way
        assert measure == pytest.approx(stated[key], abs=1.1 / measure["n"]), key
    page = (models.ZOO / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (accuracy.*?) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (\d+) \|$", page, re.M)
    assert {key: tuple(map(float, row)) for key, *row in rows} == {
        key: (round(m["value"], 3), round(m["low"], 3), round(m["high"], 3), m["n"]) for key, m in stated.items()}


def test_masked_digits_are_no_surprise_to_tiny_vit():
    numbers = card("tiny-vit")
    for word in ("black", "grey"):
        assert numbers[f"accuracy, 4 of 16 patches {word}"]["low"] > 0.9
        assert numbers[f"accuracy, 8 of 16 patches {word}"]["low"] > 0.8


def test_the_processors_read_digits():
    model, processor = load_model("tiny-vit")
    images = load_data("digits")[:3]["image"]
    pixels = processor(images, return_tensors="pt").pixel_values
    raw = torch.stack([torch.from_numpy(np.array(image))[None] for image in images])
    assert torch.allclose(pixels, (raw / 16 - training.PIXEL_MEAN) / training.PIXEL_STD, atol=1e-6)
    for arrays in (raw.numpy(), raw.double().numpy(), list(raw.numpy())):
        assert torch.equal(processor(arrays, return_tensors="pt").pixel_values, pixels)
    assert model(pixels).logits.shape == (3, 10) and model.config.id2label[7] == "7"

    _, tokenizer = load_model("tiny-preln")
    inputs = tokenizer([digit_text(image) for image in images], return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"} and inputs.input_ids.shape == (3, 65)
    assert tokenizer.convert_ids_to_tokens(inputs.input_ids[0, :2].tolist()) == ["<s>", str(raw[0, 0, 0, 0].item())]
    assert torch.equal(inputs.input_ids[:, 1:] - tokenizer.convert_tokens_to_ids("0"), raw.flatten(1))


def test_the_pair_differs_in_the_place_of_the_norms_alone(tmp_path):
    pre, post = (training.train(dataclasses.replace(training.RECIPES[name], steps=0), tmp_path, progress=False)[0]
                 for name in ("tiny-preln", "tiny-postln"))
    rest = [[p for name, p in m.named_parameters() if "LayerNorm" not in name] for m in (pre, post)]
    assert all(torch.equal(a, b) for a, b in zip(*rest, strict=True)) and len(rest[0]) > 40
    assert pre.num_parameters() - post.num_parameters() == 2 * pre.config.hidden_size  # the norm at pre-LN's end
    recipes = [dataclasses.asdict(training.RECIPES[name]) for name in ("tiny-preln", "tiny-postln")]
    for key in recipes[0].keys() - {"name", "about", "build"}:
        assert recipes[0][key] == recipes[1][key], key


# --- the recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOOR)
def test_a_stopped_run_goes_on_to_the_same_weights(name, tmp_path):
    recipe = dataclasses.replace(training.RECIPES[name], steps=5, warmup=2, batch_size=8)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    model, _, minutes = training.train(recipe, tmp_path / "whole", save_every=2, progress=False)
    whole = model.state_dict()
    assert torch.equal(torch.get_rng_state(), before) and not model.training and minutes > 0
    assert torch.get_num_threads() == threads

    calls = itertools.count(1)

    def stopping(n, generator):
        if next(calls) == 4:  # steps 1 and 2 are saved, step 3 is lost
            raise KeyboardInterrupt
        return recipe.batch(n, generator)

    with pytest.raises(KeyboardInterrupt):
        training.train(dataclasses.replace(recipe, batch=stopping), tmp_path / "parts", save_every=2, progress=False)
    seen = []
    counting = dataclasses.replace(recipe, batch=lambda n, generator: seen.append(n) or recipe.batch(n, generator))
    resumed = training.train(counting, tmp_path / "parts", save_every=2, progress=False)[0].state_dict()
    assert len(seen) == 3
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())

    other = training.train(dataclasses.replace(recipe, seed=1), tmp_path / "parts", progress=False)[0].state_dict()
    assert not torch.equal(other["classifier.weight" if name == "tiny-vit" else "classifier.dense.weight"],
                           whole["classifier.weight" if name == "tiny-vit" else "classifier.dense.weight"])


def test_training_batches_are_the_processor_s_inputs_moved_and_masked():
    images, labels = training._train_digits()
    chosen, digits = training.shifted_digits(400, torch.Generator().manual_seed(0))
    same = (chosen[:, None] == images).flatten(2).all(-1)  # (400, 1297)
    unmoved = same.any(1)
    assert 0.7 < unmoved.float().mean() < 0.9  # a quarter is drawn to move, a ninth of that by nothing
    assert torch.equal(labels[same[unmoved].int().argmax(1)], digits[unmoved])
    inner = images[:, 1:7, 1:7].unsqueeze(0)  # a moved digit still has every inner pixel of its origin, one pixel away
    for moved in chosen[~unmoved][:5]:
        assert any((moved[1 + dy:7 + dy, 1 + dx:7 + dx] == inner).flatten(2).all(-1).any()
                   for dy in (-1, 0, 1) for dx in (-1, 0, 1))

    pixels = training._vit_batch(400, torch.Generator().manual_seed(0))["pixel_values"]
    clean = (chosen[:, None] / 16 - training.PIXEL_MEAN) / training.PIXEL_STD
    patches = [x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3) for x in (pixels, clean)]  # (400, 16, 4)
    changed = (patches[0] != patches[1]).any(-1)
    values = patches[0][changed]
    assert torch.isin(values, torch.tensor([*training.BASELINES.values()])).all() and (values == values[:, :1]).all()
    grey = (patches[0] == 0).all(-1)
    assert 0.1 < grey.any(1).float().mean() < 0.6 and 0.1 < changed.float().mean() < 0.5
    assert (changed.sum(1) == 0).any() and (changed.sum(1) > 8).any()

    ids = training._pair_batch(400, torch.Generator().manual_seed(0))["input_ids"]
    tokenizer = training._token_processor()
    assert torch.equal(ids, tokenizer([digit_text(image) for image in chosen], return_tensors="pt").input_ids)


def test_command_line_makes_a_trial_that_loads_by_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert training.main(["tiny-vit", "tiny-postln", "--steps", "2"]) == 0
    assert re.search(r"tiny-vit: accuracy 0\.\d{3}, 136,138 parameters", capsys.readouterr().out)
    model, processor = load_model("build/zoo/trial/tiny-vit")
    assert isinstance(model, tf.ViTForImageClassification) and isinstance(processor, tf.ViTImageProcessorPil)
    assert isinstance(load_model("build/zoo/trial/tiny-postln")[0], tf.RobertaForSequenceClassification)
    with pytest.raises(SystemExit):
        training.main(["tiny-cat"])
    assert "not for tiny-cat" in capsys.readouterr().err


# --- loading ---------------------------------------------------------------------------------------------------------


def tokenizer():
    return training._token_processor()


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
        (training._vit_build()[1] if model.main_input_name == "pixel_values" else tokenizer()).save_pretrained(folder)
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
    ("someone/model", "image-classification", "tiny-vit"), ("textattack/bert-base-uncased-imdb", None, "tiny-postln"),
    ("gpt2", None, "tiny-gpt"), ("meta-llama/Llama-3.2-1B", "causal-lm", "tiny-gpt"), ("someone/model", None, None)])
def test_an_uncached_hub_model_offline_names_its_stand_in(offline, monkeypatch, tmp_path, name, task, stand_in):
    monkeypatch.setattr(models, "ZOO", shutil.copytree(models.ZOO, tmp_path / "zoo"))
    for extra in (None, "tiny-gpt"):  # before and after the zoo has a causal language model
        if extra:
            shutil.copytree(models.ZOO / "tiny-vit", models.ZOO / extra)
        with pytest.raises(ConnectionError, match="not in the local cache, and the hub cannot be reached") as caught:
            load_model(name, task=task)
        there = stand_in in zoo()
        assert f"load_model({stand_in!r}) stands in for it offline" in str(caught.value) if there else \
            "no stand-in of its kind" in str(caught.value)
        assert f"{name!r} is a hub model" in str(caught.value) and ", ".join(map(repr, zoo())) in str(caught.value)


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
