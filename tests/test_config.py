"""Configs: both kinds of file, overrides, and all mistakes in one message."""

import dataclasses
import json

import pytest
from programs import run_program

from jlora.adapters.settings import spec_of
from jlora.adapters.spec import TARGETS
from jlora.common.errors import UserError
from jlora.config.files import load_config, typed
from jlora.config.schema import Config

PYTHON = """
from jlora.config.schema import default_config
def get_config():
    c = default_config()
    c.train_data_dir = "pairs"
    {line}
    return c
"""


@pytest.fixture
def python_config(tmp_path):
    def write(line="pass", text=PYTHON):
        file = tmp_path / "config.py"
        file.write_text(text.replace("{line}", line))
        return str(file)

    return write


@pytest.fixture
def yaml_config(tmp_path):
    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text("train_data_dir: pairs\n" + text)
        return str(file)

    return write


def test_python_config_and_overrides(python_config):
    file = python_config("c.lora_rank = 8")
    overrides = [
        "--config.learning_rate=1e-4",
        "--config.target_modules=('k_proj', 'o_proj')",
        "--config.epochs",
        "2",
    ]
    config = load_config(file, overrides)
    assert (config.lora_rank, config.learning_rate, config.epochs) == (8, 1e-4, 2.0)
    assert config.target_modules == ("k_proj", "o_proj")
    assert config.pii_regions == ("CN", "US")
    assert load_config(file, ["--config.pii_regions=DE,GB"]).pii_regions == ("DE", "GB")
    assert load_config(file, ["--config.pii_regions="]).pii_regions == ()
    assert load_config(file, ["--config.base_model=owner/name=x"]).base_model == "owner/name=x"
    for given, expected in {"true": "auto", "false": "", "auto": "auto", "some/run": "some/run"}.items():
        assert load_config(file, [f"--config.resume_from_checkpoint={given}"]).resume_from_checkpoint == expected


def test_columns_and_prefixes_from_every_kind_of_config(python_config, yaml_config):
    want = {"prompt": "q", "response": "2"}
    assert load_config(python_config(f"c.columns = {want}"), []).columns == want
    assert load_config(yaml_config("columns: {prompt: q, response: 2}\n"), []).columns == want
    assert load_config(python_config(), ["--config.columns={prompt: q, response: 2}"]).columns == want
    prefixes = {"user": "Client|Q.", "assistant": "Counsel"}
    assert load_config(python_config(f"c.role_prefixes = {prefixes}"), []).role_prefixes == prefixes
    assert load_config(python_config(), []).columns == {}


def test_mesh_from_every_kind_of_config(python_config, yaml_config):
    for config in (
        load_config(python_config("c.mesh = {'fsdp': 8}"), []),
        load_config(yaml_config("mesh: {fsdp: 8}\n"), []),
        load_config(python_config(), ["--config.mesh={fsdp: 8}"]),
    ):
        assert config.mesh == {"fsdp": 8}
    assert load_config(python_config(), []).mesh == {"data": -1, "fsdp": 1, "tensor": 1}


def test_yaml_values_are_converted(yaml_config):
    config = load_config(
        yaml_config("learning_rate: 1e-4\nfp16: true\ntarget_modules: q_proj, v_proj\nresume_from_checkpoint: true\n"),
        [],
    )
    assert config.learning_rate == 1e-4 and config.fp16 is True  # YAML itself reads 1e-4 as text
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.resume_from_checkpoint == "auto"
    assert load_config(yaml_config("resume_from_checkpoint: false\nmetadata_path:\n"), []).resume_from_checkpoint == ""


def test_patterns_and_layers_are_read_from_every_form(yaml_config, python_config):
    want = (("layers.1.mlp.up_proj", 4), ("q_proj", 2)), (0, 2)
    text = "rank_pattern: {layers.1.mlp.up_proj: 4, q_proj: 2}\nlayers_to_transform: [0, 2]\n"
    line = "c.rank_pattern = ('layers.1.mlp.up_proj=4', 'q_proj=2'); c.layers_to_transform = (0, 2)"
    layers, more = "layers_to_transform: [0, 2]\n", "c.layers_to_transform = ['0', '2']"
    overrides = ["--config.rank_pattern={layers.1.mlp.up_proj: 4, q_proj: 2}", "--config.layers_to_transform=0,2"]
    for config in (
        load_config(yaml_config(text), []),
        load_config(yaml_config("rank_pattern: [layers.1.mlp.up_proj=4, q_proj=2]\nlayers_to_transform: 0, 2\n"), []),
        load_config(yaml_config("rank_pattern: layers.1.mlp.up_proj=4, q_proj=2\nlayers_to_transform: '0 2'\n"), []),
        load_config(yaml_config("rank_pattern: [[layers.1.mlp.up_proj, 4], [q_proj, 2]]\n" + layers), []),
        load_config(python_config(line), []),
        load_config(python_config("c.rank_pattern = ['layers.1.mlp.up_proj=4', ('q_proj', 2)]\n    " + more), []),
        load_config(python_config(), overrides),
        load_config(python_config(), ["--config.rank_pattern=layers.1.mlp.up_proj=4,q_proj=2", overrides[1]]),
    ):
        assert (config.rank_pattern, config.layers_to_transform) == want
    config = load_config(
        yaml_config("target_modules: all-linear\ninit_lora_weights: true\nlayers_to_transform: 1\n"), []
    )
    assert config.target_modules == ("all-linear",) and config.init_lora_weights == "true"
    assert config.layers_to_transform == (1,)
    alphas = load_config(yaml_config("alpha_pattern: {v_proj: 3, a=b: 2.5}\n"), []).alpha_pattern
    assert alphas == (("v_proj", 3.0), ("a=b", 2.5)) and all(type(alpha) is float for _, alpha in alphas)
    adapter = spec_of(dataclasses.asdict(config))
    assert adapter.target_modules == TARGETS and adapter.layers_to_transform == (1,)


