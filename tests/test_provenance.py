"""Provenance of adapters: metadata and card match the run, and mismatched adapters and base models are found."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from programs import run_program, short_run
from safetensors.numpy import load_file, save_file

import jlora
from jlora.adapters import provenance
from jlora.adapters.provenance import WEIGHTS
from jlora.bases import hashes
from jlora.cli.export import main
from jlora.common.errors import UserError
from jlora.config.schema import MAY_CHANGE_ON_RESUME
from jlora.data.conversation import Message
from jlora.data.named_templates import TEMPLATES
from jlora.data.readers import files
from jlora.data.tokenizer import load_tokenizer
from jlora.export.exporter import export_adapter
from jlora.serve import loading
from jlora.training.checkpoint import read_record

SYSTEM = 'Be "brief":\n```'


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny):
    """A base model for this module; tests change copies of it."""
    return shutil.copytree(tiny, tmp_path_factory.mktemp("provenance") / "base")


@pytest.fixture(scope="module")
def run(base, pairs):
    """A run of two steps with held-out rows, a system prompt, and its own chat template file."""
    root = base.parent
    (root / "own.jinja").write_text(TEMPLATES["alpaca"])
    own = {"chat_template": str(root / "own.jinja"), "system_prompt": SYSTEM, "eval_share": 0.2}
    settings = short_run(base, pairs, root / "run", max_steps=2, save_steps=1, eval_steps=2, learning_rate=1e-2, **own)
    (root / "run.yaml").write_text(json.dumps(settings))
    done = run_program("jlora.train", "--config", root / "run.yaml")
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="module")
def plain(run, base):
    """The same arrays, as if trained without system prompt and with the base model's chat template."""
    other = shutil.copytree(run, base.parent / "plain")
    record = json.loads((other / "config.json").read_text())
    record["config"] |= {"chat_template": "", "system_prompt": ""}
    record["data"]["template"] = hashes.template_source_hash(load_tokenizer(base, ""))
    (other / "config.json").write_text(json.dumps(record))
    export_adapter(other, other / "one", 1)
    return other / "one"


