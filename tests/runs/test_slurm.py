"""A real Slurm of one host and two slurmd (Debian: apt-get install slurm-wlm): srun, requeue, sbatch without srun."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from conftest import command, rows
from runs.processes import free_port
from runs.test_runs import result

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "launch_slurm.sh"
TWO_NODES = ["experiment=debug", "topology.num_nodes=2", "topology.devices_per_node=1"]
LONG = ["run.max_steps=100000", "run.max_samples=10000000", "run.eval_interval_samples=10000000"]
STEP = ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks-per-node=1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "srun"))) or os.geteuid() != 0,
        reason="needs slurm-wlm and root",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, str]]:
    """Variables of a cluster of its own, which ends with the tests."""
    folder, host, ports = tmp_path_factory.mktemp("slurm"), socket.gethostname(), [free_port() for _ in range(3)]
    (folder / "state").mkdir()
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs=2" for number in (1, 2)
    )
    (folder / "slurm.conf").write_text(
        f"ClusterName=t\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nAuthType=auth/none\n"
        f"CredType=cred/none\nSlurmUser=root\nSlurmdUser=root\nStateSaveLocation={folder}/state\n"
        f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/slurmd.%n.pid\nSlurmdSpoolDir={folder}/spool.%n\n"
        f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/slurmd.%n.log\nProctrackType=proctrack/linuxproc\n"
        f"TaskPlugin=task/none\nSelectType=select/cons_tres\nSwitchType=switch/none\nMpiDefault=none\n"
        f"ReturnToService=2\nKillWait=30\nJobRequeue=1\n{nodes}\n"
        "PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4\n"
    )
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name of a host
    }
    daemons = [
        subprocess.Popen([*command, "-D"], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "n1", "-c"], ["slurmd", "-N", "n2", "-c"])
    ]
    try:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            told = subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=variables, capture_output=True, text=True
            )
            if told.stdout.strip() == "2":
                break
            time.sleep(0.5)
        else:
            pytest.skip(f"Slurm does not start here: {(folder / 'ctld.log').read_text()[-500:]}")
        yield variables
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def run(command: List[str], slurm: Dict[str, str], folder: Path) -> Any:
    return subprocess.run(command, env=slurm, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def wait_for_steps(folder: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        files = list(folder.glob("outputs/slurm-*/steps.csv"))
        if files and len(files[0].read_text().splitlines()) > count:
            return
        time.sleep(0.2)
    raise AssertionError([path.read_text()[-2000:] for path in folder.glob("*.log")])


def test_srun_on_two_nodes(slurm: Dict[str, str], tmp_path: Path) -> None:
    done = run([*STEP, "bash", str(SCRIPT), *TWO_NODES, "run.max_steps=4"], slurm, tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/slurm-*")
    assert (result(folder)["status"], result(folder)["topology"]) == ("finished", "2x1")
    again = run([*STEP, "bash", str(SCRIPT), *TWO_NODES, f"hydra.run.dir={folder}"], slurm, tmp_path)
    assert again.returncode in (2, 143), again.stderr  # the node that refuses ends the other, which waits for nobody
    assert "already contains a run" in again.stderr


def test_sbatch_without_srun_is_rejected(slurm: Dict[str, str], tmp_path: Path) -> None:
    line = f"bash {SCRIPT} {' '.join(TWO_NODES)}"
    done = run(["sbatch", "--wait", "--nodes=2", "--output=job.log", "--wrap", line], slurm, tmp_path)
    assert done.returncode == 2
    assert "srun is missing" in (tmp_path / "job.log").read_text()


def test_requeued_slurm_job_resumes(slurm: Dict[str, str], tmp_path: Path) -> None:
    line = " ".join([*STEP, "bash", str(SCRIPT), *TWO_NODES, *LONG])
    submit = ["sbatch", "--parsable", "--requeue", "--open-mode=append", "--nodes=2", "--ntasks-per-node=1"]
    job = run([*submit, "--output=job.log", "--wrap", line], slurm, tmp_path).stdout.strip()
    wait_for_steps(tmp_path, 5)
    assert run(["scontrol", "requeue", job], slurm, tmp_path).returncode == 0
    (folder,) = tmp_path.glob("outputs/slurm-*")
    limit = time.monotonic() + 60
    while result(folder)["status"] != "interrupted" and time.monotonic() < limit:
        time.sleep(0.2)
    saved = len(rows(folder / "steps.csv"))
    limit = time.monotonic() + 180
    while len(rows(folder / "steps.csv")) <= saved + 5 and time.monotonic() < limit:
        # Not after Slurm's pause of two minutes; refused until the job has left its nodes.
        run(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm, tmp_path)
        time.sleep(1.0)
    run(["scancel", "--full", job], slurm, tmp_path)
    limit = time.monotonic() + 60
    while result(folder)["status"] != "interrupted" and time.monotonic() < limit:
        time.sleep(0.2)
    log = (tmp_path / "job.log").read_text()
    assert f"resuming after step {saved}" in log, log[-3000:]
    assert result(folder)["interruptions"] == 1
    assert list(tmp_path.glob("outputs/slurm-*")) == [folder]
    steps = [int(row["step"]) for row in rows(folder / "steps.csv")]
    assert steps == list(range(1, len(steps) + 1))


def test_slurm_sweep_skips_complete_jobs_and_reports_queued_jobs(slurm: Dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    plugin = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.partition=p"]
    plugin += ["hydra.launcher.mem_gb=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.array_parallelism=1"]
    sweep = command("train", "-m", "experiment=debug", "hydra.sweep.dir=sweep", "logger={}", *plugin)
    first = run([*sweep, "run.max_steps=3", "bs=2,4"], slurm, tmp_path)
    assert first.returncode == 0, first.stderr
    submitted = set((tmp_path / "sweep" / ".submitit").glob("[0-9]*_[0-9]*"))
    assert len(submitted) == 2
    again = run([*sweep, "run.max_steps=3", "bs=2,4"], slurm, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("complete, reused from") == 2
    assert set((tmp_path / "sweep" / ".submitit").glob("[0-9]*_[0-9]*")) == submitted

    process = subprocess.Popen(
        [*sweep, *LONG, "bs=2,3"], env=slurm, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while not list((tmp_path / "sweep").glob("*/steps.csv"))[2:] and time.monotonic() < limit:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    (cancel,) = re.findall(r"cancel with: (scancel \d+)$", err, re.MULTILINE)
    assert process.returncode == 130
    assert "2 jobs of this sweep may still be queued or running in Slurm" in err
    assert run(cancel.split(), slurm, tmp_path).returncode == 0
    limit = time.monotonic() + 60
    while run(["squeue", "-h"], slurm, tmp_path).stdout.strip() and time.monotonic() < limit:
        time.sleep(0.5)
    assert not run(["squeue", "-h"], slurm, tmp_path).stdout.strip()