def test_settings_of_a_run_of_any_version_are_read_as_they_were(yaml_config):
    text = "rank_pattern: {q_proj: 2}\nalpha_pattern: {v_proj: 2.5}\nlayers_to_transform: [0, 2]\n"
    config = dataclasses.asdict(load_config(yaml_config(text), []))
    now = json.loads(json.dumps(config))
    before = now | {
        "rank_pattern": ["q_proj=2"],
        "alpha_pattern": ["v_proj=2.5"],
        "layers_to_transform": ["0", "2"],
    }
    assert typed(now) == typed(before) == (config, [])
    empty = json.dumps(dataclasses.asdict(Config()))
    assert '"rank_pattern": [], "alpha_pattern": [], "layers_to_transform": [],' in empty


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.lora_rnk = 8", r"config.py:6: .*lora_r"),
        ("c.lr = 1e-4", r"config.py:6: Unknown key 'lr'. Did you mean learning_rate\?$"),
        ("c.lora_rank = 'eight'", r"config.py:6: .*int"),
        ("c.lora_rank = 1 / 0", r"config.py:6: division by zero"),
        ("c.lora_rank = (", r"config.py"),
        ("return 3", r"must start from jlora.config.default_config\(\)"),
        (
            "c.lora_rank = 0; c.device = 'abacus'; c.lora_dropout = 1.0",
            r"(?s)3 settings are wrong:.*abacus.*rank=0.*dropout=1.0",
        ),
        ("c.target_modules = ('q_prj',)", r"target_modules has 'q_prj'. Did you mean q_proj"),
        ("c.rank_pattern = ('q_proj=0',)", r"rank_pattern has 'q_proj=0': Expected PATTERN=RANK"),
        (
            "c.rank_pattern = ('q_proj=1.5', 'q_proj')",
            r"(?s)2 settings are wrong.*'q_proj=1.5': Expected.*'q_proj': Expected",
        ),
        ("c.layers_to_transform = (-1,)", r"layers_to_transform has -1: Expected layer numbers"),
        ("c.alpha_pattern = ('(=2',)", r"alpha_pattern has '\(=2': Expected PATTERN=ALPHA"),
        ("c.layers_to_transform = ('first',)", r"layers_to_transform has 'first': Expected layer numbers"),
        ("c.modules_to_save = ('lm_hed',)", r"modules_to_save has 'lm_hed'. Did you mean lm_head"),
        ("c.target_modules = ('lm_head',); c.use_dora = True", r"has lm_head, which use_dora cannot change"),
        ("c.lora_bias = True; c.init_lora_weights = 'pissa'", r"init_lora_weights=pissa and lora_bias exclude"),
        (
            "c.modules_to_save = ('lm_head',); c.target_modules = ('lm_head',)",
            r"modules_to_save and target_modules both name lm_head. Remove it from one",
        ),
        ("c.trainable_token_indices = (3, 'x')", r"trainable_token_indices has \(3, 'x'\): Expected token ids"),
        ("c.trainable_token_indices = (1.5,)", r"trainable_token_indices has \(1.5,\): Expected token ids"),
        ("c.trainable_token_indices = (3, 3)", r"has embed_tokens: \[3, 3\]. Expected ids from 0, each once"),
        ("c.trainable_token_indices = (('lm_head', (1,)), ('lm_head', (2,)))", r"has lm_head: \[1\]. Expected ids"),
        ("c.trainable_token_indices = (('head', (1,)),)", r"has head: \[1\]. Expected ids from 0, each once, of embed"),
        ("c.init_lora_weights = 'olora'", r"init_lora_weights='olora': Expected one of true, pissa"),
        ("c.peft_type = 'IA3'; c.use_dora = True", r"use_dora=True has no effect with peft_type=IA3. Remove it"),
        (
            "c.init_adapter = 'a'; c.resume_from_checkpoint = 'b'",
            r"init_adapter and resume_from_checkpoint both set a starting point",
        ),
        ("c.train_data_dir = ''", r"train_data_dir is not set"),
        ("c.eval_share = 0.1; c.eval_data_dir = 'x'", r"eval_data_dir and eval_share are both set"),
        ("c.early_stopping_patience = 2", r"needs held-out rows"),
        ("c.max_steps = None", r"max_steps=None: Expected int"),
        ("c.epochs = float('inf')", r"epochs=inf: Expected a number above 0"),
        ("c.seed = 5_000_000_000", r"seed=5000000000: Expected a number from 0"),
        (
            "c.overlong = 'cut'; c.train_on = 'user'; c.pii = 'hide'",
            r"(?s)overlong='cut': Expected one of error, truncate, drop, split.*train_on='user'.*pii='hide'",
        ),
        ("c.pii_regions = ('China',)", r"pii_regions has 'China': Expected two-letter country codes"),
        ("c.overlong = 'split'; c.max_seq_length = 1", r"max_seq_length=1: Expected 2 or more"),
        ("c.revision = 'main'", r"revision='main' requires a hub id"),
        ("c.fp16 = True; c.compute_dtype = 'float32'", r"fp16=True and compute_dtype='float32' contradict"),
    ],
)
def test_mistakes_in_a_python_config(python_config, line, message):
    with pytest.raises(UserError, match=message):
        load_config(python_config(line), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", "Unknown key 'lora_rnk'. Did you mean lora_rank"),
        ("lr: 1e-4", "Unknown key 'lr'. Did you mean learning_rate?"),
        ("num_train_epochs: 3", "Did you mean epochs?"),
        ("zzz: 3", "`jlora train --help` lists all keys."),
        ("lora_rank: eight", "lora_rank='eight': Expected int"),
        ("fp16: 1", "fp16=1: Expected bool"),
        ("lora_rank: [", "is not valid YAML"),
        pytest.param("mesh:\n" + "- " * 3000, "is not valid YAML: it is nested too deeply", id="deep"),
        ("chat_date: 2026-13-45", "is not valid YAML: month must be in 1..12"),
        ("output_dir: ~nobody-at-all/x", "output_dir='~nobody-at-all/x': There is no user 'nobody-at-all'"),
        pytest.param("train_data_dir: " + "x" * 300, "train_data_dir='x{100}': File name too long. Exp", id="long"),
        ("columns: q", "columns='q': Expected"),
        (
            "columns: {question: q}",
            "columns has 'question': 'q'. Expected text under one of the keys prompt, context, response",
        ),
        ("columns: {prompt: ''}", "columns has 'prompt': ''"),
        ("columns: {prompt: q}", "columns={'prompt': 'q'}: Expected prompt and response, or messages, or text"),
        ("columns: {prompt: q, response: a, messages: m}", "Expected prompt and response, or messages, or text"),
        ("role_prefixes: {user: Client}", "Expected prefixes for both user and assistant"),
        (
            "role_prefixes: {client: user}",
            "role_prefixes has 'client'.*Expected text under one of the keys system, user, assistant",
        ),
        ("encoding: klingon", "encoding='klingon': Expected the name of a Python text encoding"),
        ("encoding: hex", "encoding='hex': Expected the name of a Python text encoding"),
        ("bad_rows: skip", "bad_rows='skip': Expected one of error, drop"),
        ("mesh: {fspd: 2}", "mesh has 'fspd': 2. Expected a number of devices, or -1 for one axis, under data, fsdp"),
        ("mesh: {data: -1, fsdp: -1}", "Only one axis can be -1, which takes all remaining devices"),
        ("base_model: true", "base_model=True: Expected str"),
        ("lora_rnk: 8\nepochs: many", r"(?s)Did you mean lora_rank.*epochs='many': Expected float"),
    ],
)
def test_mistakes_in_a_yaml_config(yaml_config, text, message):
    with pytest.raises(UserError, match=message):
        load_config(yaml_config(text), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.lora_rnk=8", "Did you mean lora_rank"),
        ("--config.lora_rank=x", "lora_rank='x': Expected int"),
        ("--lora_rank=8", "Unknown argument '--lora_rank=8'. Settings are set with --config.KEY=VALUE"),
        ("--config.batch_size", "--config.batch_size has no value"),
        ("--config.batch_size=-1", "batch_size=-1: Expected a number above 0"),
    ],
)
def test_mistakes_in_an_override(python_config, override, message):
    with pytest.raises(UserError, match=message):
        load_config(python_config(), [override])


