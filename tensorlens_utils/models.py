"""Models: the zoo of tiny trained models that ships with the package, the hub's models, and local checkpoints.

One call gives a model with its tokenizer or image processor; three more find what the operator needs to know about
any model: the stack of transformer blocks, how often it is called, and the module that embeds the tokens.

>>> from tensorlens_utils.models import load_model, n_blocks
>>> model, processor = load_model("tiny-vit")
>>> n_blocks(model)
4

`python -m tensorlens_utils.recipes [NAME ...]` retrains the zoo.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ZOO = Path(__file__).parent / "zoo"

# task: (the Auto class that builds it, how the names of its architectures end); "Model" ends many, so it comes last.
TASKS = {
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "sequence-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification", "WithTeacher")),
    "encoder": ("AutoModel", ("Model",)),
}

# zoo model: (the tasks, and the words in a hub id, for which it stands in offline). The task tells more than a word;
# the first of equals counts.
STAND_INS = {
    "tiny-vit": (("image-classification",), r"vit|deit|beit|dino|clip|siglip|swin|image"),
    "tiny-bert": (("sequence-classification", "masked-lm"), r"bert|electra|mpnet|sst|imdb|mnli"),
    "tiny-gpt": (("causal-lm",), r"gpt|pythia|opt|bloom|falcon|mpt|rwkv|mamba"),
    "tiny-llama": (("causal-lm",), r"llama|mistral|mixtral|qwen|gemma|phi|olmo|smollm"),
}


def zoo() -> list[str]:
    """Names of the models that ship with the package, each a folder in Hugging Face layout with a card of measured
    numbers.

    >>> "tiny-vit" in zoo()
    True
    """
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def checkpoints(name: str | Path) -> list[str]:
    """The checkpoints along the training of a zoo model or of a model in a local folder, first to last: the names that
    `load_model` takes as `revision`. They are folders stepN in the model's own. Empty where none were kept.

    >>> checkpoints("tiny-vit")[0]
    'step0'
    """
    source, where = _resolve(name)
    if where == "hub":
        raise ValueError(f"Checkpoints are listed for zoo models and local folders, and {str(name)!r} is a hub id: "
                         f"huggingface_hub.list_repo_refs({str(name)!r}) lists its revisions.")
    return sorted((path.parent.name for path in Path(source).glob("step*/config.json")), key=lambda step: int(step[4:]))


def load_model(name: str | Path, *, task: str | None = None, dtype: Any = None, device: Any = None,
               revision: str | None = None, **options: Any) -> tuple[nn.Module, Any]:
    """A model in eval mode, with its tokenizer or image processor.

    `name` is a zoo name (see `zoo()`), a local folder in Hugging Face layout, or a hub id. The class is the one that
    the checkpoint's `architectures` names; `task` ("causal-lm", "masked-lm", "sequence-classification",
    "image-classification", "encoder") overrides it. `dtype` None keeps the checkpoint's own precision, but gives zoo
    models in float32 however they are stored; `device` None leaves the model on the CPU; further `options` go to
    `from_pretrained` (such as `attn_implementation="eager"`). `revision` is the hub's name of a version; of a zoo model
    or local folder it is one of its `checkpoints`.

    Raises ValueError for a name or revision that nothing answers to, FileNotFoundError for a missing path or a
    checkpoint without its processor, and ConnectionError for a hub model that is not cached when there is no network;
    set HF_HUB_OFFLINE=1 to get that answer at once, without the hub's retries.

    >>> model, processor = load_model("tiny-vit", dtype="float64")
    >>> from tensorlens_utils.data import load_data
    >>> inputs = processor(load_data("digits")[:2]["image"], return_tensors="pt").to(model.dtype)
    >>> model(**inputs).logits.shape
    torch.Size([2, 10])
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}.")
    import transformers

    source, where = _resolve(name)
    pinned = {"revision": revision} if revision is not None and where == "hub" else {}
    if where != "hub" and revision not in (None, "main"):
        if revision not in checkpoints(name):
            raise ValueError(f"revision must be one of {', '.join(map(repr, [*checkpoints(name), 'main']))} for "
                             f"{str(name)!r}, not {revision!r}.")
        source = str(Path(source) / revision)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **pinned)
        auto = getattr(transformers, TASKS[task or _task(config, name)][0])
        dtype = dtype if dtype is not None else "float32" if where == "zoo" else "auto"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # tiny-attn's MLPs, of no units
            model = auto.from_pretrained(source, config=config, dtype=dtype, **pinned, **options)
        processor = _processor(source, model, pinned)
    except OSError as error:
        if where == "hub":
            raise _hub_error(str(name), task, error) from error
        raise
    return model.to(device).eval() if device is not None else model.eval(), processor


