"""`fp.quantize` of transformers' models: what goes into 4 bits, what stays dense, and the marks of its own loader."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from _close import assert_close
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import fastpeft as fp
from fastpeft.nn import Linear4bit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
transformers.utils.logging.disable_progress_bar()

# Every K is a multiple of 64: others bitsandbytes computes wrongly on a CPU.
BERT = {
    "vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
LLAMA = BERT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = LLAMA | {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 64}
MOE |= {"shared_expert_intermediate_size": 64}
GPT2 = {
    "vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 61,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
T5 = {"vocab_size": 61, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "num_labels": 3}
T5 |= {"decoder_start_token_id": 0}
BART = {
    "vocab_size": 61, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "num_labels": 3,
}  # fmt: skip
VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
MAE = VIT | {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
MAE |= {"decoder_intermediate_size": 128}
WO = [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)]
WO += [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)]

# The class, its configuration, and what stays dense. transformers misses the layers with a star (they have a bias, or a
# head has several): it would put these into 4 bits.
CASES = [
    ("LlamaForCausalLM", LLAMA, ["lm_head"]),
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}, ["lm_head"]),
    ("LlamaModel", LLAMA, []),
    ("LlamaForSequenceClassification", LLAMA, ["score"]),
    ("LlamaForTokenClassification", LLAMA, ["score*"]),
    ("LlamaForQuestionAnswering", LLAMA, ["qa_outputs*"]),
    ("GPT2LMHeadModel", GPT2, ["lm_head"]),
    ("GPT2ForSequenceClassification", GPT2, ["score"]),
    ("GPT2DoubleHeadsModel", GPT2, ["lm_head", "multiple_choice_head.summary*"]),
    ("BertModel", BERT, ["pooler.dense*"]),
    ("BertForSequenceClassification", BERT, ["classifier*"]),
    ("BertForQuestionAnswering", BERT | {"num_labels": 2}, ["qa_outputs*"]),
    ("BertForMaskedLM", BERT, ["cls.predictions.decoder"]),
    ("BertForPreTraining", BERT, ["cls.predictions.decoder", "cls.seq_relationship*"]),
    ("RobertaForSequenceClassification", BERT, ["classifier.dense*", "classifier.out_proj*"]),
    ("DistilBertForSequenceClassification", DISTILBERT, ["pre_classifier*", "classifier*"]),
    ("DebertaV2ForSequenceClassification", BERT, ["pooler.dense*", "classifier*"]),
    ("T5ForConditionalGeneration", T5, [*WO, "lm_head"]),
    ("T5ForSequenceClassification", T5,
     [*(f"transformer.{name}" for name in WO), "classification_head.dense*", "classification_head.out_proj*"]),
    ("BartForConditionalGeneration", BART, ["lm_head"]),
    ("BartForSequenceClassification", BART, ["classification_head.dense*", "classification_head.out_proj*"]),
    ("ViTForImageClassification", VIT, ["classifier*"]),
    ("ViTMAEForPreTraining", MAE, ["decoder.decoder_embed*", "decoder.decoder_pred*"]),
    ("MixtralForCausalLM", MOE, ["lm_head"]),
    ("Qwen2MoeForCausalLM", MOE, ["lm_head"]),
]  # fmt: skip
ALWAYS = "num_labels", "decoder_start_token_id"  # settings that no configuration has by itself
QUIET = pytest.mark.filterwarnings("ignore:fastpeft.quantize left")


def build(name: str, settings: dict, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    made = getattr(transformers, name)
    known = {k: v for k, v in settings.items() if k in ALWAYS or hasattr(made.config_class(), k)}
    return made(made.config_class(**known)).to(dtype)


def case(name: str):
    return build(*next(c[:2] for c in CASES if c[0] == name))


def linear(model: nn.Module) -> set[str]:
    """Dense linear layers."""
    return {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}


def packed(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def bytes_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.reshape(-1).view(torch.uint8) for k, v in layer.state_dict().items()}


def assert_same_bytes(one: nn.Module, two: nn.Module) -> None:
    ours, theirs = bytes_of(one), bytes_of(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def stock(model, folder, double_quant: bool = True, **settings):
    """The same model through transformers' loader."""
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, **settings
    )
    return type(model).from_pretrained(folder, quantization_config=config)