def test_metadata_and_card_match_the_run(run, plain, pairs):
    noted, record = provenance.metadata(run / "adapter" / WEIGHTS), read_record(run, "--run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert [noted[key] for key in (provenance.BASE_LOSS, provenance.LOSS)] == [f"{losses[n]:.4f}" for n in (0, 2)]
    assert (noted[provenance.STEP], noted[provenance.VERSION]) == ("2", jlora.__version__)
    assert noted[provenance.DATA] == files.hash_files(str(pairs), "train_data_dir")
    settings = json.loads(noted[provenance.CONFIG])
    recorded = json.loads(json.dumps(record["config"]))  # tuples are lists in JSON
    assert settings == {key: value for key, value in recorded.items() if key not in MAY_CHANGE_ON_RESUME}
    card = (run / "adapter/README.md").read_text()
    assert (
        f"Held-out loss: {losses[0]:.4f} for the base model, {losses[2]:.4f} with the adapter (nats per token)." in card
    )
    for key in (provenance.TENSORS, provenance.BASE, provenance.TOKENIZER, provenance.TEMPLATE, provenance.DATA):
        assert len(noted[key]) == 64 and f"`{noted[key]}`" in card
    changed = json.loads(card.split("```json\n")[1].split("\n```\n")[0])
    names = {key: Path(value).name if str(value).startswith("/") else value for key, value in settings.items()}
    assert changed.items() <= names.items() and changed["system_prompt"] == SYSTEM and "adam_beta1" not in changed
    assert provenance.LOSS not in provenance.metadata(plain / WEIGHTS)  # of step 1, which was not evaluated
    assert str(run.parent) not in card and "/" not in changed["base_model"]  # no path of this machine
    assert "The held-out loss was not measured at this step." in (plain / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own template and system prompt", "the base's template", "text without roles"])
def test_the_cards_snippet_answers_as_jlora_does(run, plain, base, kind, monkeypatch, capsys, tmp_path):
    adapter, asked = plain, (Message("user", "Your question?"),)
    if kind.startswith("own"):
        adapter, asked = run / "adapter", (Message("system", SYSTEM), *asked)
    if kind.startswith("text"):
        other = shutil.copytree(plain.parent, tmp_path / "run")
        edit(other / "config.json", lambda record: record["config"].update(task_type="plain-text"))
        export_adapter(other, adapter := tmp_path / "text", 1)
        asked = (Message("text", "Your text begins"),)
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("\n```\n")[0]
    monkeypatch.chdir(adapter)
    exec(
        compile(
            code.replace("max_new_tokens=200", "max_new_tokens=12").replace("PATH/OF/THE/BASE/MODEL", str(base)),
            "README.md",
            "exec",
        ),
        {},
    )
    generator, adapters = loading.load_model(str(base), {"adapter": adapter})
    said = "".join(generator.generate_text(adapters.select(["adapter"]), asked, max_new_tokens=12))
    assert capsys.readouterr().out.strip("\n") == said.strip("\n") and said.strip()


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def other_weights(base):
    tensors = {name: 1.05 * value for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(base):
    edit(base / "tokenizer.json", lambda file: file.update(normalizer={"type": "Lowercase"}))


def other_template(base):
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(text.replace("<|im_start|>", "<|start|>"))


CHANGES = {"base model weights": other_weights, "tokenizer": other_tokenizer, "chat template": other_template}


@pytest.mark.parametrize("part", CHANGES)
def test_the_check_names_the_part_that_changed(plain, run, base, tmp_path, part, capsys):
    other = shutil.copytree(base, tmp_path / "base")
    main(["--check", str(plain), "--base", str(other)])
    said = capsys.readouterr().out
    assert said.count(": same (") == 3 and "shapes: compatible" in said and "different" not in said
    CHANGES[part](other)
    with pytest.raises(UserError, match=rf"do not match:\n(.*\n)*  {part}: different \(\w+ in") as error:
        main(["--check", str(plain), "--base", str(other)])
    assert str(error.value).count(": different (") == 1 and str(error.value).count(": same (") == 2
    if part == "chat template":  # irrelevant for the adapter that includes its own
        main(["--check", str(run / "adapter"), "--base", str(other)])
        assert f"start the server with {run / 'adapter/chat_template.jinja'}" in capsys.readouterr().out
    moved = shutil.copytree(plain.parent, tmp_path / "run")
    edit(moved / "config.json", lambda record: record["base"].update(directory=str(other)))
    with pytest.raises(UserError, match=rf"has changed since the run was trained: .*{part.split()[-1]}"):
        export_adapter(moved, tmp_path / "made", 1)
    assert not (tmp_path / "made").exists()


def test_the_exit_code_of_the_check(plain, base, smollm):
    done = run_program("jlora.export", "--check", plain, "--base", base)
    assert done.returncode == 0 and done.stdout.count(": same (") == 3, done.stderr
    done = run_program("jlora.export", "--check", plain, "--base", smollm)
    assert done.returncode == 2 and "base model weights: different" in done.stderr and "Traceback" not in done.stderr
    assert "tokenizer: different" in done.stderr and "has shape" in done.stderr


def test_the_template_hash_depends_on_the_rendered_text_but_not_the_date(base):
    tokenizer = load_tokenizer(base, "")

    def rendered(template):
        tokenizer.chat_template = template
        return hashes.rendered_template_hash(tokenizer)

    loop = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert rendered(loop) == rendered("{# the same #}" + loop.replace("m.role", "m['role']")) != ""
    assert rendered(loop) != rendered(loop + "{{ bos_token }}") and rendered(loop) != rendered(loop.replace(": ", ":"))
    assert rendered(loop) != rendered(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + loop
    )
    assert rendered("{{ strftime_now('%d %b') }}" + loop) == rendered("%d %b" + loop)
    assert rendered("") == ""
    assert hashes.tokenizer_hash(tokenizer) == hashes.tokenizer_hash(load_tokenizer(base, ""))


def test_an_adapter_from_peft_is_checked_by_its_shapes(base, smollm, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    main(["--check", str(tmp_path / "peft"), "--base", str(base)])
    said = capsys.readouterr().out
    assert (
        said.count("unknown, because the adapter file does not record its hash") == 3 and "shapes: compatible" in said
    )
    with pytest.raises(UserError, match=r"belongs to another base.* has shape"):
        main(["--check", str(tmp_path / "peft"), "--base", str(smollm)])
    with pytest.raises(UserError, match=r"Expected a directory with adapter_config.json"):
        main(["--check", str(tmp_path), "--base", str(base)])
    with pytest.raises(SystemExit):
        main(["--check", str(tmp_path)])
    assert "--check ADAPTER requires --base" in capsys.readouterr().err