def _resolve(name: str | Path) -> tuple[str, str]:
    """Where a name points: (path or hub id, "zoo" | "path" | "hub")."""
    text = str(name)
    if (ZOO / text / "config.json").is_file() and text in zoo():
        return str(ZOO / text), "zoo"
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"A local model is a folder with a config.json; {text!r} has none. Save it there "
                                    "with model.save_pretrained, and its tokenizer or image processor likewise.")
        return str(path), "path"
    if isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise FileNotFoundError(f"No folder at {text!r}. A model is a zoo name ({_listing()}), a hub id 'owner/name', "
                                "or the path of a folder in Hugging Face layout.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("tiny-") and "/" not in text:
        near = difflib.get_close_matches(text, zoo(), n=1)
        raise ValueError(f"No model is named {text!r}{f'; did you mean {near[0]!r}?' if near else '.'} A model is a "
                         f"zoo name ({_listing()}), a hub id 'owner/name', or the path of a folder in Hugging Face "
                         "layout.")
    return text, "hub"


def _listing() -> str:
    return ", ".join(map(repr, zoo())) or "nothing yet: run `make zoo`"


def _task(config: Any, name: str | Path) -> str:
    """The task of a checkpoint, from the architecture that its configuration names; a plain encoder where it names
    none."""
    architecture = (getattr(config, "architectures", None) or ["Model"])[0]
    for task, (_, endings) in TASKS.items():
        if architecture.endswith(endings):
            return task
    raise ValueError(f"The task is read off the architecture's name, and {architecture!r} of {str(name)!r} tells none. "
                     f"Name one: load_model({str(name)!r}, task=...), of {', '.join(TASKS)}.")


def _processor(source: str, model: nn.Module, pinned: dict) -> Any:
    """The image processor of a model of pixels, the tokenizer of any other."""
    import transformers

    # With the PIL backend, pixels are the same numbers whether or not torchvision is installed.
    kind, auto, asked, files = (
        ("image processor", transformers.AutoImageProcessor, {"backend": "pil"}, ("*processor_config.json",))
        if model.main_input_name == "pixel_values" else
        ("tokenizer", transformers.AutoTokenizer, {}, ("tokenizer*", "vocab*", "spiece*", "*.model")))
    local = Path(source)
    # Looked for here, since transformers makes up an empty tokenizer where there is none.
    if local.is_dir() and not any(found for pattern in files for found in local.glob(pattern)):
        raise FileNotFoundError(f"A model comes with its {kind}, and {source!r} holds none. Save one beside the model: "
                                f"{kind.replace(' ', '_')}.save_pretrained({source!r}).")
    processor = auto.from_pretrained(source, **asked, **pinned)
    if kind == "image processor" and getattr(model.config, "num_channels", None) == 3:
        processor.do_convert_rgb = True  # photographs come in grey and with transparency, too: ImageNet's do
    return processor


def word_tokenizer(words: Iterable[str], length: int, *, template: str = "$A", **special_tokens: str) -> Any:
    """A tokenizer of words between blanks, one token each; the ids are those of the special tokens, then the words'.

    `length` is the longest input, `template` says where special tokens stand round a text ($A); `special_tokens` are
    transformers' own, of which unk_token is needed.

    >>> tokenizer = word_tokenizer(["so", "much"], 8, template="<s> $A", unk_token="<unk>", bos_token="<s>")
    >>> tokenizer("so much depends").input_ids
    [1, 2, 3, 0]
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*special_tokens.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special_tokens["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [(word, ids[word]) for word in template.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length,
                                   model_input_names=["input_ids", "attention_mask"], **special_tokens)


def _hub_error(name: str, task: str | None, error: OSError) -> Exception:
    """What to tell someone whose hub model did not come: no such model, or no network and what stands in for it."""
    from huggingface_hub import errors

    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(c, errors.RepositoryNotFoundError) and not isinstance(c, errors.GatedRepoError) for c in causes):
        near = difflib.get_close_matches(name, zoo(), n=1)
        return ValueError(f"Neither the zoo ({_listing()}) nor the hub has a model {name!r}"
                          f"{f'; did you mean {near[0]!r}' if near else ''}. If it is private, log in to the hub.")
    if not any(isinstance(c, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) for c in causes):
        return error
    fits = {tiny: (task in tasks, bool(re.search(words, name.lower()))) for tiny, (tasks, words) in STAND_INS.items()}
    stand_in = max(fits, key=fits.get)
    remedy = (f"load_model({stand_in!r}) stands in for it offline" if any(fits[stand_in]) else
              "no model of the zoo is of its kind")
    return ConnectionError(f"{name!r} is a hub model that is not in the local cache, and the hub cannot be reached (no "
                           f"network, or HF_HUB_OFFLINE=1): {remedy}. The zoo has {_listing()}. Or give the path of a "
                           "folder in Hugging Face layout.")


# --- Inside a model -----------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """What tells a model from others: its class, and a digest of all weights, their precision and the configuration.

    >>> fingerprint(load_model("tiny-vit")[0]) == fingerprint(load_model("tiny-vit")[0].double())
    False
    """
    config = {key: value for key, value in model.config.to_dict().items()
              if key not in ("_name_or_path", "transformers_version")}  # fmt: skip
    weights = {name: (str(p.dtype), zlib.crc32(p.detach().cpu().flatten().view(torch.uint8).numpy()))
               for name, p in model.state_dict().items()}  # fmt: skip
    digest = hashlib.sha256(repr((sorted(config.items()), weights)).encode()).hexdigest()
    return f"{type(model).__name__} {digest[:12]}"


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The stack of transformer blocks: (its path in the model, the modules in order).

    It is the list of modules with the most parameters, the outermost where several hold the same ones: so experts,
    which are listed inside a block, never win, nor do ALBERT's layers inside their one group. Counted are every
    nn.ModuleList (of mixed classes too: hybrids alternate attention and state-space blocks) and every nn.Sequential of
    one class, as long as their members have parts of their own, which a list of Linear or Embedding has not. How often
    the stack is called is `n_blocks`; ALBERT calls its one group many times.

    >>> find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3))[0]
    'layers'
    """
    best, most = None, 0
    for name, module in model.named_modules():  # parents come before children, so > keeps the outermost
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        if any(next(member.children(), None) is None for member in module):
            continue
        if isinstance(module, nn.Sequential) and len({type(member) for member in module}) > 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most:
            best, most = (name, module), size
    if best is None:
        raise ValueError("A transformer's blocks are looked for in nn.ModuleList or nn.Sequential lists of modules, "
                         f"and {type(model).__name__} has none. Keep its blocks in an nn.ModuleList, or use "
                         'at="inputs" | "tokens" and to="logits" | "last_hidden_state", which need no blocks.')
    return best


def n_blocks(model: nn.Module) -> int:
    """How many block calls one forward pass makes: `num_hidden_layers` of the nearest configuration above the blocks
    (ALBERT calls one group that many times; a two-tower model has one configuration per tower), else the length of the
    stack.

    >>> n_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3))
    3
    """
    name, blocks = find_blocks(model)
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        for candidate in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
            if isinstance(getattr(candidate, "num_hidden_layers", None), int):
                return candidate.num_hidden_layers
    return len(blocks)


def token_embedding(model: nn.Module) -> nn.Module:
    """The module whose output is the token or patch embedding, before positions, types, norms or a class token.

    It is what `get_input_embeddings()` answers, and its output is one of

    - text (bert, gpt2, gemma, mamba, rwkv, ...): (N, L, D) from an nn.Embedding; Gemma's, of every kind, already holds
      its factor √D; D is ALBERT's `embedding_size`, which it projects to the hidden size afterwards;
    - vit, deit, beit, dinov2: (N, patches, D) from the patch-embedding module;
    - clip vision, siglip vision: (N, D, rows, columns) from its convolution, so that tokens are
      `output.flatten(2).transpose(1, 2)`.

    Raises ValueError where a model has no such module, or two (an encoder with a decoder).
    """
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"A token embedding belongs to one stream of tokens, and {name} has two, encoder and decoder. "
                         "Hand over one of them: model.get_encoder() or model.get_decoder().")
    find = getattr(model, "get_input_embeddings", None)
    try:
        module = find() if find is not None else None
    except NotImplementedError:
        module = None
    if not isinstance(module, nn.Module):
        raise ValueError(f"A token embedding is what get_input_embeddings() answers, and {name} has none that answers. "
                         'Use at="embeddings" (what enters the first block), or write it that method, for the module '
                         "whose output is (N, L, D); of a two-tower model, hand over one tower.")
    return module


# --- The cards ----------------------------------------------------------------------------------------------


def card(name: str) -> dict[str, Any]:
    """The measured numbers on a zoo model's card (its README.md), as the recipe wrote them: shares and means as
    {"value", "low", "high", "n"} with a 95 % interval, and "parameters", "seed", "steps", "cpu_minutes".

    >>> card("tiny-vit")["accuracy"]["value"] > 0.96
    True
    """
    import yaml

    if name not in zoo():
        raise ValueError(f"Only zoo models carry a card; {name!r} is none. The zoo has {_listing()}.")
    return yaml.safe_load((ZOO / name / "README.md").read_text().split("---\n")[1])["measured"]