def tokens(seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 2  # some classifiers read at the end of the text
    return ids


# ---- what goes into 4 bits ---------------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize(("name", "settings", "expected"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_what_stays_dense(name, settings, expected, tmp_path):
    """As broad as transformers, byte for byte, and dense wherever that is; but no part of a head is in 4 bits."""
    model = build(name, settings)
    theirs = stock(copy.deepcopy(model), tmp_path)
    before = linear(model)
    fp.quantize(model)
    dense = {one.rstrip("*") for one in expected}
    assert linear(model) == dense
    assert linear(theirs) == {one for one in expected if not one.endswith("*")}
    ours, others = packed(model), packed(theirs)
    assert ours.keys() == before - dense and all(
        type(layer).__module__.startswith("fastpeft") for layer in ours.values()
    )
    for layer in ours:
        assert_same_bytes(ours[layer], others[layer])


@QUIET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d(dtype):
    """GPT-2's layer, [K, N] -> Linear4bit, [N, K]: the same function of the decoded weight."""
    model = build("GPT2LMHeadModel", GPT2, dtype).eval()
    old = model.transformer.h[0].attn.c_attn
    bias, weight = old.bias, old.weight.detach()
    fp.quantize(model, "fp4", blocksize=32, double_quant=False)
    new = model.transformer.h[0].attn.c_attn
    assert isinstance(new, Linear4bit) and (new.in_features, new.out_features) == (64, 192) and new.bias is bias
    assert not new.training and not any(p.requires_grad for p in new.parameters())
    made = fp.ops.quantize_4bit(weight.t().contiguous(), quant_type="fp4", blocksize=32)
    assert torch.equal(new.weight4bit.packed, made.packed)
    x, w = torch.randn(5, 64, dtype=dtype), new.dequantize()
    exact = nn.functional.linear(x.double(), w.double(), bias.double())
    assert_close(new(x), nn.functional.linear(x, w, bias), exact)
    only = fp.quantize(Conv1D(64, 128))
    assert isinstance(only, Linear4bit) and only.weight4bit.shape == (64, 128)


@QUIET
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_peft_over_conv1d(fan_in_fan_out):
    model = fp.quantize(case("GPT2LMHeadModel")).eval()
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=fan_in_fan_out, init_lora_weights=False)
    model = get_peft_model(model, config)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, w, bias = torch.randn(5, 64), layer.base_layer.dequantize(), layer.base_layer.bias
    with torch.no_grad():
        same = nn.functional.linear(x, w, bias) + layer.scaling["default"] * (x @ a.t() @ b.t())
        exact = nn.functional.linear(
            x.double(), w.double() + layer.scaling["default"] * b.double() @ a.double(), bias.double()
        )
        assert_close(layer(x), same, exact)
    fp.apply(model)
    with torch.no_grad():
        assert_close(model.base_model.model.transformer.h[0].attn.c_attn(x), same, exact)


HEADS = {  # the head, by PEFT's own list for the task or by `modules_to_save`
    "LlamaForSequenceClassification": (TaskType.SEQ_CLS, ["q_proj", "v_proj"], None),
    "LlamaForTokenClassification": (TaskType.TOKEN_CLS, ["q_proj", "v_proj"], None),
    "LlamaForQuestionAnswering": (TaskType.QUESTION_ANS, ["q_proj", "v_proj"], None),
    "GPT2ForSequenceClassification": (TaskType.SEQ_CLS, ["c_attn"], None),
    "BertForSequenceClassification": (TaskType.SEQ_CLS, ["query", "value"], None),
    "BertForQuestionAnswering": (TaskType.QUESTION_ANS, ["query", "value"], None),
    "RobertaForSequenceClassification": (TaskType.SEQ_CLS, ["query", "value"], None),
    "DistilBertForSequenceClassification": (TaskType.SEQ_CLS, ["q_lin", "v_lin"], ["pre_classifier"]),
    "DebertaV2ForSequenceClassification": (TaskType.SEQ_CLS, ["query_proj", "value_proj"], ["pooler"]),
    "T5ForSequenceClassification": (TaskType.SEQ_CLS, ["q", "v"], ["classification_head"]),
    "BartForSequenceClassification": (TaskType.SEQ_CLS, ["q_proj", "v_proj"], ["classification_head"]),
    "ViTForImageClassification": (None, ["query", "value", "q_proj", "v_proj"], ["classifier"]),
}


