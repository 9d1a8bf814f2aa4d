"""The document over a mixed pile of runs: nothing is mixed silently, what is missing is said."""

import csv
import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from lit_glm.report import main
from lit_glm.reporting.definitions import Translations
from lit_glm.reporting.document import run_command_line
from lit_glm.reporting.run_reader import ReportRun, _is_process_alive
from reporting.folders import make_run

PUBLISHED = "scoring=published"


def report(capfd: Any, *arguments: Any) -> "tuple[int, str, str]":
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    said = capfd.readouterr()
    return status, said.out, said.err


def tables(text: str) -> List[List[List[str]]]:
    """All tables of a Markdown document, cells stripped."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    split = [[[cell.strip() for cell in line.strip().strip("|").split(" |")] for line in t.splitlines()] for t in found]
    return [[row for row in table if not set(row[0]) <= {"-", "|"}] for table in split]


def result_rows(text: str) -> List[List[str]]:
    """Rows of all tables with the columns of results, up to the published rows."""
    measured = text.split("## Published rows")[0].split("## 已发布结果")[0]
    rows = [table for table in tables(measured) if len(table[0]) in (9, 10)]
    return [row for table in rows for row in table[1:]]


def test_single_run_has_the_published_row_format(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", PUBLISHED)
    status, text, _ = report(capfd, tmp_path / "run")
    assert status == 0
    assert result_rows(text) == [
        ["R300 1x8", "fp32", "bs=5,lr=1e-05", "2000.00", "3.40", "3.80", "4.00", "80.52%", "31.8/32.0", "1.06"]
    ]
    head = next(table[0] for table in tables(text) if len(table[0]) in (9, 10))
    assert head[1:] == [
        *("precision", "fix_hp", "e2e_time", "p_whole", "p_train", "p_core", "acc", "mem"),
        "step_p99_s",
    ]


def test_the_chinese_document_has_the_published_fields_in_their_order(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", PUBLISHED)
    _, text, _ = report(capfd, tmp_path, "--lang", "zh")
    fields = (
        "环境配置 硬件环境 机器型号 加速卡型号 多机网络类型、带宽 "
        "软件环境 OS版本 OS_kernel版本 加速卡驱动版本 Docker镜像和版本 训练框架版本 训练编译器版本 依赖软件版本 "
        "运行情况 通用指标 任务类别 模型 数据集 数据精度 超参修改 硬件设备简称 硬件存储使用 端到端时间 "
        "总吞吐量 训练吞吐量 计算吞吐量 训练结果 额外修改项 性能指标 配置"
    )
    place = 0
    for name in fields.split():
        found = text.find(name.replace("_", " "), place)
        assert found >= 0, name
        place = found
    assert "机器型号: R480-X8" in text
    assert "训练框架版本: xmlir 0.0.1" in text
    assert result_rows(text)[0][0] == "R300单机8卡（1x8）"


def test_seeds_become_one_row_with_median_and_spread(tmp_path: Path, capfd: Any) -> None:
    for number, p_core in enumerate((4.0, 5.0, 4.2)):
        make_run(tmp_path / str(number), f"seed={number}", p_core=p_core, acc=0.80 + 0.01 * number)
    _, text, _ = report(capfd, tmp_path)
    (row,) = result_rows(text)
    assert row[0] == "R300 1x8 (3 runs)"
    assert row[6] == "4.20 [4.00, 5.00]"
    assert row[7] == "81.00% [80.00%, 82.00%]"
    assert "median [lowest, highest] of 3 runs" in text


def test_runs_that_differ_in_more_than_the_seed_do_not_share_a_row(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "optimizer.weight_decay=0.2", p_core=9.0)
    _, text, _ = report(capfd, tmp_path)
    assert [row[6] for row in result_rows(text)] in (["4.00", "9.00"], ["9.00", "4.00"])
    assert "optimizer.weight_decay=0.2" in text


@pytest.mark.parametrize(
    ("result", "mark"),
    [
        ({"simulated": True}, "SIMULATED"),
        ({"status": "interrupted", "converged": False}, "interrupted"),
        ({"status": "failed", "converged": False, "error": "rank 3 died"}, "failed"),
        ({"status": "running", "converged": False}, "killed"),
        ({"status": "finished", "converged": False}, "not converged"),
        ({"interruptions": 2}, "resumed 2x"),
    ],
)
def test_row_label_contains_the_annotations_of_the_run(
    result: Dict[str, Any], mark: str, tmp_path: Path, capfd: Any
) -> None:
    make_run(tmp_path / "good")
    make_run(tmp_path / "other", environment={"host": "elsewhere"}, **result)
    for path in (tmp_path / "other").iterdir():
        os.utime(str(path), (1, 1))  # nobody has written there for long
    _, text, _ = report(capfd, tmp_path)
    rows = result_rows(text)
    assert len(rows) == (1 if mark in ("not converged", "resumed 2x") else 2)
    assert sum(mark in row[0] for row in rows) == 1
    if "error" in result:
        assert "rank 3 died" in text


def test_each_scoring_has_a_table_of_its_own(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "a", PUBLISHED)
    make_run(tmp_path / "b", p_core=400.0)
    _, text, _ = report(capfd, tmp_path)
    measured = text.split("## Published rows")[0]
    found = [table for table in tables(measured) if len(table[0]) in (9, 10)]
    assert [[row[6] for row in table[1:]] for table in found] == [["4.00"], ["400.00"]]


def test_an_empty_cell_has_a_reason(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", mem_actual_gib=None, status="failed", p_core=None, p_train=None, p_whole=None)
    _, text, _ = report(capfd, tmp_path)
    (row,) = result_rows(text)
    assert (row[4:7], row[8]) == (["", "", ""], "")
    assert "mem is empty" in text
    assert "p_whole, p_train, p_core is empty" in text
    assert "p_whole, p_train, p_core, mem has no value" in text.split("## Missing")[1]


def test_ratios_require_matching_settings(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "same", PUBLISHED, "hardware=a100", "bs=16", "precision.tf32=true", p_core=87.0)
    make_run(tmp_path / "fp32", PUBLISHED, "hardware=a100", "bs=16")
    make_run(tmp_path / "scoring", "hardware=a100", "bs=16", "precision.tf32=true")
    make_run(tmp_path / "simulated", PUBLISHED, simulated=True)
    _, text, _ = report(capfd, tmp_path)
    ratios = text.split("### Ratios")[1].split("## Missing")[0]
    assert "2.00x" in ratios  # 87.0 / 43.5
    assert ratios.count("no ratio: the published rows have another precision") == 1
    assert ratios.count("no ratio: the workload of scoring=shared_context differs") == 1
    assert ratios.count("no ratio: simulated") == 1


def test_check_option_lists_what_is_missing(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "one", PUBLISHED, environment={"network": None, "driver": None})
    status, text, said = report(capfd, tmp_path, "--check")
    assert status == 1
    assert said == ""
    for line in ("no complete row for 1x1", "no complete row for 2x8", "Accelerator driver version is unknown"):
        assert text.count(line) == 1
    assert "| config" not in text  # the list alone
    assert report(capfd, tmp_path, "--check", "--lang", "zh")[1].startswith("完整文档")
    make_run(tmp_path / "1x1", PUBLISHED, "topology=1x1")
    make_run(tmp_path / "2x8", PUBLISHED, "topology=2x8")
    told = ["report.driver=4.0.25", "report.network=InfiniBand"]
    status, text, said = report(capfd, tmp_path, "--check", *told)
    assert (status, text, said) == (0, "Nothing.\n", "")
    make_run(tmp_path / "missed", PUBLISHED, "bs=9", converged=False, skipped_steps=300, global_steps=1000)
    status, text, _ = report(capfd, tmp_path, "--check", *told)
    assert status == 1
    assert "the target accuracy was not reached" in text
    assert "300 of 1000 steps were skipped" in text


def test_best_and_sort_options(tmp_path: Path, capfd: Any) -> None:
    for bs, p_core, acc in ((4, 30.0, 0.81), (5, 40.0, 0.80), (6, 35.0, 0.83)):
        make_run(tmp_path / str(bs), f"bs={bs}", p_core=p_core, acc=acc)
    make_run(tmp_path / "failed", "bs=9", status="failed", p_core=99.0)
    status, text, _ = report(capfd, tmp_path, "--best")
    assert status == 0
    assert f"best of 3 by acc (83.00%): {tmp_path}/6" in text
    assert f"best of 3 by p_core (40.00): {tmp_path}/5" in report(capfd, tmp_path, "--best", "--sort", "p_core")[1]
    rows = result_rows(report(capfd, tmp_path, "--sort", "p_core")[1])
    assert [row[2].split(",")[0] for row in rows] == ["bs=5", "bs=6", "bs=4", "bs=9"]
    make_run(tmp_path / "early", "bs=7", e2e_time=10.0, converged=False)  # its limit of steps came first
    assert f"{tmp_path}/early" not in report(capfd, tmp_path, "--best", "--sort", "e2e_time")[1]
    assert result_rows(report(capfd, tmp_path, "--sort", "e2e_time")[1])[3][2].startswith("bs=7")
    status, _, said = report(capfd, tmp_path, "--sort", "beauty")
    assert status == 2
    assert "--sort beauty: must be one of acc, p_core" in said


def test_page_starts_with_summary_tiles(tmp_path: Path, capfd: Any) -> None:
    origin = {"command": ["/somewhere/train.py", "hardware=r300"], "git_commit": "abcdef0123456789"}
    make_run(tmp_path / "one", PUBLISHED, environment=origin, mfu=0.31, energy_j=5.2e6, samples_per_joule=0.01)
    make_run(tmp_path / "two", PUBLISHED, "topology=1x1", converged=False)
    page = report(capfd, tmp_path, "--format", "html")[1]
    assert page.index('<div class="cards">') < page.index("<table")
    assert page.count('<section class="card reached">') == page.count('<section class="card missed">') == 1
    for text in (
        "reached: 80.",
        "NOT reached: 80.",
        "31.0%",
        "5200.0 kJ",
        "python -m lit_glm.train hardware=r300 · abcdef012345",
    ):
        assert text in page, text
    assert page.index("<figure") < page.index("Environment")
    assert "<details><summary>Published rows of other devices" in page


def test_damaged_run_folders_do_not_affect_other_runs(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "good")
    for name, content in (("torn", '{"hardware": "r3'), ("list", "[1, 2]"), ("other", '{"a": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    make_run(tmp_path / "bare")
    for name in ("environment.json", "job.json", "steps.csv", "evals.csv", "memory.csv"):
        (tmp_path / "bare" / name).unlink()
    make_run(tmp_path / "strange", p_core="fast", acc=True, e2e_time=float("nan"))
    status, text, said = report(capfd, tmp_path, tmp_path / "nowhere*", "--format", "html")
    assert status == 0
    assert said.count("result.json cannot be read") == 3
    assert "nowhere*: no such folder" in said
    assert "<svg" in text


HOSTILE = '<script>alert(1)</script>"&|`$x$ ]('


def test_malicious_names_are_escaped(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "a<b>&'$x$"
    environment = {"host": HOSTILE, "machine": HOSTILE, "device_name": HOSTILE, "driver": "=cmd()"}
    make_run(folder, environment=environment, status="failed", error=HOSTILE, fix_hp="=1+1|<b>")
    _, page, _ = report(capfd, folder, "--format", "html")
    assert page.count("<script") == 1
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    _, text, _ = report(capfd, folder)
    assert "<script" not in text.replace("\\<script", "")
    _, table, _ = report(capfd, folder, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(table))
    assert row["fix_hp"] == "'=1+1|<b>"  # no spreadsheet takes it for a formula


def test_csv_has_the_figures_as_numbers(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "a", "seed=1", p_core=4.0)
    make_run(tmp_path / "b", "seed=2", p_core=5.0)
    _, text, _ = report(capfd, tmp_path, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(text))
    assert [float(row[f"p_core_{end}"]) for end in ("median", "min", "max")] == [4.5, 4.0, 5.0]
    assert (row["p_core"], row["runs"], row["scoring"]) == ("4.50", "2", "shared_context")


def test_all_formats_and_languages_into_a_folder(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run")
    out = tmp_path / "out"
    status, said, _ = report(capfd, tmp_path / "run", "--format", "md,csv,html", "--lang", "en,zh", "--out", out)
    names = {f"report.{language}.{kind}" for language in ("en", "zh") for kind in ("md", "csv", "html")}
    assert (status, {path.name for path in out.iterdir()}) == (0, names)
    assert len(said.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pdf"], "--format pdf: must be one or more of md,csv,html"),
        (["--lang", "fr"], "--lang fr: must be"),
        (["--format", "md,csv"], "several files need --out DIR"),
        (["report.colour=red"], "report.colour: unknown key"),
        (["--best", "--sort", "mfu"], "--sort mfu: no complete run has this metric"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot be written"),
    ],
)
def test_wrong_arguments(arguments: List[str], message: str, tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run")
    status, _, said = report(capfd, tmp_path / "run", *arguments)
    assert (status, message in said, "Traceback" in said) == (2, True, False)


def test_a_sweep_folder_includes_the_runs_that_it_reused(tmp_path: Path, capfd: Any) -> None:
    reused = make_run(tmp_path / "earlier" / "0", "bs=4")
    make_run(tmp_path / "sweep" / "0", "bs=5")
    (tmp_path / "sweep" / "jobs").mkdir()
    for number, run_dir in enumerate([str(reused), str(tmp_path / "deleted"), None]):
        (tmp_path / "sweep" / "jobs" / f"{number:05d}.json").write_text(json.dumps({"run_dir": run_dir}))
    status, text, _ = report(capfd, tmp_path / "sweep", "--format", "csv")
    found = [row["fix_hp"].split(",")[0] for row in csv.DictReader(text.splitlines()) if row.get("fix_hp")]
    assert (status, sorted(found)) == (0, ["bs=4", "bs=5"])


def test_no_runs_at_all(tmp_path: Path, capfd: Any) -> None:
    status, _, said = report(capfd)
    assert (status, "no runs given: give run folders, sweep folders" in said) == (2, True)
    status, _, said = report(capfd, tmp_path)
    assert (status, "no run was found" in said) == (2, True)


def test_published_rows_have_known_values_and_sources() -> None:
    from lit_glm.reporting.published_rows import load_published_rows

    rows = {(row["hardware"], row["topology"], row["fix_hp"]): row for row in load_published_rows()}
    ours = rows["r300", "2x8", "bs=4,lr=1e-05"]
    assert (ours["acc"], ours["mem_actual_gib"], ours["mem_total_gib"]) == (0.8031, 31.7, 32.0)
    assert all(row["source"] for row in rows.values())
    assert json.dumps(load_published_rows())


def test_runs_on_different_machines_have_separate_rows(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "a", PUBLISHED, environment={"cpu": "EPYC", "cores": 64})
    make_run(tmp_path / "b", PUBLISHED, environment={"cpu": "Xeon", "cores": 64}, p_core=160.0)
    make_run(tmp_path / "c", PUBLISHED, environment={"cpu": "EPYC", "cores": 64})
    _, text, _ = report(capfd, tmp_path)
    assert [row[0].split(" (")[1].split(", e")[0] for row in result_rows(text)] == [
        "#1, cpu: EPYC, 2 runs)",
        "#2, cpu: Xeon)",
    ]
    status, text, _ = report(capfd, tmp_path, "--check")
    assert status == 1
    assert "measured on a different machine or software than another row of the same name (cpu: Xeon)" in text


def test_runs_that_are_not_results_are_in_a_second_table(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "good", PUBLISHED)
    make_run(tmp_path / "rehearsed", PUBLISHED, simulated=True, p_core=900.0)
    make_run(tmp_path / "profiled", PUBLISHED, profiled=True)
    make_run(tmp_path / "stopped", PUBLISHED, status="interrupted")
    make_run(tmp_path / "tune" / "tries" / "bs5_0", PUBLISHED, p_core=77.0)
    (tmp_path / "tune" / "tune.json").write_text("{}")
    for language, heading in (("en", "Other runs"), ("zh", "其他运行")):
        _, text, _ = report(capfd, tmp_path, "--lang", language)
        results, others = text.split(heading)
        assert len(result_rows(results)) == 1
        assert len(result_rows(others)) == 3
        assert "77.0" not in text
    _, text, _ = report(capfd, tmp_path / "good", tmp_path / "rehearsed")
    assert "Other runs" not in text
    assert [("SIMULATED" in row[0]) for row in result_rows(text)].count(True) == 1
    status, _, said = report(capfd, tmp_path / "tune" / "tries" / "bs5_0")
    assert status == 2
    assert "is a trial of tune" in said


def test_simulated_runs_are_marked_in_every_figure(tmp_path: Path, capfd: Any) -> None:
    for bs in (4, 5):
        make_run(tmp_path / str(bs), f"bs={bs}", simulated=True)
    for language, word in (("en", "SIMULATED"), ("zh", "模拟运行")):
        page = report(capfd, tmp_path, "--format", "html", "--lang", language)[1]
        figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
        assert len(figures) > 4
        for figure in figures:
            assert word in figure.split("<figcaption>")[1]
        legends = [figure for figure in figures if "bs=5" in figure]
        assert legends
        assert all(Translations(language).with_note("bs=5", word) in figure for figure in legends)


def test_run_on_another_host_is_alive_while_a_file_is_recent(tmp_path: Path) -> None:
    for name, age_s in (("job.json", 4000.0), ("steps.csv", 5.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s, time.time() - age_s))
    assert _is_process_alive(tmp_path, {"host": "elsewhere", "pid": 1})
    os.utime(tmp_path / "steps.csv", (time.time() - 4000.0, time.time() - 4000.0))
    assert not _is_process_alive(tmp_path, {"host": "elsewhere", "pid": 1})


def test_command_of_a_sweep_run_has_its_own_overrides(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- bs=8\n- 'lr=1e-3'\n")
    command = ["/somewhere/train.py", "bs=4,8", "lr=1e-3,2e-3", "--config-dir=/own", "-m"]
    run = ReportRun(tmp_path, {}, {"command": command}, {})
    assert run_command_line(run) == "python -m lit_glm.train bs=8 lr=1e-3 --config-dir=/own"


def one_row(capfd: Any, *runs: Path) -> Any:
    """The row and the notes of runs that are repetitions of one measurement; None if they are several rows."""
    text = report(capfd, *map(str, runs))[1]
    rows = result_rows(text)
    return rows[0] if len(rows) == 1 else None


def with_settings(run: Path, **changes: Any) -> Path:
    """Change keys of the configuration in job.json; None removes one."""
    job = json.loads((run / "job.json").read_text())
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if value is None:
            del job["config"][group][name]
        else:
            job["config"][group][name] = value
    (run / "job.json").write_text(json.dumps(job))
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"run__shutdown_timeout_s": 60.0},
        {"run__overwrite": True},
        {"run__stall_timeout_s": 5.0},
        {"model__compile": None},
    ],
)
def test_keys_without_effect_on_results_do_not_split_rows(changes: Dict[str, Any], tmp_path: Path, capfd: Any) -> None:
    """Nor does a key that the version of a run did not have yet."""
    one = make_run(tmp_path / "one", PUBLISHED)
    other = with_settings(make_run(tmp_path / "other", PUBLISHED), **changes)
    assert "2 runs" in one_row(capfd, one, other)[0]


def test_different_data_or_variables_give_separate_rows(tmp_path: Path, capfd: Any) -> None:
    one = make_run(tmp_path / "one", PUBLISHED, data_fingerprint="a-b")
    assert one_row(capfd, one, make_run(tmp_path / "same", PUBLISHED, data_fingerprint="a-b"))
    data = make_run(tmp_path / "data", PUBLISHED, data_fingerprint="c-d")
    text = report(capfd, str(one), str(data))[1]
    assert len(result_rows(text)) == 2
    assert "with data=a-b" in text
    name = next(iter(json.loads((one / "job.json").read_text())["config"]["hardware"]["env"]))
    kept = {"variables": {name: "mine"}}
    variable = make_run(tmp_path / "kept", PUBLISHED, environment=kept, data_fingerprint="a-b")
    text = report(capfd, str(one), str(variable))[1]
    assert len(result_rows(text)) == 2
    assert f"with hardware.env.{name}=mine" in text


def test_user_callbacks_and_peaks_give_separate_rows(tmp_path: Path, capfd: Any) -> None:
    one = make_run(tmp_path / "one", PUBLISHED)
    slow = with_settings(make_run(tmp_path / "slow", PUBLISHED), callbacks__slow={"_target_": "mine.Slow"})
    text = report(capfd, str(one), str(slow))[1]
    assert len(result_rows(text)) == 2
    assert "callbacks.slow._target_=mine.Slow" in text
    peak = with_settings(make_run(tmp_path / "peak", PUBLISHED), hardware__peak_tflops={"fp32": 1.0})
    assert "hardware.peak_tflops.fp32=1.0" in report(capfd, str(one), str(peak))[1]


def test_a_machine_that_is_unknown_is_named(tmp_path: Path, capfd: Any) -> None:
    one, other = (make_run(tmp_path / name, PUBLISHED) for name in ("one", "other"))
    environment = json.loads((other / "environment.json").read_text())
    del environment["driver"]
    (other / "environment.json").write_text(json.dumps(environment))
    labels = [row[0] for row in result_rows(report(capfd, str(one), str(other))[1])]
    assert any("driver: 4.0.25" in label for label in labels)
    assert any("driver: unknown" in label for label in labels)


def test_runs_of_unknown_machines_are_not_averaged(tmp_path: Path, capfd: Any) -> None:
    for name in ("one", "other"):
        (make_run(tmp_path / name, PUBLISHED) / "environment.json").unlink()
    assert len(result_rows(report(capfd, tmp_path)[1])) == 2


def test_figures_that_only_some_runs_have_are_counted(tmp_path: Path, capfd: Any) -> None:
    runs = [make_run(tmp_path / "one", PUBLISHED), make_run(tmp_path / "other", PUBLISHED, p_train=None)]
    text = report(capfd, *map(str, runs))[1]
    assert "p_train is known of 1 of 2 runs" in text


def test_null_throughput_is_not_reported_as_run_without_steps(tmp_path: Path, capfd: Any) -> None:
    run = make_run(tmp_path / "run", PUBLISHED, status="failed", p_train=None, p_core=None)
    text = report(capfd, str(run))[1]
    assert "no training step was measured" not in text
    assert re.search(r"p_train, p_core.* is empty: result.json has no such value", text)


@pytest.mark.parametrize("steps", [None, "", "1e999"])
def test_a_page_of_runs_without_a_step(steps: Optional[str], tmp_path: Path, capfd: Any) -> None:
    run = make_run(tmp_path / "run", PUBLISHED)
    head = (run / "steps.csv").read_text().splitlines()[0]
    (run / "steps.csv").write_text(f"{head}\n" + (f"1,0,4,{steps},0,1,0,0,{steps},\n" if steps else ""))
    if steps is None:
        (run / "steps.csv").unlink()
    assert report(capfd, str(run), "--format", "html")[0] == 0


def test_copied_tune_trial_is_rejected(tmp_path: Path, capfd: Any) -> None:
    run = make_run(tmp_path / "copied", PUBLISHED)
    job = json.loads((run / "job.json").read_text())
    (run / "job.json").write_text(json.dumps({**job, "is_trial": True}))
    status, _, said = report(capfd, str(run))
    assert (status, "is a trial of tune" in said) == (2, True)


def test_report_does_not_overwrite_user_files(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", PUBLISHED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.en.md").write_text("mine")
    status, _, said = report(capfd, str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert (status, "was not written by report" in said) == (2, True)
    assert (tmp_path / "out" / "report.en.md").read_text() == "mine"
    for _ in range(2):
        everything = ["--format", "md,csv,html", "--lang", "en,zh", "--out", str(tmp_path / "new")]
        assert report(capfd, str(tmp_path / "run"), *everything)[0] == 0


def test_a_target_below_the_published_one_has_no_ratio_of_e2e_time(tmp_path: Path, capfd: Any) -> None:
    workload = ["model=glm_large", "data=record"]
    make_run(tmp_path / "easy", PUBLISHED, *workload, "run.target_accuracy=0.3", acc=0.31)
    _, text, _ = report(capfd, tmp_path / "easy")
    assert "no ratio of e2e_time: the run ends at run.target_accuracy=0.3, published runs at 0.8" in text
    make_run(tmp_path / "whole", PUBLISHED, *workload)
    _, text, _ = report(capfd, tmp_path / "whole")
    assert "no ratio of" not in text  # of two published rows of this pair, one has figures


def test_runs_with_different_checkpoint_intervals_have_separate_rows(tmp_path: Path, capfd: Any) -> None:
    """Throughput of the whole includes the time to save."""
    for every in ("1", "null"):
        make_run(tmp_path / every, PUBLISHED, f"run.checkpoint_interval_steps={every}")
    _, text, _ = report(capfd, tmp_path)
    assert len(result_rows(text)) == 2
    assert "run.checkpoint_interval_steps=1" in text


def test_glob_pattern_selects_the_same_runs_as_the_folder(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "runs" / "good", PUBLISHED)
    make_run(tmp_path / "runs" / "bad", PUBLISHED, status="failed", bs=7)
    by_folder, by_pattern = (report(capfd, tmp_path / place)[1] for place in ("runs", "runs/*"))
    assert result_rows(by_folder) == result_rows(by_pattern)
    by_file, named = (report(capfd, tmp_path / "runs" / place)[1] for place in ("bad/result.json", "bad"))
    assert result_rows(by_file) == result_rows(named)


def test_foreign_and_partial_result_files_are_tolerated(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "top" / "run", PUBLISHED)
    (tmp_path / "top" / "result.json").write_text('{"x": 1}')
    status, text, said = report(capfd, tmp_path / "top")
    assert (status, len(result_rows(text))) == (0, 1)
    assert "not a result of train" in said
    partial = make_run(tmp_path / "partial", PUBLISHED, acc=0.9)
    content = json.loads((partial / "result.json").read_text())
    del content["precision"]
    (partial / "result.json").write_text(json.dumps({**content, "fix_hp": "a\nb|c"}))
    status, text, _ = report(capfd, partial, "--best")
    assert status == 0
    assert "| R300 1x8" in text or "| r300 1x8" in text
    assert "a b\\|c" in text


def test_options_that_would_be_ignored_are_rejected(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", PUBLISHED)
    assert report(capfd, tmp_path / "run", "--best", "--out", tmp_path / "out")[0] == 2
    assert report(capfd, tmp_path / "run", "--max-loss-diff", "1")[0] == 2


@pytest.mark.parametrize(
    ("overrides", "result", "reason"),
    [
        (["model.num_layers=2"], {}, "model.num_layers=2"),
        ([], {"computed_on_cpu": True}, "no ratio: computed on the CPU"),
    ],
)
def test_different_shape_or_device_has_no_ratio(
    overrides: List[str], result: Dict[str, Any], reason: str, tmp_path: Path, capfd: Any
) -> None:
    make_run(tmp_path / "run", PUBLISHED, "model=glm_large", "data=record", *overrides, **result)
    _, text, _ = report(capfd, tmp_path / "run")
    assert reason in text
    assert "x |" not in text.split("## Published rows")[1]


def test_report_tolerates_damaged_fields(tmp_path: Path, capfd: Any) -> None:
    make_run(tmp_path / "run", PUBLISHED, missing_data=5, environment_changes=7, e2e_time=0.0)
    for more in (["--best"], ["--format", "html"], []):
        assert report(capfd, tmp_path / "run", *more)[0] == 0
