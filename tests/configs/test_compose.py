"""Every shipped file composes and fits the schema; wrong names, keys, types and ranges are said in one message."""

import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import lit_glm, lit_glm_here
from lit_glm.config.hydra_main import CONF_DIR, compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError

GROUPS = {
    "hardware": ["cpu", "r300", "cuda", "a100", "h100", "h200", "bi_v100", "k100", "c500"],
    "topology": ["1x1", "1x2", "1x4", "1x8", "2x8", "4x8"],
    "precision": ["fp32", "amp", "fp16", "bf16"],
    "model": ["glm_large", "glm_base", "glm_small", "glm_tiny"],
    "data": ["record", "synthetic"],
    "scoring": ["shared_context", "published"],
    "experiment": ["quickstart", "flagperf", "rehearse", "debug"],
    "logger": ["csv", "none", "tensorboard", "mlflow", "wandb"],
    "callbacks": ["default", "none", "profile"],
    "optimizer": ["adamw"],
}
FILES = [(file.parent.name, file.stem) for file in sorted(CONF_DIR.glob("*/*.yaml")) if file.parent.name in GROUPS]


def configuration(*overrides: str) -> TrainConfig:
    return validate_config(compose_config("train", overrides), TrainConfig)


def test_config_groups_match_the_documented_names() -> None:
    """A chip of one's own is one file more in hardware/, and values of a pair are one more in fix_hp/."""
    named = {(group, name) for group, names in GROUPS.items() for name in names}
    assert named <= set(FILES)
    assert {group for group, _ in set(FILES) - named} <= {"hardware"}


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_composes(group: str, name: str) -> None:
    configuration(f"{group}={name}")


@pytest.mark.parametrize("hardware", [name for group, name in FILES if group == "hardware"])
def test_hardware_files_with_peak_tflops_name_their_source(hardware: str) -> None:
    config = configuration(f"hardware={hardware}")
    assert config.hardware.name == hardware
    assert set(config.hardware.peak_tflops) == {"fp32", "tf32", "amp", "fp16", "bf16"}
    if any(config.hardware.peak_tflops.values()):
        assert config.hardware.source


def test_r300_1x8_is_as_published() -> None:
    config = configuration("hardware=r300", "topology=1x8")
    assert (config.bs, config.eval_bs, config.lr, config.precision.name, config.model.gelu) == (
        5,
        5,
        1e-5,
        "fp32",
        "erf",
    )
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (24, 1024, 16)
    assert (config.model.vocab_size, config.model.max_sequence_length, config.data.max_seq_length) == (30592, 512, 512)
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.1, 0.1)
    assert config.model.activation_checkpointing
    optimizer = config.optimizer
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.1, 0.9, 0.999, 1e-8)
    assert (optimizer.clip_grad, optimizer.warmup, optimizer.lr_decay_ratio) == (1.0, 0.1, 0.1)
    assert (optimizer.lr_decay_iters, optimizer.gradient_accumulation_steps) == (4338, 1)
    run = config.run
    assert (run.target_accuracy, run.eval_interval_samples, run.eval_start_samples) == (0.8, 19200, 100)
    assert (run.max_samples, config.seed, config.fix_hp_source) == (5553080, 4096, "r300_1x8")


@pytest.mark.parametrize(("topology", "bs", "samples"), [("1x1", 4, 4000), ("1x8", 5, 5553080), ("2x8", 4, 20000)])
def test_fix_hp_values_apply_to_hardware_and_topology(topology: str, bs: int, samples: int) -> None:
    for overrides in (
        ["hardware=r300", f"topology={topology}"],
        ["experiment=flagperf", f"topology={topology}", "hardware=r300"],
    ):
        config = configuration(*overrides)
        assert (config.bs, config.run.max_samples, config.fix_hp_source) == (bs, samples, f"r300_{topology}")
    assert configuration("hardware=r300", f"topology={topology}", "bs=2", "lr=3e-5").fix_hp == "bs=2,lr=3e-05"
    assert configuration("hardware=h100", f"topology={topology}").fix_hp_source == "none"