@QUIET
@pytest.mark.parametrize("name", HEADS)
def test_heads_train(name):
    task, targets, also = HEADS[name]  # PEFT adds to the list that it is given
    ids, labels = tokens(), torch.arange(4) % 3
    batch = {"input_ids": ids, "labels": labels}
    if "Image" in name:
        batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels}
    elif "Question" in name:
        batch = {"input_ids": ids, "start_positions": torch.arange(4), "end_positions": torch.arange(4)}
    elif "Token" in name:
        batch["labels"] = ids % 3
    elif name.startswith("T5"):
        ids[:, -1] = 1
    model = fp.quantize(case(name))
    model = get_peft_model(
        model, LoraConfig(r=4, task_type=task, target_modules=targets, modules_to_save=also and [*also])
    )
    fp.apply(model)
    heads = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert heads and all(".modules_to_save." in n for n in heads)
    assert {one for one in also or [] if not any(f".{one}." in n for n in heads)} == set()
    optimizer, before = torch.optim.SGD(heads.values(), lr=1.0), [p.detach().clone() for p in heads.values()]
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = [not torch.equal(old, new) for old, new in zip(before, heads.values())]
    assert all(moved) and losses[1] != losses[0]


@QUIET
def test_modules_to_save_and_adapters_stay_dense():
    """A model that PEFT has wrapped: its parts stay dense, and the configuration names layers without them."""
    model = case("LlamaForSequenceClassification")
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["o_proj"])
    )
    fp.quantize(model)
    inner = model.base_model.model
    layer = inner.model.layers[0].self_attn
    assert isinstance(layer.q_proj.base_layer, Linear4bit) and type(layer.q_proj.lora_A["default"]) is nn.Linear
    assert type(layer.o_proj.original_module) is nn.Linear and type(inner.score.original_module) is nn.Linear
    left = {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "score"}
    assert set(inner.config.quantization_config.llm_int8_skip_modules) == left
    assert inner.is_loaded_in_4bit and model.is_loaded_in_4bit


@QUIET
def test_other_modules_are_quantised_whole():
    """`skip` alone decides in a module that is no model of transformers, whatever its layers are called."""
    model = nn.ModuleDict({"score": nn.Linear(64, 32), "block": Conv1D(32, 64), "classifier": nn.Linear(64, 3)})
    fp.quantize(model)
    assert linear(model) == set() and len(packed(model)) == 3


def test_composed_models():
    """The output embedding of a model in a model, under any name."""
    encoder = build("BertModel", BERT)
    decoder = build("BertLMHeadModel", BERT | {"is_decoder": True, "add_cross_attention": True})
    model = fp.quantize(transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert linear(model) == {"decoder.cls.predictions.decoder"}
    assert not hasattr(encoder, "hf_quantizer") and model.is_loaded_in_4bit


# ---- skip, and what is said ----------------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ("mlp", ".mlp."),
        ("mlp.up_proj", ".mlp.up_proj"),
        ("*.mlp.*", ".mlp."),
        ("*_proj", "_proj"),
        ("layers.1", ".layers.1."),
        ("model.layers.[1-9].self_attn", ".layers.1.self_attn."),
        ("self_attn.?_proj", ".self_attn."),
        ("mlp.up", None),
        ("ayers.1", None),
        ("model.layers.1.*", ".layers.1."),
    ],
)
def test_skip(skip, skipped):
    model = case("LlamaForCausalLM")
    names = linear(model)
    expected = {name for name in names if name == "lm_head" or (skipped is not None and skipped in name)}
    if skipped == "_proj":
        with pytest.raises(ValueError, match=r"nothing to quantize .*(?s:.*)skip has '\*_proj'"):
            fp.quantize(model, skip=(skip,))
        assert linear(model) == names
        return
    fp.quantize(model, skip=(skip,))
    assert linear(model) == expected


