"""Loading encoders with a task's head, whole and checked, and finished models with their probes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from raybert.compressed import COMPRESSED, STOCK, finished, longest_input, replay
from raybert.config import DataConfig
from raybert.errors import UserError
from raybert.method import ROUNDING, MethodConfig
from raybert.places import uri_of
from raybert.storage import nothing_at, path_of, pull
from raybert.surgery import COMPRESSED_PREFIX, FAMILIES, family, model_inputs
from raybert.trust import check_weights, checked_config, first_sentence

HEADS = {
    "classification": AutoModelForSequenceClassification,
    "multilabel": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}
"""A task's kind -> the auto class of its head."""

PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}

ENDS = 2
"""Numbers that a head for question answering gives for a token: is it the answer's first, its
last."""

_ARCHITECTURES = {
    "classification": "ForSequenceClassification",
    "multilabel": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "qa": "ForQuestionAnswering",
    "mlm": "ForMaskedLM",
}

TEXT_FILES = ("*.json", "*.txt")
"""Of a Hub model's files, those that hold its config and tokenizer."""

PROBE = "probe.safetensors"
"""Inputs and the logits they must give, beside the weights; see `load`."""


def read_config(name: str) -> Any:
    """The Hugging Face config of a hub name or local folder.

    Raises:
        UserError: not a model folder, no such hub model, or a family that raybert does not know.
    """
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"{name} is not a model folder: it holds no config.json. Give the folder that "
            "save_pretrained wrote, or a run folder with a finished model."
        )
    if not path.exists():
        _check_hub_name(name)
    try:
        place = str(path) if path.exists() else name
        # Said outright: else transformers may ask whether to run the folder's own code.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    # A damaged or hostile file makes the library raise a dozen unrelated types.
    except Exception as error:
        raise UserError(
            f"model {name!r} cannot be read: {first_sentence(error)} Give an existing folder, "
            "or the name of a model on the Hugging Face Hub."
        ) from None
    if family(config) not in FAMILIES:
        raise UserError(
            f"{name} is a {config.model_type!r} model; raybert knows {', '.join(FAMILIES)} "
            "(MiniLM and TinyBERT are bert)."
        )
    return checked_config(name, config)


def _check_hub_name(name: str) -> None:
    """Refuse what is no folder, nor can be a model of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"model {name!r} cannot be read: there is no such folder, and no model of the Hugging "
            "Face Hub can be called so. Give an existing folder, or the name of a model on the Hub."
        ) from None


def check_head(name: str, config: Any, task: Any) -> None:
    """Refuse a fine-tuned model whose head is not the one that the task asks for.

    Args:
        name: what to call the model.
        config: its Hugging Face config.
        task: a `raybert.tasks.Task` with its labels settled.

    Raises:
        UserError: no head, one of another kind or size, or labels in another order.
    """
    architecture = (config.architectures or ["a model without a head"])[0]
    if not architecture.endswith(_ARCHITECTURES[task.kind]):
        raise UserError(
            f"{name} is {architecture}: it was not fine-tuned for {task.name} ({task.kind}). "
            f"Fine-tune "
            "it on this task first, or name it as `model` instead of `teacher`."
        )
    if task.kind not in PROBLEMS:
        return
    problem = PROBLEMS[task.kind]
    if config.num_labels != task.num_labels or config.problem_type not in (None, problem):
        raise UserError(
            f"{name} has a head of {config.num_labels} outputs "
            f"({config.problem_type or 'of no stated kind'}); task {task.name} ({task.kind}) needs "
            f"{task.num_labels} ({problem}). Fine-tune it on this task first, or name it as "
            "`model` instead of `teacher`."
        )
    wanted = {label.casefold(): label for label in task.labels or ()}
    own = [str(config.id2label[i]).casefold() for i in range(config.num_labels)]
    if own != list(wanted) and sorted(own) == sorted(wanted):
        order = [wanted[label] for label in own]
        raise UserError(
            f"{name} has the labels in the order {', '.join(order)}; task {task.name} has them as "
            f"{', '.join(wanted.values())}. Say data.labels=[{','.join(order)}]."
        )


def check_length(data: DataConfig, config: Any, source: str) -> None:
    """Refuse rows that are longer than a model can read.

    Raises:
        UserError: ``data.max_length`` is more than its config allows.
    """
    longest = longest_input(config)
    if data.max_length > longest:
        raise UserError(
            f"data.max_length {data.max_length} is more than {source} can read; use at most "
            f"{longest}."
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub name or folder.

    Raises:
        UserError: there is none.
    """
    try:
        place = str(Path(name).expanduser())
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer("a", "b")  # one whose parts do not fit together loads, and fails at work
    except Exception as error:  # as in read_config
        raise UserError(f"no tokenizer in {name!r}: {first_sentence(error)}") from None
    # Without any of its files transformers makes one up that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"no tokenizer in {name!r}: it holds neither tokenizer.json nor a vocabulary. Copy "
            "them from the model that it was made of."
        )
    return tokenizer