def test_fix_hp_values_apply_when_an_experiment_sets_the_pair(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hardware: r300\n  - override /topology: 2x8\n"
    )
    config = configuration(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert (config.bs, config.run.max_samples) == (4, 20000)


def test_messages_are_the_same_under_a_debugger(capfd: Any) -> None:
    """OmegaConf raises other exceptions while a trace function is set."""
    tracer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert lit_glm_here("train", "model.hiden_size=4", "--cfg", "job") == 2
    finally:
        sys.settrace(tracer)
    assert "model.hiden_size: unknown key (nearest: model.hidden_size)" in capfd.readouterr().err


def test_hardware_file_without_name_is_rejected(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "hardware").mkdir()
    cpu = (CONF_DIR / "hardware" / "cpu.yaml").read_text()
    (tmp_path / "hardware" / "mine.yaml").write_text(cpu.replace("name: cpu", ""))
    assert lit_glm_here("train", f"hydra.searchpath=[file://{tmp_path}]", "hardware=mine", "--cfg", "job") == 2
    assert "hardware.name: must have a value" in capfd.readouterr().err


def test_first_comment_of_an_experiment_is_its_command() -> None:
    for name in GROUPS["experiment"]:
        lines = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
        assert lines[0] == "# @package _global_"  # Hydra reads it nowhere else
        assert lines[1].startswith(f"# python -m lit_glm.train experiment={name}")


def test_gelu_and_checkpointing_follow_hardware_and_scoring() -> None:
    assert configuration("hardware=cpu").model.gelu == "tanh"
    assert not configuration("hardware=h100").model.activation_checkpointing
    assert configuration("hardware=h100", "scoring=published").model.activation_checkpointing
    assert configuration("scoring=shared_context").data.balance_ranks
    assert not configuration("scoring=published").data.balance_ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("+typo=1", "typo: unknown key"),
        ("++typo=1", "typo: unknown key"),
        ("+typo=1 --cfg job", "typo: unknown key"),
        ("bss=4", "did you mean bs"),
        ("model.hiden_size=4", "model.hidden_size"),
        ("hardware=r3000", "nearest: r300"),
        ("topology=3x3", "1x1, 1x2, 1x4, 1x8, 2x8, 4x8"),
        ("modle=glm_tiny", "did you mean model"),
        ("bs=abc", "bs=abc: must be a whole number"),
        ("bs=abc --cfg job", "bs=abc: must be a whole number"),
        ("lr=fast", "lr=fast: must be a number"),
        ("bs=0", "bs=0: must be at least 1"),
        ("lr=nan", "lr=nan: must be a finite number"),
        ("optimizer.beta1=1", "below 1"),
        ("model.gelu=relu", "must be one of tanh, erf"),
        ("model.hidden_size=65", "multiple of model.num_attention_heads"),
        (
            "optimizer.lr_decay_iters=3 optimizer.gradient_accumulation_steps=4",
            "optimizer.lr_decay_iters=3: must be at least optimizer.gradient_accumulation_steps=4",
        ),
        ("precision.tf32=maybe", "precision.tf32=maybe"),
        ("bs==", "bs=="),
        ("-m bs=1,x hydra.sweep.dir=sweep", "bs=x: must be a whole number"),
        ("-m topology=glob(zz*) hydra.sweep.dir=sweep", "topology=glob(zz*): matches no file of conf/topology/"),
        ("run.max_sample=3", "run.max_sample: unknown key (nearest: run.max_samples); the keys are run.max_samples, "),
        ("precision.tf33=true", "(nearest: precision.tf32); the keys are precision.tf32, precision.loss_scale"),
        ("data.synthetic.lengths=foo", "data.synthetic.lengths=foo: must be one of short, record"),
        ("hydra.sweeper.params={bs:1}", "Hydra cannot apply hydra.sweeper.params={bs:1}"),
    ],
)
def test_invalid_input_gives_one_message_and_exit_status_2(
    arguments: str, said: str, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "-m" in arguments:
        arguments += " data.train_file=nowhere"
    assert lit_glm_here("train", *arguments.split()) == 2
    output = capfd.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("callbacks=null", "choose one of default, none, profile; `none` is one of the names"),
        ("logger=null", "choose one of csv, mlflow, none"),
        ("model=[glm_tiny,glm_small]", "must be one name, not a list; choose one of glm_base, glm_large"),
        ("hardware=null", "choose one of a100, bi_v100"),
        ("topology=[1x1]", "must be one name, not a list; choose one of 1x1, 1x2"),
        ("fix_hp=nope", "unknown fix_hp; choose one of a100_1x1"),
        ("precision=16", "unknown precision; choose one of amp, bf16"),
        ("run=5", "is a group of keys; set run.KEY=VALUE"),
        ("~optimizer", "a run needs these keys"),
    ],
)
def test_invalid_group_choice_error_lists_valid_names(override: str, said: str, capfd: Any) -> None:
    assert lit_glm_here("train", "experiment=debug", override) == 2
    assert f"{override}: {said}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "override", ["hardware.name=h100", "model.name=glm_large", "++data.name=record", "-m hardware.name=a,b"]
)
def test_setting_the_name_key_of_a_group_is_rejected(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", "experiment=debug", *override.split()) == 2
    group = override.split()[-1].lstrip("+").split(".")[0]
    assert f"choose {group}=NAME" in capfd.readouterr().err
    assert not list(tmp_path.rglob("result.json"))


def test_an_error_that_is_its_own_cause_is_explained(tmp_path: Path) -> None:
    """omegaconf makes such a chain where OC_CAUSE is set, or under a debugger."""
    done = lit_glm("train", "experiment=debug", "+typo=1", cwd=tmp_path, env={"OC_CAUSE": "1"}, timeout=60)
    assert done.returncode == 2
    assert "typo" in done.stderr
    assert "Traceback" not in done.stderr


def test_record_data_with_synthetic_settings_is_rejected() -> None:
    """The experiment sets the size of generated data, whatever `data` is chosen."""
    with pytest.raises(InputError, match="data.synthetic is set .* add data.synthetic=null"):
        validate_config(compose_config("train", ["experiment=debug", "data=record"]), TrainConfig)
    config = compose_config("train", ["experiment=debug", "data=record", "data.synthetic=null"])
    assert validate_config(config, TrainConfig).data.synthetic is None
