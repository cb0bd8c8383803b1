"""README.md of an export: a model card as the hubs read it, and how the model was made and is used.

Everything in it comes from the run's record, the base's manifest and data/models.lock. It names no path of this machine,
so that equal runs give equal bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.common.commands import make
from train.common.files import write_text
from train.data.checked.conversations import training_data
from train.data.origins.sources import short_name
from train.data.tokens.chat_template import DEFAULT_SYSTEM
from train.model.architecture import STORED
from train.model.catalogue import LOCK, OWNER, find_published, read_entries
from train.model.folder import read_manifest
from train.model.peft_file import TITLES

README = "README.md"
HUB = "https://huggingface.co"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
PACKED_BASE = "base"  # folder of the base in an export with FORMAT=gptq
SAMPLE = 200  # conversations whose texts tell the languages
MADE_HERE = re.compile(r"(-Qwen[12])?(-GPTQ)?-Int[48]$")  # what `quantize` adds to a name
# of methods that have not both: key of the recipe -> its name in a card
OWN_KEYS: dict[str, dict[str, str]] = {"full": {}, "ia3": {}, "vera": {"rank": "r"}, "lokr": {"rank": "r"}}
KNOWN_LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # name in the lock -> identifier of the hubs


@dataclass(frozen=True)
class CardSource:
    """What a card tells of.

    contents: merged, full (every weight was trained), adapter, packed (the base that was trained on, with the adapter beside it), gguf (the merged model
        as one GGUF file) or gguf_lora (the base and the adapter as GGUF files).
    options: of the export command, beside run=. use: title of a program -> the lines with which it uses the folder.
    parity: the passport in a line (see passport.py); empty where none was issued.
    """

    record: dict[str, Any]
    base: Path
    contents: str
    options: dict[str, str]
    use: dict[str, str]
    parity: str = ""


def base_id(base: Path) -> str:
    """The id on a hub of the model in a folder, or of the float model that it was made from; else the folder's name."""
    origin = (read_manifest(base) or {}).get("source", {})
    if "hub" in origin:
        return str(origin["hub"])
    if "run" in origin:  # the model of a run that trained every weight
        return str(origin["run"])
    entries, published = read_entries(LOCK)
    if "folder" not in origin and (found := find_published(base.name, published)):  # not one that was made here
        return found.hub
    name = MADE_HERE.sub("", base.name)
    if converted := re.search(r"-Qwen[12]-", base.name):  # the hub's model has other names of its linears
        return base.name if converted else name
    if found := find_published(name, published):
        return found.hub
    return f"{OWNER}/{name}" if name in entries else base.name


def license_of(base: Path) -> tuple[str, str]:
    """(name of the base's licence, where its text is); empty where that is not known."""
    entries, published = read_entries(LOCK)
    name = MADE_HERE.sub("", base.name)
    found = find_published(base.name, published) or find_published(name, published)
    known = (read_manifest(base) or {}).get("license") or (found.license if found else "")
    known = known or (entries.get(name) or {}).get("license", "")
    beside = next((file for file in LICENSE_FILES if (base / file).is_file()), "")
    link = beside or (f"{HUB}/{found.hub}/blob/main/LICENSE" if found else "")
    return str(known), link


def languages(texts: Sequence[str]) -> list[str]:
    """zh and en, where a tenth of the letters of these texts are of that language's script."""
    joined = "".join(texts)
    chinese, latin = len(re.findall(r"[\u4e00-\u9fff]", joined)), len(re.findall(r"[A-Za-z]", joined))
    total = max(chinese + latin, 1)
    return [name for name, count in (("zh", 5 * chinese), ("en", latin)) if count > 0.1 * total]


def write_card(folder: Path, source: CardSource) -> None:
    """Write README.md into `folder`."""
    head = yaml.safe_dump(metadata(source), sort_keys=False, allow_unicode=True, width=1000)
    write_text(folder / README, f"---\n{head}---\n\n{_text(source)}")


def metadata(source: CardSource) -> dict[str, Any]:
    """The YAML at the top of a card, as the hubs define it."""
    name, link = license_of(source.base)
    identifier = KNOWN_LICENSES.get(name, "other")
    if source.contents == "packed" and link in LICENSE_FILES:
        link = f"{PACKED_BASE}/{link}"  # the card is beside the folder of the base, which has the file
    card: dict[str, Any] = {"license": identifier} if name or link else {}
    if name and identifier == "other":
        card["license_name"] = name.lower().replace(" ", "-")
    if link:
        card["license_link"] = link
    relation = "finetune" if source.contents in ("merged", "full", "gguf") else "adapter"
    if "/" in (base := base_id(source.base)):  # a hub takes nothing but ids
        card |= {"base_model": base, "base_model_relation": relation}
    if datasets := _datasets(str(source.record["data"]["path"])):
        card["datasets"] = datasets
    if found := languages(_sample(source.record)):
        card["language"] = found
    recipe = source.record["recipe"]
    tags = ["qwen", "chat"] if _is_full(recipe) else ["qwen", _kind(recipe).lower(), "chat"]
    library = "peft" if relation == "adapter" else "transformers"
    if source.contents.startswith("gguf"):
        library, tags = "gguf", [*tags, "gguf"]
    card |= {"pipeline_tag": "text-generation", "library_name": library, "tags": tags}
    if metrics := _metrics(source.record):
        task = {"type": "text-generation", "name": "Text generation"}
        dataset = {"name": short_name(source.record["data"]["path"]), "type": "conversations"}
        result = {"task": task, "dataset": dataset, "metrics": metrics}
        card["model-index"] = [{"name": source.record["run"], "results": [result]}]
    return card