def test_missing_and_empty_files(tmp_path, python_config):
    with pytest.raises(UserError, match="No such file"):
        load_config(str(tmp_path / "none.py"), [])
    with pytest.raises(UserError, match="Expected a function get_config"):
        load_config(python_config(text="x = 1"), [])


def test_nan_is_rejected(python_config):
    with pytest.raises(UserError, match="learning_rate=nan"):
        load_config(python_config(), ["--config.learning_rate=.nan"])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("learning_rate", "learning_rate: float = 2e-4  # the highest, after warm-up\n"),
        ("quantize_base", "One of 'none', 'nf4', 'int8'."),
        ("columns", 'cannot be inferred: {"prompt": "q", "response": "a"}'),
        ("mesh", '= {"data": -1, "fsdp": 1, "tensor": 1}\n'),
    ],
)
def test_help_describes_one_key(key, said):
    for program in ("data", "train", "plan"):
        done = run_program(program, "--help", key)
        assert said in done.stdout and done.returncode == 0 and f"\n{key}:" in f"\n{done.stdout}"
        assert sum(f"\n{field.name}:" in f"\n{done.stdout}" for field in dataclasses.fields(Config)) == 1


def test_help_of_a_key_that_does_not_exist_proposes_one():
    done = run_program("data", "--help", "lr")
    assert done.stderr == "error: --help lr: Unknown key. Did you mean learning_rate?\n" and done.returncode == 2