def load_for_task(
    name: str,
    task: Any,
    *,
    seed: int,
    attention: str = "sdpa",
    dropout: float | None = None,
    new_head: bool = True,
) -> tuple[PreTrainedModel, list[str]]:
    """A model with the head that the task asks for, in float32.

    Args:
        name: hub name or folder.
        task: a `raybert.tasks.Task` with its labels settled.
        seed: of weights that the checkpoint does not have (a new head).
        attention: ``sdpa``, or ``eager`` where attention is to be read.
        dropout: replaces the model's own dropout rates.
        new_head: whether a head that does not fit may be replaced by a new one; a teacher's may
            not.

    Returns:
        The model in evaluation mode, and the names of the weights that are new.

    Raises:
        UserError: the folder is no model, or its head does not fit the task and must not be
            replaced.
    """
    config = read_config(name)
    if not new_head:
        check_head(name, config, task)
    set_labels(config, task)
    if task.kind in PROBLEMS:
        config.problem_type = PROBLEMS[task.kind]
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
    if dropout is not None:
        _set_dropout(config, dropout)
    torch.manual_seed(seed)
    try:
        model, info = HEADS[task.kind].from_pretrained(
            str(Path(name).expanduser()),
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=new_head,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # as in read_config
        raise UserError(f"model {name!r} cannot be loaded: {first_sentence(error)}") from None
    new = sorted(set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]})
    inner = f"{FAMILIES[family(config)]}."
    lost = [key for key in new if key.startswith(inner) and not key.startswith(f"{inner}pooler.")]
    if lost:  # transformers would make them up
        raise UserError(
            f"{name} lacks weights of its encoder, or has them in another size than its "
            f"config.json says: {', '.join(lost[:3])}. Copy the whole model again."
        )
    if new and not new_head:
        raise UserError(
            f"{name} lacks the weights {', '.join(new[:3])}: it was not fine-tuned for {task.name} "
            f"({task.kind}). Name a fine-tuned model as teacher, or name it as `model` instead."
        )
    return model.eval(), new


def take_head(model: PreTrainedModel, new: list[str], teacher: str, task: Any) -> list[str]:
    """Give a student that has no pooler, as a language model has none, its teacher's, and with it
    the head that was trained on it.

    Args:
        model: the student.
        new: its weights that are new.
        teacher: hub name or folder of a model with the task's head.
        task: see `load_for_task`.

    Returns:
        The names of the weights that were taken over.
    """
    if not any(".pooler." in name for name in new):
        return []
    known = load_for_task(teacher, task, seed=0, new_head=False)[0].state_dict()
    own = model.state_dict()
    lent = [name for name in new if name in known and known[name].shape == own[name].shape]
    model.load_state_dict({name: known[name] for name in lent}, strict=False)
    return lent


def set_labels(config: Any, task: Any) -> None:
    """Give a config as many labels as the task's head has: of another task it may have others."""
    if task.kind in PROBLEMS:
        config.num_labels = task.num_labels
    elif task.kind == "qa":
        config.num_labels = ENDS


def _set_dropout(config: Any, dropout: float) -> None:
    names = (
        ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout")
        if family(config) == "distilbert"
        else ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    )
    for name in names:
        setattr(config, name, dropout)


def blank(config: Any, kind: str, chain: list[MethodConfig]) -> PreTrainedModel:
    """The finished structure without weights, on the meta device, to be counted and not run.

    Args:
        config: the Hugging Face config of the model to start from.
        kind: the task's kind, which decides the head.
        chain: resolved methods.
    """
    with torch.device("meta"):
        try:
            model = HEADS[kind].from_config(copy.deepcopy(config), trust_remote_code=False)
        except Exception as error:  # as in read_config
            raise UserError(
                f"no model can be built of this config.json: {first_sentence(error)} Copy it again "
                "from the model's source."
            ) from None
        replay(model, chain)
    return model.eval()