def said(model: nn.Module, **settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp.quantize(model, **settings)
    assert all(one.filename == __file__ for one in caught if "fastpeft" in str(one.message))
    return [str(one.message) for one in caught if "fastpeft" in str(one.message)]


def test_a_small_share_is_said():
    """Heads and embeddings do not count; experts that are no layers do."""
    for name in ("LlamaForCausalLM", "BertForSequenceClassification", "GPT2LMHeadModel"):
        assert said(case(name)) == []
    (text,) = said(case("MixtralForCausalLM"))
    experts = 2 * 4 * 3 * 64 * 128  # layers, experts, matrices
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert f"only {100 * attention / (attention + experts):.2g} % of the linear weights are in 4 bits" in text
    assert "left 4 dense layers" in text and "model.layers.1.mlp.experts.down_proj: a parameter of three" in text
    assert "lm_head" not in text
    (text,) = said(case("LlamaForCausalLM"), skip=("mlp",))
    assert "only 33 % of" in text and "model.layers.0.mlp.up_proj: skip has 'mlp'" in text and "left 6" in text
    assert said(case("LlamaForCausalLM"), skip=("mlp.up_proj",)) == []
    (text,) = said(case("T5ForConditionalGeneration"))
    assert "only" not in text and "left 4" in text and "wo: transformers keeps it in float32" in text


def test_nothing_to_quantise():
    settings = LLAMA | {"num_hidden_layers": 0}
    with pytest.raises(ValueError, match=r"nothing to quantize(?s:.*)lm_head: left, an output embedding or the head"):
        fp.quantize(build("LlamaForCausalLM", settings), skip=())
    model = fp.quantize(case("BertForSequenceClassification"))
    with pytest.raises(ValueError, match="13 layers are in 4 bits already"):
        fp.quantize(model)


# ---- a 4-bit model to everybody ----------------------------------------------------------------------------------------


SAVED = ["GPT2LMHeadModel", "BertForMaskedLM", "RobertaForSequenceClassification", "T5ForConditionalGeneration"]
SAVED += ["ViTForImageClassification", "Qwen2MoeForCausalLM", "BartForConditionalGeneration"]


@QUIET
@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_by_transformers(name, tmp_path):
    model = fp.quantize(case(name))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert linear(loaded) == linear(model) and all(
        type(layer) is bnb.nn.Linear4bit for layer in packed(loaded).values()
    )
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tied = model.get_output_embeddings()
    if tied is not None and model.config.get_text_config().tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.num_parameters() == model.num_parameters() == case(name).num_parameters()
    assert loaded.get_memory_footprint() == model.get_memory_footprint()


def test_flags_as_the_loader_sets_them(tmp_path):
    dense = build("LlamaForCausalLM", LLAMA, torch.bfloat16)
    theirs = stock(dense, tmp_path, bnb_4bit_compute_dtype=torch.bfloat16)
    model = fp.quantize(copy.deepcopy(dense))
    for name in ("is_quantized", "quantization_method", "is_loaded_in_4bit"):
        assert getattr(model, name) == getattr(theirs, name)
    assert type(model.hf_quantizer) is type(theirs.hf_quantizer) and model.config._is_quantized
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    ours, others = (m.config.quantization_config.to_dict() for m in (model, theirs))
    assert ours | {"llm_int8_skip_modules": None} == others and ours["llm_int8_skip_modules"] == ["lm_head"]
    assert theirs.hf_quantizer.modules_to_not_convert == model.hf_quantizer.modules_to_not_convert
    for how in (
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to(dtype=torch.half),
    ):
        with pytest.raises(ValueError) as refused:
            how(theirs)
        with pytest.raises(ValueError, match=str(refused.value).replace("(", r"\(").replace(")", r"\)")[:60]):
            how(model)
    assert model.to("cpu") is model
    again = copy.deepcopy(model)
    assert again.hf_quantizer is not model.hf_quantizer and again.is_loaded_in_4bit


def test_fp4_and_two_formats(tmp_path):
    """The configuration names the last format; each layer loads in its own."""
    model = case("LlamaForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fp.quantize(model, "fp4", double_quant=False, skip=("mlp", "o_proj"), blocksize=128)
    assert model.config.quantization_config.bnb_4bit_quant_type == "fp4" and not linear(model) <= {"lm_head"}
    fp.quantize(model, "nf4", skip=("o_proj",))
    config = model.config.quantization_config
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert linear(loaded) == linear(model) == {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2))}
    for name, layer in packed(model).items():
        assert_same_bytes(layer, packed(loaded)[name])