def _datasets(data: str) -> list[str]:
    """The ids of the hub's data sets among the parts of DATA."""
    return re.findall(r"(?:^|[,\s])hub:([^:@#,\s]+/[^:@#/,\s]+)", data)


def _sample(record: dict[str, Any]) -> list[str]:
    conversations, _ = training_data(record)
    return [turn.text for conversation in conversations[:SAMPLE] for turn in conversation.turns]


def _metrics(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What the run measured: on conversations that were held out, or else the loss of training."""
    if held_out := record.get("held_out"):
        loss, count = held_out["loss"], held_out["conversations"]
        kept = loss.get("best") is not None and held_out.get("adapter_step") == held_out.get("best_step")
        values = {"before training": loss["before"], "after training": loss["best" if kept else "last"]}
        where = f"{count} held-out conversations"
    else:
        loss = record.get("loss", {})
        values, where = {"last epoch": loss.get("last_epoch")}, "the training data"
    named = {f"Loss on {where}, {when}": value for when, value in values.items() if value is not None}
    return [{"type": "loss", "name": name, "value": round(float(value), 4)} for name, value in named.items()]


def _text(source: CardSource) -> str:
    record, recipe = source.record, source.record["recipe"]
    base = base_id(source.base)
    gguf = (
        "every weight was trained"
        if _is_full(recipe)
        else f"the {_kind(recipe)} adapter is merged into the weights of its base"
    )
    kind = {
        "full": "A fine-tuned model: every weight of its base was trained.",
        "merged": f"A fine-tuned model: the {_kind(recipe)} adapter is merged into the weights of its base.",
        "adapter": f"A{'n' if _kind(recipe) == 'IA3' else ''} {_kind(recipe)} adapter for its base.",
        "packed": "A LoRA adapter, and the packed base that it was trained on, with unchanged codes.",
        "gguf": f"A fine-tuned model as a GGUF file: {gguf}.",
        "gguf_lora": "GGUF files of the Int4 base that was trained on, with its very weights as Q4_0, and of a LoRA adapter.",
    }[source.contents]
    trained = f", trained as {source.base.name}" if not base.endswith(source.base.name) else ""
    lines = [f"# {record['run']}", "", kind, "", f"* base: {base}{trained}"]
    lines += [f"* data: {short_name(record['data']['path'])}, sha256 {record['data']['sha256']}"]
    lines += [_training(record, recipe), _prompt(recipe)]
    lines += [f"* {one['name'].lower()}: {one['value']}" for one in _metrics(record)]
    lines += [f"* {source.parity}"] if source.parity else []
    lines += ["", "## Use", ""]
    for program, command in source.use.items():
        lines += [f"{program}:", "", *(f"    {line}" for line in command.split("\n")), ""]
    return "\n".join([*lines, "## Make it again", "", *_again(source), ""])


def _is_full(recipe: dict[str, Any]) -> bool:
    """Whether every weight was trained; an older program had no such key."""
    return recipe.get("method") == "full"


def _kind(recipe: dict[str, Any]) -> str:
    """The family of an adapter: LoRA, or another method of peft; an older program had no such key."""
    return TITLES.get(recipe.get("method", ""), "LoRA")


def _training(record: dict[str, Any], recipe: dict[str, Any]) -> str:
    known = OWN_KEYS.get(recipe.get("method", ""), {"rank": "r", "alpha": "alpha"})
    known |= {"learning_rate": "learning rate", "epochs": "epochs", "seed": "seed"}
    settings = ", ".join(f"{name} {recipe[key]}" for key, name in known.items() if key in recipe)
    settings += f", B's rate {recipe['lora_plus']:g} times that (LoRA+)" if recipe.get("lora_plus", 1) != 1 else ""
    settings += f", NEFTune {recipe['neftune']:g}" if recipe.get("neftune") else ""
    steps = f", {record['steps']} steps" if "steps" in record else ""
    method = "all weights" if _is_full(recipe) else "rsLoRA" if recipe.get("rslora") else _kind(recipe)
    method = f"DoRA ({method})" if recipe.get("dora") else method
    method += {"olora": " begun as OLoRA", "pissa": " begun as PiSSA"}.get(recipe.get("start", ""), "")
    method += f" on the base loaded as {recipe['load_as']}" if recipe.get("load_as", STORED) != STORED else ""
    return f"* training: {method}, {settings}{steps}, {record['tokens']:,} tokens"


def _prompt(recipe: dict[str, Any]) -> str:
    system = recipe.get("system", DEFAULT_SYSTEM)
    said = f"system message {system!r}" if system else "no system message"
    return f"* prompt: {recipe.get('template', 'chatml')}, {said}: the default of the chat template"


def _again(source: CardSource) -> list[str]:
    """The commands, for the same program: the recipe is beside the run, and in run.json."""
    record = source.record
    code = record["code"]
    commit = f", commit {code['commit']}" if code.get("commit") else ""
    data, run = short_name(record["data"]["path"]), record["run"]
    own = "run" in (read_manifest(source.base) or {}).get("source", {})  # the model of a run, which its recipe names
    commands = [
        make("train", data=data, model="" if own else source.base.name, recipe=f"runs/{run}/recipe.yaml", run=run),
        make("export", run=run, **source.options),
    ]
    return [f"With version {code['version']}{commit} of the program:", "", *(f"    {line}" for line in commands)]