def load(folder: str | Path, *, verify: bool = True, attention: str = "sdpa") -> PreTrainedModel:
    """Load a finished model, compressed or plain, in evaluation mode and in float32.

    A model that was stored in half precision is computed in float32 too: students are, so what is
    timed beside them must be, and processors that only emulate half precision are slow at it.

    Args:
        folder: a model folder, or a run folder (its ``model`` is taken).
        verify: run the stored probe inputs and compare with the stored logits, so that a library
            upgrade that changes results is caught.
        attention: attention implementation, ``sdpa`` or ``eager``.

    Raises:
        UserError: not a model folder, or its outputs are no longer what they were.
    """
    path = model_folder(folder)
    config = read_config(str(path))
    check_weights(str(path))
    name = (config.architectures or [""])[0].removeprefix("Compressed")
    stock = {c.__name__: c for classes in STOCK.values() for c in classes}
    if name not in stock:
        raise UserError(
            f"{path} holds a {name or 'model without an architecture'}; raybert loads models "
            f"with one "
            f"of these heads: {', '.join(stock)}."
        )
    model_class = (
        COMPRESSED[name] if config.model_type.startswith(COMPRESSED_PREFIX) else stock[name]
    )
    try:
        loaded: Any = model_class.from_pretrained(
            path,
            attn_implementation=attention,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # as in read_config
        raise UserError(f"{path} cannot be loaded: {first_sentence(error)}") from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would make them up
        raise UserError(
            f"{path} lacks the weights {', '.join(missing[:3])}: the folder was damaged, or its "
            "config.json is another model's. Copy it again."
        )
    model.eval()
    if verify and (path / PROBE).is_file():
        verify_probe(model, path)
    return model


def model_folder(folder: str | Path) -> Path:
    """The model folder of a run folder or of itself, brought here from object storage.

    Raises:
        UserError: the run is not finished, or there is no model.
    """
    path = path_of(folder)
    if uri_of(path) is not None:
        _bring(path)
    if not (path / "recipe.yaml").is_file():
        return path
    if not (path / "model" / "config.json").is_file():
        raise UserError(
            f"{path} is a run that has not finished: it has no model yet. Start its command "
            f"again; it "
            "continues where it was last saved."
        )
    return path / "model"


def revision_of(name: str) -> str:
    """The commit of a Hub model, as it is found here or on the Hub.

    Raises:
        UserError: there is no such model.
    """
    try:
        return Path(hf_hub_download(name, "config.json")).parent.name
    except Exception as error:  # as in `brought_here`
        raise UserError(f"no model {name!r}: {first_sentence(error)}") from None


def brought_here(name: str | Path) -> Path:
    """The folder of a model by its name; one of the Hub is brought here, or found where it was.

    Raises:
        UserError: there is no such model here, and the Hub gives none.
    """
    path = model_folder(name)
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} holds no model: it has no config.json.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*TEXT_FILES, "*.safetensors"]))
    except Exception as error:  # of the network, of the name, of the cache
        raise UserError(f"no model {str(name)!r} to measure: {first_sentence(error)}") from None


def _bring(path: Path) -> None:
    """Bring what of a run or model folder a model's reader looks at."""
    if not pull(path, deep=False):
        raise nothing_at(path)
    if (path / "recipe.yaml").is_file():
        pull(path / "model")
    elif uri_of(path.parent) is not None:
        for name in ("recipe.yaml", "report.json"):  # tell what a run's model was made of
            pull(path.parent / name)


def write_probe(model: PreTrainedModel, folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """Store a few inputs with the outputs that the model gives for them.

    Args:
        model: in evaluation mode.
        folder: the model folder.
        batch: holds input_ids, attention_mask and, where the model takes them, token_type_ids,
            [B, T].

    Raises:
        UserError: an output is no number.
    """
    inputs = {key: values.cpu().contiguous() for key, values in model_inputs(model, batch).items()}
    expected = _probe_output(model, inputs)
    if not expected.isfinite().all():
        raise UserError(
            "the trained model gives outputs that are no numbers, so its training has diverged "
            "though its losses were numbers. Begin anew, under another out=, with a lower "
            "train.lr or a method's own lr."
        )
    save_file({**inputs, "expected": expected}, folder / PROBE)


def verify_probe(model: PreTrainedModel, folder: Path) -> None:
    """Compare the model's outputs on the stored inputs with the stored ones.

    Raises:
        UserError: they differ by more than float32 rounding explains.
    """
    stored = load_file(folder / PROBE)
    expected = stored.pop("expected")
    found = _probe_output(model, stored)
    worst = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    allowed = max([ROUNDING, *(method.rounding for method in finished(model.config))])
    if not worst <= allowed * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"{folder} gives other outputs than when it was made (largest difference "
            f"{worst:.2g}): the "
            "weights were damaged, or a library changed its results. Compare the versions in its "
            "README.md, or load with verify=False if you know why."
        )


def _probe_output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model(**{k: v.to(device) for k, v in inputs.items()})
    # A few of a vocabulary's columns tell as much as thirty thousand.
    return out[0][..., :16].float().cpu().contiguous()