def test_help_lists_every_key_with_its_default():
    said = run_program("train", "--help").stdout
    for field in dataclasses.fields(Config):
        assert f"\n{field.name}: " in said, field.name
    assert "\nlora_rank: int = 16  # rank r of the update" in said


CHINESE = "# 训练数据在这里\nlora_rank: 8\noutput_dir: 输出\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_yaml_config_may_have_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "config.yaml").write_bytes(f"train_data_dir: pairs\n{CHINESE}".encode(encoding))
    config = load_config(str(tmp_path / "config.yaml"), [])
    assert (config.train_data_dir, config.lora_rank, config.output_dir) == ("pairs", 8, "输出")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16-le"])
@pytest.mark.parametrize("name", ["config.yaml", "config.py"])
def test_a_config_in_another_encoding_is_refused_by_line(tmp_path, name, encoding):
    text = f"train_data_dir: pairs\n{CHINESE}" if name == "config.yaml" else PYTHON.replace("{line}", 'x = "训练数据"')
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    line = 2 if name == "config.yaml" else 6
    with pytest.raises(UserError, match=rf"{file}:{line}: Not .*Save the file as UTF-8") as error:
        load_config(str(file), [])
    assert len(str(error.value).splitlines()) == 1


def test_a_python_config_may_name_its_encoding(tmp_path):
    text = "# coding: gbk\n" + PYTHON.replace("{line}", 'c.output_dir = "输出"')
    (tmp_path / "config.py").write_bytes(text.encode("gbk"))
    assert load_config(str(tmp_path / "config.py"), []).output_dir == "输出"
    (tmp_path / "config.py").write_bytes(PYTHON.replace("{line}", "").encode("utf-8-sig"))
    assert load_config(str(tmp_path / "config.py"), []).train_data_dir == "pairs"
    (tmp_path / "config.py").write_bytes(PYTHON.replace("{line}", "").encode("utf-16"))
    with pytest.raises(UserError, match=r"config.py:1: Not valid UTF-8. Save the file as UTF-8"):
        load_config(str(tmp_path / "config.py"), [])


def test_a_path_beside_the_config_is_proposed(tmp_path, monkeypatch):
    """One rule for every path: it starts in the working directory."""
    (tmp_path / "elsewhere/configs/pairs").mkdir(parents=True)
    (tmp_path / "elsewhere/configs/own.jinja").touch()
    config = tmp_path / "elsewhere/configs/config.yaml"
    config.write_text("train_data_dir: pairs\neval_data_dir: none\nchat_template: own.jinja\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_config("elsewhere/configs/config.yaml", [])
    misplaced = {"train_data_dir": "pairs", "chat_template": "own.jinja"}
    assert str(error.value).splitlines()[1:] == [
        f"  {key}={name}: No such file or directory. Looked for {tmp_path}/{name}. A relative path starts in the "
        f"working directory, not beside the config. Set {key}=elsewhere/configs/{name}."
        for key, name in misplaced.items()
    ]
    overrides = [f"--config.{key}=elsewhere/configs/{name}" for key, name in misplaced.items()]
    assert load_config("elsewhere/configs/config.yaml", overrides).eval_data_dir == "none"
    monkeypatch.chdir(config.parent)
    assert load_config("config.yaml", []).train_data_dir == "pairs"