class Tail(transformers.PreTrainedModel):
    """A head whose name is the end of another layer's, which is how transformers compares them."""

    config_class = transformers.LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.ModuleDict({"x_score": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
        self.score = nn.Linear(64, 2)
        self.post_init()


def test_names_that_end_alike(tmp_path):
    model = fp.quantize(Tail(transformers.LlamaConfig()))
    assert linear(model) == {"score"} and model.config.quantization_config.llm_int8_skip_modules == ["score$"]
    model.save_pretrained(tmp_path)
    loaded = Tail.from_pretrained(tmp_path)
    assert linear(loaded) == {"score"}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@QUIET
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_dequantize(name):
    model = fp.quantize(case(name))
    weights = {name: layer.dequantize() for name, layer in packed(model).items()}
    assert model.dequantize() is model
    assert not packed(model) and not hasattr(model, "hf_quantizer")
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    fp.quantize(model)
    assert packed(model).keys() == weights.keys() and model.hf_quantizer is not None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"])
@QUIET
def test_kbit_preparation(name, tmp_path):
    """Norms (and heads) to float32, checkpointing on, inputs that require gradients: as a model of transformers' loader."""
    dense = build(*next(c[:2] for c in CASES if c[0] == name), torch.bfloat16)
    models = stock(copy.deepcopy(dense), tmp_path), fp.quantize(dense)
    for model in models:
        assert prepare_model_for_kbit_training(model) is model
    theirs, ours = models
    assert ours.is_gradient_checkpointing and theirs.is_gradient_checkpointing
    kinds = [
        {n: p.dtype for n, p in m.named_parameters() if n.rpartition(".")[0] not in packed(theirs)} for m in models
    ]
    assert kinds[0] == kinds[1] and set(kinds[1].values()) == {torch.float32}
    assert not any(p.requires_grad for p in ours.parameters())
    batch = {"input_ids": tokens(), "labels": torch.arange(4) % 3 if "Classification" in name else tokens()}
    model = get_peft_model(ours, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fp.apply(model)
    model.train()(**batch).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)


def saved_bytes(model, ids) -> int:
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids)
    return sum(size for pointer, size in held.items() if pointer not in own)


def test_checkpointing_saves_memory():
    """What `prepare_model_for_kbit_training` is called for (it did nothing for a model of ours before)."""
    size = {}
    for on in (True, False):
        settings = {"use_gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model = prepare_model_for_kbit_training(fp.quantize(case("LlamaForCausalLM")), **settings)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        fp.apply(model)
        size[on] = saved_bytes(model.train(), tokens())
    assert size[True] < size[False] / 2


def test_pefts_layer_is_the_one_over_bitsandbytes():
    model = get_peft_model(fp.quantize(case("LlamaForCausalLM")), LoraConfig(r=4, target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.bnb.Linear4bit


def test_a_folder_of_bitsandbytes_becomes_ours(tmp_path):
    theirs = stock(case("GPT2LMHeadModel"), tmp_path / "dense")
    theirs.save_pretrained(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False))
    report = fp.apply(model)
    assert {row.path for row in report.layers} == {"fast"}
    layer = model.base_model.model.transformer.h[0].attn.c_attn.base_layer
    ours = fp.quantize(case("GPT2LMHeadModel")).transformer.h[0].attn.c_attn
    assert isinstance(layer, Linear4bit)
    assert_same_bytes(layer, ours)


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # not to be found, not to be imported
import torch, transformers, fastpeft as fp
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
settings = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
model = fp.quantize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, num_key_value_heads=2)))
assert not any(hasattr(model, name) for name in ("is_loaded_in_4bit", "hf_quantizer", "quantization_method"))
model.save_pretrained(sys.argv[1])
model.num_parameters(), model.get_memory_footprint()
model = prepare_model_for_kbit_training(model)
model.gradient_checkpointing_enable()
model.enable_input_require_grads()
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
report = fp.apply(model)
assert {row.path for row in report.layers} == {"fast"}, report
ids = torch.arange(3, 21).view(2, 9)
model.train()(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
model.half()
assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.base_layer, fp.nn.Linear4bit)
"""


def test_without_bitsandbytes(tmp_path):
    """All but transformers' flags, which would make it import bitsandbytes; the folder loads where that is installed."""
    subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], check=True, timeout=300)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(packed(loaded)) == 14 and linear(loaded) == {"lm_head"}
